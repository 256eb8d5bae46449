"""Saves and loads a run's state, on each of its ranks."""

import errno
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.checkpoint import files
from pretrain.checkpoint.lock import RunLock
from pretrain.checkpoint.pieces import METADATA, PieceTensor, get_kind, list_tensors, load_tensors, name_shard, plan_metadata
from pretrain.checkpoint.retention import Retention, list_saved
from pretrain.checkpoint.staging import Staging
from pretrain.engine import zero_state
from pretrain.engine.batch_stats import BatchStats
from pretrain.engine.deepspeed_compat import publish_weights
from pretrain.engine.distributed import gather_objects, run_on_rank_0
from pretrain.run.directory import LATEST, TRAINER, checkpoint_name, list_checkpoints
from pretrain.run.log import RunLog

_SIZE_FACTOR = 1.05  # size of a checkpoint over that of its state: .metadata, and trainer.json with the names of all classes
_COUNTER = "optimizer_steps"


class SaveFailed(RuntimeError):
    """Reports that the final state of a run is not on disk."""


class Checkpoints:
    """Saves and loads a run's checkpoints on one of its ranks. Construction, `save`, `load` and `roll_back` are collective.

    A save that the disk refuses is logged and dropped: training continues, and existing checkpoints stay.

    Args:
        folder: RUN/checkpoints.
        engine: DeepSpeed's engine, whose weights and optimizer states are saved and loaded.
        stats: BatchNorm's statistics, which are saved and loaded too.
        retention: selects the checkpoints to keep.
        lock: of the run directory.
        log: gets lines, and a record of each save: "checkpoint" with step, bytes, blocked_s (wait of training), total_s and mb_per_s (of
            writing); or "save_failed" with step and reason.
    """

    def __init__(self, folder: Path, engine: Any, stats: BatchStats, *, retention: Retention, lock: RunLock, log: RunLog):
        self.folder, self.engine, self.stats = folder, engine, stats
        self.retention, self.lock, self.log = retention, lock, log
        self.group = dist.new_group(backend="gloo")  # for the writer thread, concurrent with the collectives of training
        self.rank = dist.get_rank()
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._unsaved: str | None = None  # why the last save is not on disk

        pieces = _name_pieces(zero_state.list_saved_pieces(engine))
        buffers = _list_buffers(engine, stats) if self.rank == 0 else {}  # equal on all ranks
        updated = {name: piece.piece for name, piece in pieces.items()} | {_COUNTER: zero_state.get_step_counter(engine)}
        self.staging = Staging(updated, buffers, engine.device)
        host = self.staging.host
        state: dict[str, torch.Tensor] = {name: PieceTensor(host[name], p.start, p.numel()) for name, p in pieces.items()}
        self._metadata = plan_metadata(state | {name: host[name] for name in buffers}, self.staging.offsets, self.group)
        size = torch.tensor(self.staging.bytes)
        dist.all_reduce(size, group=self.group)
        self.bytes = int(size)
        run_on_rank_0(self._prepare, self.group)

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(self.folder, self.log.line)

    def check_disk(self) -> None:
        """Raises ValueError if the disk lacks room for the checkpoints that the run will add. Collective."""
        run_on_rank_0(self._check_disk, self.group)

    def _check_disk(self) -> None:
        more = self.retention.last + 1 - min(self.retention.last, len(list_checkpoints(self.folder)))
        free = shutil.disk_usage(self.folder).free
        if free < self.bytes * more:
            raise ValueError(
                f"{self.folder}: its disk has {free / 1e9:.3g} GB free, and {more} more checkpoints need {self.bytes / 1e9:.3g} GB each; "
                "free space there, or change run.dir or run.keep"
            )

    # ---------------------------------------------------------------- saving

    def save(self, trainer: dict[str, Any]) -> None:
        """Waits for an earlier save, copies the state to host memory and writes it in the background.

        `trainer` is the content of trainer.json: everything else that resuming needs; its "step" names the checkpoint. Call
        `before_update` before the weights change.
        """
        called = time.monotonic()
        self.wait()
        began = time.monotonic()
        self.staging.copy()
        arguments = (trainer, began, time.monotonic() - called)
        self._writer = threading.Thread(target=self._write_in_background, args=arguments, name="checkpoint-writer")
        self._writer.start()

    def before_update(self) -> None:
        """Makes the next update of the weights wait on the device for the copies of a save; call it before every update."""
        self.staging.before_update()

    def wait(self) -> None:
        """Waits until the last save has ended; raises RuntimeError if it failed for a reason other than the disk."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise RuntimeError(f"saving to {self.folder} failed: {error}") from error

    def close(self) -> None:
        """Waits until the last save has ended; raises SaveFailed if it is not on disk."""
        self.wait()
        if self._unsaved is not None:
            raise SaveFailed(f"the final state of this run is not saved: {self._unsaved}; fix that and start the same command again")

    def _write_in_background(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:  # `wait` raises it in the training thread
            self._error = error

    def _write(self, trainer: dict[str, Any], began: float, blocked: float) -> None:
        self.staging.wait()
        copied = time.monotonic()
        step = trainer["step"]
        trainer = trainer | {_COUNTER: int(self.staging.host[_COUNTER])}
        partial = files.make_temporary_path(self.folder, "partial", checkpoint_name(step))
        try:
            partial = run_on_rank_0(lambda: self._prepare_directory(partial), self.group)
            outcomes = self._write_shards(partial)
            written = run_on_rank_0(lambda: self._commit(partial, trainer, outcomes), self.group)
        except OSError as error:  # the same error on every rank
            self._unsaved = str(error)
            if self.rank == 0:
                self._report_failure(partial, step)
            return
        self._unsaved = None
        if self.rank == 0:
            now = time.monotonic()
            speed = written / 1e6 / (now - copied)
            self.log.line(
                f"saved step {step}: {written / 1e6:.1f} MB in {now - began:.2f} s, {speed:.0f} MB/s; training waited {blocked:.2f} s"
            )
            self.log.record("checkpoint", step=step, bytes=written, blocked_s=blocked, total_s=now - began, mb_per_s=speed)
            self._prune(step)

    def _prepare_directory(self, partial: Path) -> Path:
        self.lock.check()
        needed, free = self.bytes * _SIZE_FACTOR, shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free", str(self.folder))
        partial.mkdir()
        return partial

    def _write_shards(self, partial: Path) -> list[Any]:
        """Writes each rank's file; returns on rank 0 the manifest's entry of each file, or the error of its rank."""
        try:
            outcome: files.Entry | OSError = files.write(partial / name_shard(self.rank), self.staging.memory.numpy())
        except OSError as error:
            outcome = error
        return gather_objects(outcome, self.group)

    def _commit(self, partial: Path, trainer: dict[str, Any], outcomes: list[Any]) -> int:
        """Publishes the checkpoint and returns its size in bytes."""
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, OSError):
                raise OSError(outcome.errno, f"rank {rank}: {outcome.strerror}", outcome.filename)
        assert self._metadata is not None
        entries = {name_shard(rank): entry for rank, entry in enumerate(outcomes)}
        entries[METADATA] = files.write(partial / METADATA, self._metadata)
        entries[TRAINER] = files.write(partial / TRAINER, json.dumps(trainer, indent=1).encode())
        self.lock.check()
        files.commit(partial, self.folder / checkpoint_name(trainer["step"]), entries)
        return sum(entry["bytes"] for entry in entries.values())

    def _report_failure(self, partial: Path, step: int) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        newest = [path.name for path in list_checkpoints(self.folder)][-1:]
        self.log.line(
            f"SAVING FAILED at step {step}: {self._unsaved}. Training continues and tries again at the next save; until then a restart "
            f"would resume from {newest[0] if newest else 'the beginning'}"
        )
        self.log.record("save_failed", step=step, reason=self._unsaved)

    def _prune(self, step: int) -> None:
        for path in self.retention.select_expired(list_saved(self.folder, self.retention.best), step):
            try:
                files.remove(path)
            except OSError as error:
                self.log.line(f"{path} could not be removed: {error}")

    # ---------------------------------------------------------------- loading

    def roll_back(self, until: int, identity: dict[str, Any]) -> dict[str, Any]:
        """Removes all checkpoints after the newest whole one up to step `until`, and loads that one; ValueError if there is none."""
        self.wait()
        run_on_rank_0(lambda: self._remove_after(until), self.group)
        trainer = self.load(identity)
        assert trainer is not None
        return trainer

    def _remove_after(self, until: int) -> None:
        newest = files.find_newest_whole(self.folder, self.log.line, until)
        if newest is None:
            raise ValueError(f"{self.folder} has no checkpoint of step {until} or before")
        for path in list_checkpoints(self.folder):
            if path.name > newest.name:
                files.remove(path)

    def load(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Loads the newest whole checkpoint into the engine and returns its trainer.json, or None if the run has no checkpoint.

        A moving average that the checkpoint lacks starts from the weights; one that this job does not keep is skipped. Both are logged.

        Args:
            identity: what can't change during a run; must equal "identity" in trainer.json.

        Raises:
            ValueError: there are checkpoints, but none is whole, or the newest whole one belongs to another job.
        """
        chosen = run_on_rank_0(self._find_newest, self.group)
        if chosen is None:
            return None
        path, trainer = chosen
        saved = trainer["identity"]
        changed = [f"{key} was {saved.get(key)}, is {value}" for key, value in identity.items() if saved.get(key) != value]
        if changed:
            raise ValueError(f"{self.folder.parent} belongs to another job: {'; '.join(changed)}; give this one its own name or run.dir")
        state = _name_pieces(zero_state.list_pieces(self.engine)) | _list_buffers(self.engine, self.stats)
        kept, present = ({get_kind(name) for name in names} for names in (state, list_tensors(path)))
        absent = (kept - present) & {"ema", "buffer_ema"}
        load_tensors(path, {name: tensor for name, tensor in state.items() if get_kind(name) not in absent}, self.group)
        if absent:
            zero_state.start_average(self.engine)
            self.stats.ema.copy_(self.stats.flat)
            self.log.line(f"{path} holds no moving average, which this job keeps: it starts from the weights at step {trainer['step']}")
        if present - kept:
            self.log.line(f"{path} holds {', '.join(sorted(present - kept))}, which this job does not keep: skipped from here on")
        self.stats.take_snapshot()
        zero_state.set_optimizer_steps(self.engine, trainer[_COUNTER])
        publish_weights(self.engine)
        return trainer

    def _find_newest(self) -> tuple[Path, dict[str, Any]] | None:
        path = files.find_newest_whole(self.folder, self.log.line)
        if path is None:
            return None
        if files.read_pointer(self.folder) != path.name:
            self.log.line(f"{self.folder / LATEST} did not name {path.name}, the newest whole checkpoint; now it does")
            files.write_pointer(path)
        return path, json.loads((path / TRAINER).read_bytes())


def _name_pieces(pieces: list[zero_state.Piece]) -> dict[str, PieceTensor]:
    """Returns live views of the weights and their states, by their names in a checkpoint."""
    return {f"{key}/{each.name}": PieceTensor(tensor, each.start, each.numel) for each in pieces for key, tensor in each.tensors.items()}


def _list_buffers(engine: Any, stats: BatchStats) -> dict[str, torch.Tensor]:
    """Returns live views of the buffers, by their names in a checkpoint; all ranks have the same values after every step."""
    buffers = {f"buffer/{name}": buffer for name, buffer in engine.module.named_buffers()}
    if stats.ema_decay:
        buffers |= {f"buffer_ema/{name}": average for name, average in stats.averages.items()}
    return buffers
