"""The main job: one process of it, from settings to trained weights.

    python -m pretrain train configs/van_b3_in22k.yaml key=value …

Every rank runs this file from top to bottom: data, model, engine, the newest checkpoint if there is one, the loop. It ends with 0
when training is complete, with 85 when it was told to stop, has saved, and wants to be started again, and with 86 when RUN/STOP
told it to end.
"""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data.augment.mixup import mix_pairs
from data.common.counter_rng import hash64
from data.common.placement import Placement
from data.common.text import format_duration
from data.dataset.index import open_index
from data.loader.loaders import EvalLoader, TrainLoader
from data.loader.order import make_sample_order
from data.loader.quarantine import Quarantine
from pretrain import config as settings
from pretrain.checkpoint import Checkpoints, Retention, hold, list_checkpoints
from pretrain.config import Config
from pretrain.engine import distributed, zero_state
from pretrain.engine.batch_stats import BatchStats, synchronise
from pretrain.engine.engine import build_engine
from pretrain.engine.guard import Guard
from pretrain.engine.optim import learning_rate, set_learning_rate
from pretrain.engine.precision import DTYPES, usable_precision
from pretrain.evaluation.accuracy import evaluate, restriction
from pretrain.model.build import build_model
from pretrain.model.fast.cuda_graphs import use_graphs
from pretrain.model.fast.kernel_choice import compile_blocks, use_kernels
from pretrain.monitor import traffic
from pretrain.monitor.damage import check_shards, tell_all
from pretrain.monitor.flops import mfu, peak_flops, training_flops
from pretrain.monitor.interval import Interval, Steps
from pretrain.monitor.memory import explained
from pretrain.monitor.profiling import Profiler
from pretrain.monitor.requests import Requests
from pretrain.monitor.rollback import Bad, Rollbacks, Watch, bad_steps, evidence, recorded
from pretrain.monitor.stragglers import OwnTime, Slowest
from pretrain.monitor.watchdog import Watchdog
from pretrain.run.attempts import STOP
from pretrain.run.exit_codes import EXIT_ENDED
from pretrain.run.metrics import RunLog
from pretrain.run.place import Place
from pretrain.run.provenance import provenance, record_start
from pretrain.schedule import Schedule
from pretrain.weights.initial import start_from
from pretrain.weights.run_model import copy_weights


def train(config: Config, force_config: bool = False) -> int:
    """Runs the job; returns the process's exit code. With `force_config` a run goes on though its settings have changed.

    Raises:
        ValueError: what can't work, before the first step: batch sizes, data, weights or a checkpoint that do not fit.
    """
    # ---------------------------------------------------------------- processes
    device = distributed.start(config.engine)
    rank, ranks, hosts = dist.get_rank(), dist.get_world_size(), distributed.gather_hosts()
    accumulation = settings.accumulation(config, ranks)
    folder, place = Path(config.run.dir), Place()
    watchdog = Watchdog(place, hosts, config.guard.step_limit, config.guard.start_limit)
    log = RunLog(folder / "metrics.jsonl" if rank == 0 else None)
    lock = hold(folder, log.line)
    if list_checkpoints(folder / "checkpoints") and (folder / "config.yaml").exists():
        for change in settings.confirm(config, folder / "config.yaml", force_config):
            log.line(f"changed by --force-config: {change}")

    # ---------------------------------------------------------------- data
    index = open_index(config.data.train, config.data.cache)
    if len(index.classes) != config.model.classes:
        raise ValueError(f"{config.data.train} has {len(index.classes)} classes, but model.classes={config.model.classes}; make them agree")
    val = open_index(config.data.val, config.data.cache) if config.data.val is not None else None
    if val is not None and (told := restriction(index.classes, val, config.data.val_except)):
        log.line(f"evaluation: {told}")
    check_shards([index, val] if val else [index], checksums=config.data.check == "checksums")
    quarantine = Quarantine(index, config.data.max_bad, folder / "quarantine.jsonl")
    val_quarantine = Quarantine(val, config.data.max_bad, folder / "quarantine.jsonl", replaces=False) if val else None
    order = make_sample_order(index, config.data, seed=config.seed, global_batch=config.global_batch)
    total, warmup = settings.lengths(config, order.steps_per_epoch)
    schedule = Schedule(
        total=total,
        log_every=config.run.log_every,
        evaluate_every=max(1, round(config.run.eval_every * order.steps_per_epoch)) if val is not None else None,
        save_every=config.run.save_every,
        keep_every=round(config.run.keep_every * order.steps_per_epoch) or None,
        saves_evaluations=config.run.keep_best != "none",
    )

    # ---------------------------------------------------------------- model and engine
    torch.manual_seed(config.seed)
    model = build_model(config)
    # A run that goes on takes all from its checkpoint; what it once started from may be gone by then.
    if config.model.init_from and not list_checkpoints(folder / "checkpoints"):
        for line in start_from(model, Path(config.model.init_from), config.model.head_init, index.classes):
            log.line(line)
    flops, peak = training_flops(model, config.data.image_size), peak_flops(device, config.engine.precision)
    parameters, precision = [p.numel() for p in model.parameters()], usable_precision(device, config.engine.precision)
    if config.engine.sync_bn:
        synchronise(model)
    for number in config.model.checkpoint_stages:
        cast(Any, model).stages[number].grad_checkpointing = True
    if config.model.compile:
        compile_blocks(model)
    engine = build_engine(config, model, accumulation)
    kernels = config.model.kernels, device, config.data.image_size, DTYPES[precision], config.engine.zero_stage
    log.line(use_kernels(model, *kernels))
    stats = BatchStats(model, config.engine.ema_decay)
    guard = Guard(engine, clip=config.optim.clip_grad, scales=config.engine.precision == "fp16")
    watch = Watch(config.guard)
    log.line(
        f"{config.model.name}, {sum(parameters) / 1e6:.2f} M parameters, {config.model.classes} classes; ZeRO-{config.engine.zero_stage}, "
        f"{precision}{'' if precision == config.engine.precision else f', as this {device.type} lacks {config.engine.precision}'}, "
        f"{ranks} {device.type} ranks; global batch {config.global_batch} = {ranks} x "
        f"{config.engine.micro_batch} x {accumulation}; {len(index)} images, {order.steps_per_epoch} steps an epoch, {total} in all"
    )
    if ranks > 1:
        channels = stats.flat.numel() // 2
        sent = traffic.communication(parameters, channels, stage=config.engine.zero_stage, accumulation=accumulation)
        log.line(traffic.in_words(sent, ranks))

    # ---------------------------------------------------------------- where an earlier start of this run got to
    # What, together with the step, decides which samples follow and how; a run can't change it half-way.
    identity = {
        "model": config.model.name, "classes": config.model.classes, "seed": config.seed, "steps": total,
        "global_batch": config.global_batch, "lanes": order.lanes, "window": order.window,
        "repeats": order.repeats, "data": index.fingerprint,
    }  # fmt: skip
    retention = Retention(config.run.keep, schedule.keep_every or 0, config.run.keep_best)
    checkpoints = Checkpoints(folder / "checkpoints", engine, stats, retention=retention, lock=lock, log=log)
    rollbacks = Rollbacks(folder / "rollbacks.json", distributed.run_on_rank_0(lambda: recorded(folder / "rollbacks.json")))
    resumed = checkpoints.load(identity)
    step, evaluation = (resumed["step"], resumed["evaluation"]) if resumed else (0, None)
    if resumed:
        guard.load(resumed["guard"])
        watch.load(resumed["watch"])
        log.line(f"resumed at step {step} of {total} from a checkpoint of {resumed['ranks']} ranks, ZeRO-{resumed['zero_stage']}")
    made = provenance()
    if rank == 0:
        settings.save(config, folder / "config.yaml")
    if step == total:
        log.line(f"{folder} is complete: step {step} of {total}")
        return 0
    record_start(folder, config, {"train": index.fingerprint} | ({"val": val.fingerprint} if val else {}), device)
    distributed.run_on_rank_0(lambda: log.trackers.open(config, folder, step))

    def save() -> None:
        checkpoints.save(
            {
                "step": step, "epoch": step / order.steps_per_epoch, "identity": identity, "ranks": ranks,
                "zero_stage": config.engine.zero_stage, "classes": list(index.classes), "evaluation": evaluation,
                "guard": guard.state(), "watch": watch.state(), "config": settings.as_dict(config), **made,
            }
        )  # fmt: skip

    def evaluate_all() -> dict[str, Any]:
        """Of the weights and, where one is kept, of their moving average."""
        assert val_loader is not None
        with torch.device("meta"):  # what it would start from is overwritten
            judge = build_model(config)
        judge.to_empty(device=device)
        use_kernels(judge, *kernels)
        results: dict[str, Any] = {"step": step}
        for kind in ("weight", "ema") if config.engine.ema_decay else ("weight",):
            buffers = dict(model.named_buffers())
            copy_weights(judge, zero_state.whole_tensors(engine, kind), buffers | stats.averages if kind == "ema" else buffers)
            found = results[kind] = evaluate(judge, val_loader, index.classes, config.engine.precision)
            if found["left_out"]:
                tell_all(val_loader.quarantine, step, log)
            log.line(
                f"evaluation at step {step} ({'moving average' if kind == 'ema' else 'weights'}): top-1 {found['top1']:.2%}, "
                f"top-5 {found['top5']:.2%}, loss {found['loss']:.4f} on {found['images']} images"
                + (f"; {found['left_out']} bad ones left out" if found["left_out"] else "")
            )
        log.record("evaluation", **results)
        return results

    def report(found: Steps, slowest: Slowest) -> Bad | None:
        """Tells of an interval's steps, and keeps evidence of bad ones; returns what training should go back for."""
        bad = watch.judge(found)
        if found.news:
            tell_all(quarantine, step, log)
        if rank == 0:
            for position in bad_steps(found, bad, scales=config.engine.precision == "fp16"):
                told = evidence(found, position, order, index, hosts)
                keep_evidence(folder / "bad_steps.jsonl", told, log)
        if not found.numbers:  # all of their batches are left out
            return None
        values = found.means()
        rate = len(found.numbers) * config.global_batch / found.seconds
        values |= {
            "images_per_s": rate, "data_wait": found.waited / found.seconds, "memory_gb": distributed.peak_memory_gb(device),
            "left_s": (total - step) * config.global_batch / rate,
        }  # fmt: skip
        values |= {"mfu": mfu(rate / ranks, flops, peak)} if peak else {}
        values |= {} if found.starved is None else {"host_wait": found.starved}
        counts = {"skipped": int(found.skipped.sum()), "bad_images": quarantine.count}
        log.line(
            f"step {step}/{total}  epoch {step / order.steps_per_epoch:.2f}  loss {values['loss']:.4f}  lr {lr:.2e}  "
            f"gradient {values['grad_norm']:.2f}  {rate:.0f} images/s, {rate / ranks:.0f} a rank  "
            f"waiting for data {values['data_wait']:.0%}  {values['memory_gb']:.1f} GB  "
            + (f"MFU {values['mfu']:.0%}  " if peak else "")
            + f"{format_duration(values['left_s'])} left"
            + found.remark(config.model.graphs)
            + slowest.remark()
            + "".join(f"  {name.replace('_', ' ')} {count}" for name, count in counts.items() if count)
        )
        told = {name: value for name, value in values.items() if math.isfinite(value)} | {k: n for k, n in counts.items() if n}
        told |= {
            "total": total,
            "next_save": schedule.next_save(step, requests.seconds_until_save() * rate / config.global_batch),
            "evaluates": due.evaluate,
        }
        log.record("train", step=step, epoch=step / order.steps_per_epoch, lr=lr, **told, **slowest.record())
        return bad

    def go_back(bad: Bad) -> dict[str, Any]:
        """Loads the newest checkpoint from before bad steps; returns its trainer.json."""
        where = f"steps {bad.first} to {bad.last} went wrong: {bad.reason}; see {folder / 'bad_steps.jsonl'}"
        if len(rollbacks.entries) >= config.guard.rollbacks:
            raise ValueError(f"{where}. Training has gone back {config.guard.rollbacks} times (guard.rollbacks), and ends here")
        try:
            trainer = checkpoints.go_back(bad.first, identity)
        except ValueError as error:
            raise ValueError(f"{where}. It can't go back: {error}") from error
        entry = rollbacks.add(bad, config.guard.pass_over, trainer["step"])
        if rank == 0:
            rollbacks.write()
        guard.load(trainer["guard"])
        watch.load(trainer["watch"])
        log.line(f"{where}. Going back to step {trainer['step']}; the batches of steps {entry['first']} to {entry['last']} are left out")
        log.record("rollback", step=trainer["step"], **entry)
        return trainer

    # ---------------------------------------------------------------- the loop
    placement = Placement(device, config.engine.micro_batch, rank, ranks, ranks_on_node=hosts.count(hosts[rank]))
    val_loader = EvalLoader(val, config.data, placement, quarantine=val_quarantine) if val else None
    launches_ahead = device.type == "cuda" and config.engine.zero_stage < 3 and not config.engine.offload
    interval = Interval(device, config.run.log_every, accumulation, asks=launches_ahead)
    own = OwnTime(engine, config.engine.zero_stage, hosts)
    profiler = Profiler(place, settings.profiled_steps(config.profile), folder / "profile", log.line)
    bad, stopping, warm = None, 0, step + 3
    log.start_progress(step, total)
    requests = Requests(folder / STOP, config.run.save_minutes and 60 * config.run.save_minutes)
    with val_loader or nullcontext(), requests, explained(config, ranks, device, lambda: step >= warm):
        engine.train()
        if config.model.graphs:
            log.line(use_graphs(engine, config))
        while step < total and not stopping:
            with TrainLoader(
                index, order, config.data, placement, start=step, end=total, is_skipped=rollbacks.is_skipped, quarantine=quarantine
            ) as loader:
                batches = iter(loader)
                while step < total and not stopping and bad is None:
                    requests.ask()
                    profiler.at(step)
                    lr = learning_rate(step, total, warmup, config.optim)
                    set_learning_rate(engine.optimizer, lr)
                    # All randomness on the device (drop path) follows from the step and the rank, so none of it needs saving.
                    torch.manual_seed(int(hash64(config.seed, step, rank) >> 1))
                    for micro_step in range(0 if rollbacks.is_skipped(step) else accumulation):
                        own.begin()
                        with interval.waiting(), profiler.part("data", micro_step):
                            batch = next(batches)
                        images, targets, share = batch.images, batch.labels[:, None], None
                        if batch.mix is not None:
                            images, targets, share = mix_pairs(batch.images, batch.labels, batch.mix)
                        with profiler.part("forward", micro_step):
                            loss = mixed_cross_entropy(engine(images), targets, share, config.optim.label_smoothing)
                        with profiler.part("backward", micro_step):
                            engine.backward(guard.scaled(loss))
                        interval.add(loss)
                        if micro_step + 1 == accumulation:
                            stats.start_averaging()  # beside the optimizer's step
                            checkpoints.before_update()
                            guard.check()
                        with profiler.part("optimizer", micro_step):
                            engine.step()
                        if micro_step + 1 == accumulation:
                            stats.finish(guard.found_inf)
                            interval.end_step(step, guard)
                    step += 1
                    log.advance()

                    request = requests.answer()
                    stopping = request.exit_code
                    due = schedule.due(step, is_save_requested=request.save or stopping > 0)
                    if due.log:
                        with profiler.part("log", accumulation):
                            bad = report(interval.close(quarantine.unreported_count), own.close())
                    if bad is None and due.evaluate:
                        with interval.pausing(), profiler.part("evaluation", accumulation):
                            evaluation = evaluate_all()
                    if bad is None and due.save:
                        with interval.pausing(), profiler.part("save", accumulation):
                            save()
                        requests.restart_clock()
            if bad is not None:
                trainer, bad = go_back(bad), None
                step, evaluation = trainer["step"], trainer["evaluation"]
                log.start_progress(step, total)
        profiler.close(step)
        checkpoints.close()
    place.at(step, "end")
    watchdog.close()
    log.close()
    if step == total:
        log.line(f"complete after {total} steps; weights: python -m pretrain export {folder}")
        return 0
    if stopping == EXIT_ENDED and rank == 0:
        (folder / STOP).unlink(missing_ok=True)  # it asked this job alone
    log.line(f"stopped at step {step} of {total} and saved; start the same command again to go on")
    return stopping


def keep_evidence(file: Path, told: dict[str, Any], log: RunLog) -> None:
    """Of a bad step: all that is known to the file, and a line."""
    log.append(file, told)
    where = "; ".join(
        f"rank {about['rank']} on {about['host']}: {about['keys'][0]} and {len(about['keys']) - 1} more" for about in told["ranks"][:3]
    )
    more = f"; and {len(told['ranks']) - 3} more ranks" if len(told["ranks"]) > 3 else ""
    log.line(
        f"bad step {told['step']}{' skipped' if told['skipped'] else ''}: loss {told['loss']}, gradient {told['grad_norm']}; "
        f"{where}{more}; all in {file}"
    )


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
