"""The main job: one process of it, from settings to trained weights.

    python -m pretrain train configs/van_b3_in22k.yaml key=value …

Every rank runs this file from top to bottom: data, model, engine, the newest checkpoint if there is one, the loop. It ends with 0
when training is complete, and with 85 when it was told to stop, has saved, and wants to be started again.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data.draws import hash64
from data.index import open_index
from data.loader import EvalLoader, TrainLoader
from data.mixing import mix_pairs
from data.quarantine import Quarantine
from data.recipe import sample_order
from pretrain import config as settings
from pretrain import engine as engines
from pretrain import zero_state
from pretrain.batch_stats import BatchStats
from pretrain.checkpoint import Checkpoints, Retention, hold, steps
from pretrain.config import Config
from pretrain.damage import check_shards, tell_all
from pretrain.evaluate import build_model, evaluate, fill
from pretrain.exit_codes import EXIT_AGAIN
from pretrain.faults import StopSignals
from pretrain.initial_weights import start_from
from pretrain.memory import explained
from pretrain.metrics import RunLog, duration
from pretrain.optim import learning_rate
from pretrain.profiling import Profiler
from pretrain.provenance import provenance, record_start
from pretrain.stragglers import OwnTime
from pretrain.van import use_kernels


def train(config: Config, force_config: bool = False) -> int:
    """Runs the job; returns the process's exit code. With `force_config` a run goes on though its settings have changed.

    Raises:
        ValueError: what can't work, before the first step: batch sizes, data, weights or a checkpoint that do not fit.
    """
    # ---------------------------------------------------------------- processes
    device = engines.start(config.engine)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    accumulation = settings.accumulation(config, ranks)
    folder = Path(config.run.dir)
    log = RunLog(folder / "metrics.jsonl" if rank == 0 else None)
    lock = hold(folder, log.line)
    if steps(folder / "checkpoints") and (folder / "config.yaml").exists():
        for change in settings.confirm(config, folder / "config.yaml", force_config):
            log.line(f"changed by --force-config: {change}")

    # ---------------------------------------------------------------- data
    index = open_index(config.data.train, config.data.cache)
    if len(index.classes) != config.model.classes:
        raise ValueError(f"{config.data.train} has {len(index.classes)} classes, but model.classes={config.model.classes}; make them agree")
    val = open_index(config.data.val, config.data.cache) if config.data.val is not None else None
    if val is not None and val.classes != index.classes:
        raise ValueError(f"{config.data.val} has other classes than {config.data.train}; pack it again with --classes {config.data.train}")
    check_shards([index, val] if val else [index], checksums=config.data.check == "checksums")
    quarantine = Quarantine(index, config.data.max_bad, folder / "quarantine.jsonl")
    val_quarantine = Quarantine(val, config.data.max_bad, folder / "quarantine.jsonl", replaces=False) if val else None
    order = sample_order(index, config.data, seed=config.seed, global_batch=config.global_batch)
    total = config.steps or round(config.epochs * order.steps_per_epoch)
    evaluate_every = max(1, round(config.run.eval_every * order.steps_per_epoch))

    # ---------------------------------------------------------------- model and engine
    torch.manual_seed(config.seed)
    model = build_model(config)
    # A run that goes on takes all from its checkpoint; what it once started from may be gone by then.
    if config.model.init_from and not steps(folder / "checkpoints"):
        for line in start_from(model, Path(config.model.init_from), config.model.head_init, index.classes):
            log.line(line)
    log.line(use_kernels(model, config.model.kernels, device))
    parameters = sum(p.numel() for p in model.parameters())
    engine = engines.build(config, model, accumulation)
    stats = BatchStats(model, config.engine.ema_decay)
    log.line(
        f"{config.model.name}, {parameters / 1e6:.2f} M parameters, {config.model.classes} classes; ZeRO-{config.engine.zero_stage}, "
        f"{config.engine.precision}, {ranks} {device.type} ranks; global batch {config.global_batch} = {ranks} x "
        f"{config.engine.micro_batch} x {accumulation}; {len(index)} images, {order.steps_per_epoch} steps an epoch, {total} in all"
    )

    # ---------------------------------------------------------------- where an earlier start of this run got to
    # What, together with the step, decides which samples follow and how; a run can't change it half-way.
    identity = {
        "model": config.model.name, "classes": config.model.classes, "seed": config.seed, "steps": total,
        "global_batch": config.global_batch, "lanes": order.lanes, "window": order.window,
        "repeats": order.repeats, "data": index.fingerprint,
    }  # fmt: skip
    retention = Retention(config.run.keep, round(config.run.keep_every * order.steps_per_epoch), config.run.keep_best)
    checkpoints = Checkpoints(folder / "checkpoints", engine, stats, retention=retention, lock=lock, log=log)
    resumed = checkpoints.load(identity)
    step, evaluation = (resumed["step"], resumed["evaluation"]) if resumed else (0, None)
    if resumed:
        log.line(f"resumed at step {step} of {total} from a checkpoint of {resumed['ranks']} ranks, ZeRO-{resumed['zero_stage']}")
    made = provenance()
    if rank == 0:
        settings.save(config, folder / "config.yaml")
    if step == total:
        log.line(f"{folder} is complete: step {step} of {total}")
        return 0
    record_start(folder, config, {"train": index.fingerprint} | ({"val": val.fingerprint} if val else {}), device)
    engines.from_rank_0(lambda: log.trackers.open(config, folder, step))

    def save() -> None:
        checkpoints.save(
            {
                "step": step, "epoch": step / order.steps_per_epoch, "identity": identity, "ranks": ranks,
                "zero_stage": config.engine.zero_stage, "classes": list(index.classes), "evaluation": evaluation,
                "config": settings.as_dict(config), **made,
            }
        )  # fmt: skip

    def evaluate_all(val_loader: EvalLoader) -> dict[str, Any]:
        """Of the weights and, where one is kept, of their moving average."""
        judge = build_model(config).to(device)
        use_kernels(judge, config.model.kernels, device)
        results: dict[str, Any] = {"step": step}
        for kind in ("weight", "ema") if config.engine.ema_decay else ("weight",):
            buffers = dict(model.named_buffers())
            fill(judge, zero_state.whole_tensors(engine, kind), buffers | stats.averages if kind == "ema" else buffers)
            found = results[kind] = evaluate(judge, val_loader, config.engine.precision)
            if found["left_out"]:
                tell_all(val_loader.quarantine, step, log)
            log.line(
                f"evaluation at step {step} ({'moving average' if kind == 'ema' else 'weights'}): top-1 {found['top1']:.2%}, "
                f"top-5 {found['top5']:.2%}, loss {found['loss']:.4f} on {found['images']} images"
                + (f"; {found['left_out']} bad ones left out" if found["left_out"] else "")
            )
        log.record("evaluation", **results)
        return results

    # ---------------------------------------------------------------- the loop
    place: dict[str, Any] = {"micro_batch": config.engine.micro_batch, "rank": rank, "ranks": ranks, "device": device}
    place["ranks_on_node"] = engines.ranks_on_node()
    loader = TrainLoader(index, order, config.data, start=step, end=total, quarantine=quarantine, **place)
    val_loader = EvalLoader(val, config.data, quarantine=val_quarantine, **place) if val else None
    interval = Interval(device)
    own = OwnTime(engine, config.engine.zero_stage)
    profiler = Profiler(settings.profiled_steps(config.profile), folder / "profile", log.line)
    stopping = False
    log.start_progress(step, total)
    warm = step + 3
    with loader, val_loader or nullcontext(), StopSignals() as stop, explained(config, ranks, device, lambda: step >= warm):
        batches = iter(loader)
        engine.train()
        while step < total and not stopping:
            profiler.at(step)
            lr = learning_rate(step, total, order.steps_per_epoch, config.optim)
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
            # All randomness on the device (drop path) follows from the step and the rank, so none of it needs saving.
            torch.manual_seed(int(hash64(config.seed, step, rank) >> 1))
            for micro_step in range(accumulation):
                own.begin()
                with interval.waiting(), profiler.part("data"):
                    batch = next(batches)
                images, targets, share = batch.images, batch.labels[:, None], None
                if batch.mix is not None:
                    images, targets, share = mix_pairs(batch.images, batch.labels, batch.mix)
                with profiler.part("forward"):
                    loss = mixed_cross_entropy(engine(images), targets, share, config.optim.label_smoothing)
                with profiler.part("backward"):
                    engine.backward(loss)
                if micro_step + 1 == accumulation:
                    stats.start_averaging()  # beside the optimizer's step
                    checkpoints.before_update()
                with profiler.part("optimizer"):
                    engine.step()
                interval.add(loss)
            stats.finish()
            step += 1
            log.advance()

            stopping = stop.agreed()
            if step % config.run.log_every == 0 or step == total or stopping:
                values, news = interval.close(step, total, config.global_batch, accumulation, quarantine.unshared)
                slowest = own.close()
                if news:
                    tell_all(quarantine, step, log)
                log.line(
                    f"step {step}/{total}  epoch {step / order.steps_per_epoch:.2f}  loss {values['loss']:.4f}  lr {lr:.2e}  "
                    f"{values['images_per_s']:.0f} images/s  waiting for data {values['data_wait']:.0%}  {duration(values['left_s'])} left"
                    + (f"  bad images {quarantine.count}" if quarantine.count else "")
                    + slowest.remark()
                )
                bad = {"bad_images": quarantine.count} if quarantine.count else {}
                log.record("train", step=step, epoch=step / order.steps_per_epoch, lr=lr, **values, **bad, **slowest.record())
            with interval.pausing():
                evaluates = step % evaluate_every == 0 or step == total
                if evaluates and val_loader is not None:
                    evaluation = evaluate_all(val_loader)
                if (
                    stopping
                    or step % config.run.save_every == 0
                    or step == total
                    or retention.due(step, evaluates and val_loader is not None)
                ):
                    save()
        profiler.close(step)
        checkpoints.close()
    log.close()
    if step == total:
        log.line(f"complete after {total} steps; weights: python -m pretrain export {folder} --format official --out {config.name}.pth")
        return 0
    log.line(f"stopped at step {step} of {total} and saved; start the same command again to go on")
    return EXIT_AGAIN


def mixed_cross_entropy(logits: Tensor, targets: Tensor, share: Tensor | None, smoothing: float) -> Tensor:
    """Mean cross-entropy with label smoothing against one label a sample, or a mix of two.

    The cross-entropy is linear in the target, so that of a mixed target is the mix of two: no dense target of (batch, classes).

    Args:
        logits: (batch, classes).
        targets: (batch, 1), or (batch, 2): a sample's own label and its partner's.
        share: (batch,) of a sample's own label in its target, where there are two.
    """
    logits = logits.float()
    if share is None:
        return F.cross_entropy(logits, targets[:, 0], label_smoothing=smoothing)
    own, partner = (F.cross_entropy(logits, targets[:, i], label_smoothing=smoothing, reduction="none") for i in (0, 1))
    return (share * own + (1 - share) * partner).mean()


class Interval:
    """Loss, speed and waiting of the steps since the last log line; reads the device only when it is closed."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, device=device)
        self.loss_sum = self.sums[0]
        self.micro_steps, self.waited, self.began = 0, 0.0, time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What runs inside is waiting for data."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """What runs inside, evaluation or saving, is no time of training."""
        began = time.monotonic()
        yield
        self.began += time.monotonic() - began

    def add(self, loss: Tensor) -> None:
        self.loss_sum += loss.detach()
        self.micro_steps += 1

    def close(self, step: int, total: int, global_batch: int, accumulation: int, news: int) -> tuple[dict[str, float], bool]:
        """The interval's means over all ranks, and whether any rank has `news` of bad images; begins the next. Collective, and waits for
        the device."""
        self.sums[1] = news
        dist.all_reduce(self.sums)
        loss_sum, any_news = self.sums.tolist()
        loss = loss_sum / (self.micro_steps * dist.get_world_size())
        seconds = time.monotonic() - self.began
        steps = self.micro_steps // accumulation
        values = {
            "loss": loss,
            "images_per_s": steps * global_batch / seconds,
            "data_wait": self.waited / seconds,
            "left_s": (total - step) * seconds / steps,
        }
        self.sums.zero_()
        self.micro_steps, self.waited, self.began = 0, 0.0, time.monotonic()
        return values, any_news > 0
