"""Saving and loading a run's state, as one of its ranks does it."""

import errno
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from pretrain.checkpoint import files
from pretrain.checkpoint.lock import RunLock
from pretrain.checkpoint.pieces import METADATA, PieceTensor, ShardReader, file_of, kind_of, load_planner, plan, saved_tensors
from pretrain.checkpoint.retention import Retention, saved_in
from pretrain.checkpoint.staging import Staging
from pretrain.engine import zero_state
from pretrain.engine.batch_stats import BatchStats
from pretrain.engine.distributed import gather_objects, run_on_rank_0
from pretrain.run.directory import LATEST, TRAINER, checkpoint_name, list_checkpoints
from pretrain.run.metrics import RunLog

# A checkpoint is a little more than its state: .metadata, and trainer.json with all names of classes.
_ROOM = 1.05
_COUNTER = "optimizer_steps"


class SaveFailed(RuntimeError):
    """The last save of a run did not get to the disk."""


class Checkpoints:
    """A run's checkpoints, as one of its ranks sees them. `load`, `save` and the construction are collective.

    A save that the disk fails is reported and dropped: training goes on, and the checkpoints that are there stay.

    Args:
        folder: RUN/checkpoints.
        engine, stats: whose state is saved and loaded.
        retention: which checkpoints to keep.
        lock: of the run directory.
        log: gets lines for people, and a record of each save: "checkpoint" with step, bytes, blocked_s (training's wait for an earlier
            save and for the copy), total_s (from the copy's begin) and mb_per_s (of writing); or "save_failed" with step and reason.
    """

    def __init__(self, folder: Path, engine: Any, stats: BatchStats, *, retention: Retention, lock: RunLock, log: RunLog):
        self.folder, self.engine, self.stats = folder, engine, stats
        self.retention, self.lock, self.log = retention, lock, log
        # Collectives of the writing thread must not mix with those of training.
        self.group = dist.new_group(backend="gloo")
        self.rank = dist.get_rank()
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._unsaved: str | None = None  # why the last save is not on disk

        pieces = _named(zero_state.saved_pieces(engine))
        buffers = _buffers(engine, stats) if self.rank == 0 else {}  # equal on all ranks
        updated = {name: piece.piece for name, piece in pieces.items()} | {_COUNTER: zero_state.step_counter(engine)}
        self.staging = Staging(updated, buffers, engine.device)
        host = self.staging.host
        state: dict[str, torch.Tensor] = {name: PieceTensor(host[name], p.start, p.numel()) for name, p in pieces.items()}
        self._metadata = plan(state | {name: host[name] for name in buffers}, self.staging.offsets, self.group)
        size = torch.tensor(self.staging.bytes)
        dist.all_reduce(size, group=self.group)
        self.bytes = int(size)
        run_on_rank_0(self._prepare, self.group)

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(self.folder, self.log.line)

    # ---------------------------------------------------------------- saving

    def save(self, trainer: dict[str, Any]) -> None:
        """Copies the state to host memory, and writes it in the background; waits for an earlier save first.

        `before_update` must be called before the weights change.

        Args:
            trainer: what else resuming needs; goes to trainer.json. Its "step" names the checkpoint.
        """
        asked = time.monotonic()
        self.wait()
        began = time.monotonic()
        self.staging.copy()
        arguments = (trainer, began, time.monotonic() - asked)
        self._writer = threading.Thread(target=self._write_in_background, args=arguments, name="checkpoint-writer")
        self._writer.start()

    def before_update(self) -> None:
        """Call before every update of the weights: on a GPU it has to come after the copies of a save. Doesn't wait itself."""
        self.staging.before_update()

    def wait(self) -> None:
        """Returns when the last save has ended; raises what went wrong with it, unless that was the disk."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise RuntimeError(f"saving to {self.folder} failed: {error}") from error

    def close(self) -> None:
        """Returns when the last save is on disk.

        Raises:
            SaveFailed: it is not, for lack of space or a failing disk.
        """
        self.wait()
        if self._unsaved is not None:
            raise SaveFailed(f"the last state of this run is not saved: {self._unsaved}; mend that and start the same command again")

    def _write_in_background(self, trainer: dict[str, Any], began: float, blocked: float) -> None:
        try:
            self._write(trainer, began, blocked)
        except BaseException as error:  # handed to the training thread, which raises it
            self._error = error

    def _write(self, trainer: dict[str, Any], began: float, blocked: float) -> None:
        self.staging.wait()
        copied = time.monotonic()
        step = trainer["step"]
        trainer = trainer | {_COUNTER: int(self.staging.host[_COUNTER])}
        partial = files.temporary(self.folder, "partial", checkpoint_name(step))
        try:
            partial = run_on_rank_0(lambda: self._begin(partial), self.group)
            outcomes = self._write_shards(partial)
            written = run_on_rank_0(lambda: self._commit(partial, trainer, outcomes), self.group)
        except OSError as error:  # the same one on every rank
            self._unsaved = str(error)
            if self.rank == 0:
                self._give_up(partial, step)
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

    def _begin(self, partial: Path) -> Path:
        self.lock.check()
        needed, free = self.bytes * _ROOM, shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free", str(self.folder))
        partial.mkdir()
        return partial

    def _write_shards(self, partial: Path) -> list[Any]:
        """Writes each rank's file; returns, on rank 0, what the manifest says of each, or the error that its rank had."""
        try:
            with files.create(partial / file_of(self.rank)) as file:
                file.write(self.staging.memory.numpy())
            outcome: files.Entry | OSError = file.entry
        except OSError as error:
            outcome = error
        return gather_objects(outcome, self.group)

    def _commit(self, partial: Path, trainer: dict[str, Any], outcomes: list[Any]) -> int:
        """Returns the checkpoint's size in bytes."""
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, OSError):
                raise OSError(outcome.errno, f"rank {rank}: {outcome.strerror}", outcome.filename)
        assert self._metadata is not None
        entries = {file_of(rank): entry for rank, entry in enumerate(outcomes)}
        entries[METADATA] = files.write(partial / METADATA, self._metadata)
        entries[TRAINER] = files.write(partial / TRAINER, json.dumps(trainer, indent=1).encode())
        self.lock.check()
        files.commit(partial, self.folder / checkpoint_name(trainer["step"]), entries)
        return sum(entry["bytes"] for entry in entries.values())

    def _give_up(self, partial: Path, step: int) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        newest = [path.name for path in list_checkpoints(self.folder)][-1:]
        self.log.line(
            f"SAVING FAILED at step {step}: {self._unsaved}. Training goes on and tries again at the next save; until then a restart "
            f"goes back to {newest[0] if newest else 'the beginning'}"
        )
        self.log.record("save_failed", step=step, reason=self._unsaved)

    def _prune(self, step: int) -> None:
        for path in self.retention.let_go(saved_in(self.folder, self.retention.best), whole=step):
            try:
                files.remove(path)
            except OSError as error:
                self.log.line(f"{path} could not be removed: {error}")

    # ---------------------------------------------------------------- loading

    def go_back(self, until: int, identity: dict[str, Any]) -> dict[str, Any]:
        """Removes the checkpoints of later steps than `until` and loads the newest that is left; see `load`.

        Raises:
            ValueError: there is none; nothing is removed then.
        """
        self.wait()
        run_on_rank_0(lambda: self._remove_after(until), self.group)
        trainer = self.load(identity)
        assert trainer is not None
        return trainer

    def _remove_after(self, until: int) -> None:
        good = files.newest_whole(self.folder, self.log.line, until)
        if good is None:
            raise ValueError(f"{self.folder} has no checkpoint of step {until} or before")
        for path in list_checkpoints(self.folder):
            if path.name > good.name:
                files.remove(path)

    def load(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Reads the newest whole checkpoint into the engine; returns its trainer.json, or None where the run has none yet.

        A moving average that this job keeps and the checkpoint has not starts from the weights; one that the checkpoint has and this
        job doesn't keep is left out. Either is logged.

        Args:
            identity: what can't change during a run; must be what stands in trainer.json under that name.

        Raises:
            ValueError: there are checkpoints, but no whole one, or one of another job, or one without a state that has to be there.
        """
        chosen = run_on_rank_0(self._choose, self.group)
        if chosen is None:
            return None
        path, trainer = chosen
        before = trainer["identity"]
        changed = [f"{key} was {before.get(key)}, is {value}" for key, value in identity.items() if before.get(key) != value]
        if changed:
            raise ValueError(f"{self.folder.parent} belongs to another job: {'; '.join(changed)}; give this one its own name or run.dir")
        state = _named(zero_state.local_pieces(self.engine)) | _buffers(self.engine, self.stats)
        # Each kind of state is whole in a checkpoint or absent.
        kept, found = ({kind_of(name) for name in names} for names in (state, saved_tensors(path)))
        absent = kept - found
        if absent - {"ema", "buffer_ema"}:
            raise ValueError(f"{path} holds no {', '.join(sorted(absent))}, which this job's optimizer needs; it is another optimizer's")
        dcp.load(
            {name: tensor for name, tensor in state.items() if kind_of(name) not in absent},
            storage_reader=ShardReader(path),
            planner=load_planner(),
            process_group=self.group,
        )
        if absent:
            zero_state.start_average(self.engine)
            self.stats.ema.copy_(self.stats.flat)
            self.log.line(f"{path} holds no moving average, which this job keeps: it starts from the weights at step {trainer['step']}")
        if found - kept:
            self.log.line(f"{path} holds {', '.join(sorted(found - kept))}, which this job does not keep: left out from here on")
        self.stats.loaded()
        zero_state.set_optimizer_steps(self.engine, trainer[_COUNTER])
        zero_state.publish(self.engine)
        return trainer

    def _choose(self) -> tuple[Path, dict[str, Any]] | None:
        path = files.newest_whole(self.folder, self.log.line)
        if path is None:
            return None
        if files.pointed(self.folder) != path.name:
            self.log.line(f"{self.folder / LATEST} did not name {path.name}, the newest whole checkpoint; now it does")
            files.point(path)
        return path, json.loads((path / TRAINER).read_bytes())


def _named(pieces: list[zero_state.Piece]) -> dict[str, PieceTensor]:
    """Live views of weights and their states, by the name that they are saved under."""
    return {f"{key}/{one.name}": PieceTensor(tensor, one.start, one.numel) for one in pieces for key, tensor in one.tensors.items()}


def _buffers(engine: Any, stats: BatchStats) -> dict[str, torch.Tensor]:
    """Live views of what the forward pass updates, equal on all ranks after every step."""
    buffers = {f"buffer/{name}": buffer for name, buffer in engine.module.named_buffers()}
    if stats.ema_decay:
        buffers |= {f"buffer_ema/{name}": average for name, average in stats.averages.items()}
    return buffers
