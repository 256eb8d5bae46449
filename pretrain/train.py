"""Trains a model as one rank of a job: from settings to trained weights.

    python -m pretrain train configs/van_b3_in22k.yaml key=value …

Every rank runs this file. `Trainer` sets up processes, data, model and engine, and loads the newest checkpoint, in an order that matters.
`Trainer.train` is the loop, `Trainer.train_step` one optimizer step, and `Trainer.finish_step` logs, evaluates and saves after a step.

Exit codes: 0 training is complete, 85 stopped by a signal (start the job again), 86 stopped by RUN/STOP.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.augment.mixup import mix_pairs
from data.common.counter_rng import hash64
from data.common.placement import Placement
from data.dataset.index import open_index
from data.loader.loaders import EvalLoader, TrainLoader
from data.loader.order import make_sample_order
from data.loader.pipeline import Batch
from data.loader.quarantine import Quarantine
from pretrain import config as settings
from pretrain.checkpoint import Checkpoints, Retention, list_checkpoints, lock_run
from pretrain.config import Config
from pretrain.engine import distributed
from pretrain.engine.batch_stats import BatchStats, synchronize_batch_norms
from pretrain.engine.engine import build_engine
from pretrain.engine.fast_paths import use_fast_paths, use_graphs
from pretrain.engine.guard import Guard
from pretrain.engine.optim import learning_rate, set_learning_rate
from pretrain.engine.precision import resolve_precision
from pretrain.evaluation.accuracy import describe_restriction
from pretrain.evaluation.in_training import Evaluator
from pretrain.loss import mixed_cross_entropy
from pretrain.model.build import build_empty_model, build_model
from pretrain.model.fast.registry import find_fast_paths
from pretrain.model.recomputation import update_statistics_once
from pretrain.monitor.damage import check_shards, report_bad_images
from pretrain.monitor.flops import peak_flops, training_flops
from pretrain.monitor.interval import Interval
from pretrain.monitor.memory import explain_out_of_memory
from pretrain.monitor.profiling import Profiler
from pretrain.monitor.report import Reporter
from pretrain.monitor.requests import Request, Requests
from pretrain.monitor.rollback import BadSteps, DivergenceWatch, Evidence, Rollbacks, read_rollbacks
from pretrain.monitor.stragglers import RankTimer
from pretrain.monitor.watchdog import Watchdog
from pretrain.run.attempts import STOP
from pretrain.run.exit_codes import EXIT_STOP_FILE
from pretrain.run.log import RunLog
from pretrain.run.position import SharedPosition
from pretrain.run.provenance import describe_host, provenance, record_start
from pretrain.schedule import make_schedule
from pretrain.weights.export import check_formats
from pretrain.weights.initial import start_from

WARM_UP_STEPS = 3  # after a start; running out of memory within them means that the settings need too much


class Trainer:
    """Trains a model as one rank of a job; creates the run directory, or resumes a run that has a checkpoint.

    Raises:
        ValueError: settings, data, weights and checkpoint do not match; raised before the first step.
    """

    def __init__(self, config: Config, force_config: bool = False):
        self.config, self.folder = config, Path(config.run.dir)
        self.step, self.exit_code = 0, 0
        self.evaluation: dict[str, Any] | None = None  # the newest results
        # The order is important: each part needs those before it, and most of them are collective.
        self._start_processes()
        self._open_run(force_config)
        self._open_data()
        self._build_model()
        self._build_engine()
        self._open_checkpoints()
        self._restore()
        self._prepare_monitors()

    # ---------------------------------------------------------------- the loop

    def train(self) -> int:
        """Trains to the last step or to a stop request; returns the exit code of the process."""
        total, first = self.schedule.total, self.step
        if self.step == total:
            self.log.line(f"{self.folder} is complete: step {self.step} of {total}")
            return 0
        self._record_start()
        memory = explain_out_of_memory(self.config, self.ranks, self.device, is_warm=lambda: self.step >= first + WARM_UP_STEPS)
        with self.val_loader or nullcontext(), self.requests, memory:
            self.engine.train()
            if self.config.model.graphs:
                self.log.line(use_graphs(self.engine, self.config))
            while not self.is_done:
                with self._open_train_loader() as loader:  # reopened after each rollback
                    batches, bad = iter(loader), None
                    while not self.is_done and bad is None:
                        self.requests.ask()
                        self.train_step(batches)
                        bad = self.finish_step(self.requests.answer())
                if bad is not None:
                    self.roll_back(bad)
            self.profiler.close(self.step)
            self.checkpoints.close()
        return self._finish()

    @property
    def is_done(self) -> bool:
        """Returns whether training is complete or has to stop."""
        return self.step == self.schedule.total or self.exit_code != 0

    def train_step(self, batches: Iterator[Batch]) -> None:
        """Makes one optimizer step on a global batch, or none if a rollback skips the batch of this step."""
        step = self.step
        self.profiler.start_step(step)
        self.lr = learning_rate(step, self.schedule.total, self.warmup, self.config.optim)
        set_learning_rate(self.engine.optimizer, self.lr)
        # All randomness on the device (drop path) follows from step and rank, so checkpoints need no generator state.
        torch.manual_seed(int(hash64(self.config.seed, step, self.rank) >> 1))
        # The loader makes no batches for a skipped step either.
        for micro_step in range(0 if self.rollbacks.is_skipped(step) else self.accumulation):
            is_last = micro_step + 1 == self.accumulation
            self.timer.begin()
            with self.interval.waiting_for_data(), self.profiler.phase("data", micro_step):
                batch = next(batches)
            loss = self._forward(batch, micro_step)
            with self.profiler.phase("backward", micro_step):
                self.engine.backward(self.guard.scale_loss(loss))
            self.interval.add(loss)
            if is_last:
                self.stats.start_averaging()  # overlaps the optimizer's step
                self.checkpoints.before_update()
                self.guard.check()
            with self.profiler.phase("optimizer", micro_step):
                self.engine.step()  # updates the weights at the last micro-step only
            if is_last:
                self.stats.finish(self.guard.found_inf)
                self.interval.end_step(step, self.guard)
        self.step += 1
        self.log.advance()

    def _forward(self, batch: Batch, micro_step: int) -> Tensor:
        images, targets, share = batch.images, batch.labels[:, None], None
        if batch.mix is not None:
            images, targets, share = mix_pairs(batch.images, batch.labels, batch.mix)
        with self.profiler.phase("forward", micro_step):
            return mixed_cross_entropy(self.engine(images), targets, share, self.config.optim.label_smoothing)

    def finish_step(self, request: Request) -> BadSteps | None:
        """Logs, evaluates and saves as due after a step; returns bad steps that require a rollback."""
        self.exit_code = request.exit_code
        due = self.schedule.due(self.step, is_save_requested=request.save or self.exit_code != 0)
        if due.log:
            with self.profiler.phase("log"):
                if bad := self._report(is_evaluated=due.evaluate):
                    return bad
        if due.evaluate:
            with self.interval.paused(), self.profiler.phase("evaluation"):
                assert self.evaluator is not None
                self.evaluation = self.evaluator.evaluate(self.step)
        if due.save:
            with self.interval.paused(), self.profiler.phase("save"):
                self._save()
            self.requests.restart_clock()
        return None

    def roll_back(self, bad: BadSteps) -> None:
        """Loads the newest checkpoint from before the bad steps and skips their batches from now on; ValueError if there is none."""
        limit = self.config.guard.rollbacks
        reason = f"steps {bad.first} to {bad.last} are bad: {bad.reason}; see {self.evidence.file}"
        if len(self.rollbacks.entries) >= limit:
            raise ValueError(f"{reason}. Training was rolled back {limit} times (guard.rollbacks), and ends here")
        try:
            saved = self.checkpoints.roll_back(bad.first, self.identity)
        except ValueError as error:
            raise ValueError(f"{reason}. Training can't be rolled back: {error}") from error
        entry = self.rollbacks.add(bad, self.config.guard.skip_before, saved["step"])
        if self.rank == 0:
            self.rollbacks.write()
        self._load_state(saved)
        self.log.line(f"{reason}. Rolled back to step {self.step}; the batches of steps {entry['first']} to {entry['last']} are skipped")
        self.log.record("rollback", step=self.step, **entry)
        self.log.start_progress(self.step, self.schedule.total)

    # ---------------------------------------------------------------- setup, in this order

    def _start_processes(self) -> None:
        config = self.config
        self.device = distributed.start(config.engine)
        self.rank, self.ranks, self.hosts = dist.get_rank(), dist.get_world_size(), distributed.gather_hosts()
        ranks_on_node = self.hosts.count(self.hosts[self.rank])
        self.placement = Placement(self.device, config.engine.micro_batch, self.rank, self.ranks, ranks_on_node)
        self.accumulation = settings.accumulation(config, self.ranks)
        self.position = SharedPosition()
        self.watchdog = Watchdog(self.position, self.hosts, config.guard.step_limit, config.guard.start_limit)

    def _open_run(self, force_config: bool) -> None:
        self.log = RunLog(self.folder / "metrics.jsonl" if self.rank == 0 else None)
        self.lock = lock_run(self.folder, self.log.line)
        self.is_resumed = bool(list_checkpoints(self.folder / "checkpoints"))
        if self.is_resumed and (self.folder / "config.yaml").exists():
            for change in settings.confirm(self.config, self.folder / "config.yaml", force_config):
                self.log.line(f"changed by --force-config: {change}")

    def _open_data(self) -> None:
        config, data = self.config, self.config.data
        self.index = open_index(data.train, data.cache)
        if len(self.index.classes) != config.model.classes:
            raise ValueError(
                f"{data.train} has {len(self.index.classes)} classes, but model.classes={config.model.classes}; make them agree"
            )
        self.val = open_index(data.val, data.cache) if data.val is not None else None
        if self.val is not None and (restricted := describe_restriction(self.index.classes, self.val, data.val_except)):
            self.log.line(f"evaluation: {restricted}")
        check_shards([self.index, self.val] if self.val else [self.index], checksums=data.check == "checksums")
        self.quarantine = Quarantine(self.index, data.max_bad, self.folder / "quarantine.jsonl")
        self.val_loader: EvalLoader | None = None
        if self.val is not None:
            quarantine = Quarantine(self.val, data.max_bad, self.folder / "quarantine.jsonl", replaces=False)
            self.val_loader = EvalLoader(self.val, data, self.placement, quarantine=quarantine)
        self.order = make_sample_order(self.index, data, seed=config.seed, global_batch=config.global_batch)
        total, self.warmup = settings.lengths(config, self.order.steps_per_epoch)
        self.schedule = make_schedule(config.run, total, self.order.steps_per_epoch, evaluates=self.val is not None)

    def _build_model(self) -> None:
        """Builds the model on the CPU, with its initial weights and the layers that the settings ask for."""
        config = self.config
        torch.manual_seed(config.seed)
        self.model = build_model(config)
        check_formats(self.model, config.run.export or [], "run.export")
        # A resumed run takes all weights from its checkpoint; model.init_from may no longer exist.
        if config.model.init_from and not self.is_resumed:
            for line in start_from(self.model, Path(config.model.init_from), config.model.head_init, self.index.classes):
                self.log.line(line)
        self.image_flops = training_flops(self.model, config.data.image_size)  # before operators are replaced
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())  # before ZeRO partitions them
        if config.engine.sync_bn:
            synchronize_batch_norms(self.model)
        if config.model.checkpoint_stages:
            update_statistics_once(self.model)
        self.log.line(use_fast_paths(self.model, config, self.device))

    def _build_engine(self) -> None:
        config, engine = self.config, self.config.engine
        self.engine = build_engine(config, self.model, self.accumulation)
        self.stats = BatchStats(self.model, engine.ema_decay)
        self.guard = Guard(self.engine, clip=config.optim.clip_grad, should_scale=engine.precision == "fp16")
        precision = resolve_precision(self.device, engine.precision)
        self.log.line(
            f"{config.model.name}, {self.parameters / 1e6:.2f} M parameters, {config.model.classes} classes; ZeRO-{engine.zero_stage}, "
            f"{precision}{'' if precision == engine.precision else f' (this {self.device.type} lacks {engine.precision})'}, "
            f"{self.ranks} {self.device.type} ranks; global batch {config.global_batch} = {self.ranks} x "
            f"{engine.micro_batch} x {self.accumulation}; {len(self.index)} images, {self.order.steps_per_epoch} steps per epoch, "
            f"{self.schedule.total} steps in all"
        )

    def _new_model(self) -> nn.Module:
        """Returns a model on the device for evaluation, with uninitialized weights."""
        model = build_empty_model(self.config, self.device)
        if self.device.type == "cpu" and (paths := find_fast_paths(model)):
            paths.use_cpu_path(model)
        return model

    def _open_checkpoints(self) -> None:
        config = self.config
        # Fixed for a run: together with the step these determine which samples follow and how they are used.
        self.identity = {
            "model": config.model.name, "classes": config.model.classes, "seed": config.seed, "steps": self.schedule.total,
            "global_batch": config.global_batch, "lanes": self.order.lanes, "window": self.order.window,
            "repeats": self.order.repeats, "data": self.index.fingerprint,
        }  # fmt: skip
        retention = Retention(config.run.keep, self.schedule.keep_every or 0, config.run.keep_best)
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", self.engine, self.stats, retention=retention, lock=self.lock, log=self.log
        )
        self.checkpoints.check_disk()
        file = self.folder / "rollbacks.json"
        self.rollbacks = Rollbacks(file, distributed.run_on_rank_0(lambda: read_rollbacks(file)))
        self.watch = DivergenceWatch(config.guard)

    def _restore(self) -> None:
        """Loads the newest checkpoint of the run, if there is one."""
        if saved := self.checkpoints.load(self.identity):
            self._load_state(saved)
            self.log.line(
                f"resumed at step {self.step} of {self.schedule.total} from a checkpoint of {saved['ranks']} ranks, "
                f"ZeRO-{saved['zero_stage']}"
            )
        self.provenance = provenance()
        if self.rank == 0:
            settings.save(self.config, self.folder / "config.yaml")

    def _load_state(self, saved: dict[str, Any]) -> None:
        """Restores the state that `_save` adds to a checkpoint."""
        self.step, self.evaluation = saved["step"], saved["evaluation"]
        self.guard.load_state_dict(saved["guard"])
        self.watch.load(saved["watch"])

    def _prepare_monitors(self) -> None:
        config, device = self.config, self.device
        has_loss_scale = config.engine.precision == "fp16"
        self.evidence = Evidence(self.folder / "bad_steps.jsonl", self.log, self.order, self.index, self.hosts, has_loss_scale)
        launches_ahead = device.type == "cuda" and config.engine.zero_stage < 2
        self.interval = Interval(device, config.run.log_every, self.accumulation, detects_launch_bound=launches_ahead)
        self.timer = RankTimer(self.engine, config.engine.zero_stage, self.hosts)
        self.profiler = Profiler(self.position, settings.profiled_steps(config.profile), self.folder / "profile", self.log.line)
        self.requests = Requests(self.folder / STOP, 60 * config.run.save_minutes if config.run.save_minutes is not None else None)
        self.reporter = Reporter(
            self.log, self.schedule.total, self.order.steps_per_epoch, config.global_batch, self.ranks, device, self.image_flops,
            peak_flops(device, config.engine.precision), has_graphs=config.model.graphs,
        )  # fmt: skip

        self.evaluator = None
        if self.val_loader is not None:
            classes, precision = self.index.classes, config.engine.precision
            self.evaluator = Evaluator(self.engine, self.stats, self.val_loader, classes, precision, self._new_model, self.log)

    # ---------------------------------------------------------------- parts of the loop

    def _record_start(self) -> None:
        data = {"train": self.index.fingerprint} | ({"val": self.val.fingerprint} if self.val else {})
        hosts = distributed.gather_objects(describe_host(self.device))
        if self.rank == 0:
            record_start(self.folder, self.config, data, hosts)
        distributed.run_on_rank_0(lambda: self.log.trackers.open(self.config, self.folder, self.step))
        self.log.start_progress(self.step, self.schedule.total)

    def _open_train_loader(self) -> TrainLoader:
        return TrainLoader(
            self.index, self.order, self.config.data, self.placement, start=self.step, end=self.schedule.total,
            is_skipped=self.rollbacks.is_skipped, quarantine=self.quarantine,
        )  # fmt: skip

    def _report(self, *, is_evaluated: bool) -> BadSteps | None:
        """Reports the steps since the last log line; returns bad steps that require a rollback."""
        steps, slowest = self.interval.close(self.quarantine.unreported_count), self.timer.close()
        bad = self.watch.find_bad(steps)
        if steps.has_bad_images:
            report_bad_images(self.quarantine, self.step, self.log)
        if self.rank == 0:
            self.evidence.keep(steps, bad)
        if steps.numbers:  # none if a rollback skips the batches of all steps
            bad_images = self.quarantine.count
            self.reporter.report(self.step, steps, slowest, lr=self.lr, bad_images=bad_images, is_evaluated=is_evaluated)
        return bad

    def _save(self) -> None:
        self.checkpoints.save(
            {
                "step": self.step, "epoch": self.step / self.order.steps_per_epoch, "identity": self.identity, "ranks": self.ranks,
                "zero_stage": self.config.engine.zero_stage, "classes": list(self.index.classes), "evaluation": self.evaluation,
                "guard": self.guard.state_dict(), "watch": self.watch.state(), "config": settings.as_dict(self.config), **self.provenance,
            }
        )  # fmt: skip

    def _finish(self) -> int:
        """Closes everything after the last save; returns the exit code of the process."""
        self.position.set(self.step, "end")
        self.watchdog.close()
        self.log.close()
        if self.step == self.schedule.total:
            self.log.line(f"complete after {self.step} steps; weights: python -m pretrain export {self.folder}")
            return 0
        if self.exit_code == EXIT_STOP_FILE and self.rank == 0:
            (self.folder / STOP).unlink(missing_ok=True)  # so that the next job does not stop too
        self.log.line(f"stopped at step {self.step} of {self.schedule.total} and saved; start the same command again to resume")
        return self.exit_code
