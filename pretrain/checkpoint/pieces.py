"""Describes the training state to torch.distributed.checkpoint, and reads from a checkpoint only the bytes that are needed.

The planners of torch.distributed.checkpoint record which range of which tensor lies where, and determine which ranges a reader needs. Its
file format is not used: a zip archive per tensor and a new plan per save would cost the training thread seconds for VAN-B6. Here a rank's
file is a byte-for-byte copy of its staging memory, whose layout is planned once.
"""

import math
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, TensorWriteData, WriteItem, WriteItemType
from torch.futures import Future

from pretrain.engine.distributed import gather_objects

METADATA = ".metadata"


class PieceTensor(torch.Tensor):
    """Presents a range of a flattened parameter to torch.distributed.checkpoint: the size of the parameter, the data of the range."""

    piece: Tensor
    start: int

    @staticmethod
    def __new__(cls, piece: Tensor, start: int, numel: int) -> "PieceTensor":
        tensor = torch.Tensor._make_wrapper_subclass(cls, (numel,), dtype=piece.dtype, device=piece.device)
        tensor.piece, tensor.start = piece, start
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"a piece can only be saved and loaded, but {func} was called")

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size([self.start]), sizes=self.piece.shape)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        data = TensorWriteData(chunk=self._chunk(), properties=TensorProperties.create_from_tensor(self.piece), size=self.size())
        return [WriteItem(index=MetadataIndex(fqn, self._chunk().offsets), type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.piece


class ShardReader(dcp.FileSystemReader):
    """Reads the ranges of 1-D tensors that a plan needs from the files of a checkpoint."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads the plan's ranges into the planner's tensors."""
        descriptors: dict[str, int] = {}
        try:
            for request in plan.items:
                info = self.storage_data[request.storage_index]
                if info.relative_path not in descriptors:
                    descriptors[info.relative_path] = os.open(Path(self.path) / info.relative_path, os.O_RDONLY)
                target = planner.resolve_tensor(request).detach()
                buffer = torch.empty(target.shape, dtype=target.dtype)
                begin = info.offset + sum(request.storage_offsets) * target.itemsize  # one offset, none for a scalar
                assert math.prod(request.lengths) == target.numel()
                memory = buffer.view(-1).view(torch.uint8).numpy().data
                _read_into(descriptors[info.relative_path], memory, begin, Path(self.path) / info.relative_path)
                target.copy_(buffer)
                planner.commit_tensor(request, target)
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def plan_metadata(state: dict[str, Tensor], offsets: dict[str, int], group: dist.ProcessGroup) -> bytes | None:
    """Returns the content of .metadata on rank 0, and None on the other ranks. Collective.

    Args:
        state: saved by this rank: PieceTensors, and whole tensors that no other rank saves.
        offsets: first byte of each tensor in this rank's file.
        group: all ranks.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state, is_coordinator=dist.get_rank() == 0)
    plans = gather_objects((planner.create_local_plan(), offsets), group)
    if not plans:
        return None
    _, metadata = planner.create_global_plan([local for local, _ in plans])
    metadata.storage_data = {
        item.index: _StorageInfo(name_shard(number), first_bytes[item.index.fqn], _size_in_bytes(item))
        for number, (local, first_bytes) in enumerate(plans)
        for item in local.items
    }
    return pickle.dumps(metadata)


def name_shard(rank: int) -> str:
    """Returns the name of a rank's file in a checkpoint."""
    return f"__{rank}_0.distcp"


def list_tensors(path: Path) -> dict[str, Any]:
    """Returns size and type of each whole tensor in a checkpoint, by name."""
    return ShardReader(path).read_metadata().state_dict_metadata


def read_tensors(path: Path, kinds: tuple[str, ...]) -> dict[str, Tensor]:
    """Reads whole 1-D tensors of a checkpoint by name (`weight/NAME`, …), in one process, without DeepSpeed or process groups."""
    wanted = {name: saved for name, saved in list_tensors(path).items() if get_kind(name) in kinds}
    state = {name: torch.empty(saved.size, dtype=saved.properties.dtype) for name, saved in wanted.items()}
    load_tensors(path, state)
    return state


def load_tensors(path: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Fills tensors and pieces by name from a checkpoint; collective, or without a group in this process alone."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # by no_dist
        dcp.load(state, storage_reader=ShardReader(path), planner=planner, process_group=group, no_dist=group is None)


def get_kind(name: str) -> str:
    """Returns the kind in a saved tensor's name: `weight`, `exp_avg`, …, `buffer`."""
    return name.split("/")[0]


def _size_in_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _read_into(descriptor: int, target: memoryview, begin: int, path: Path) -> None:
    while target:
        size = os.preadv(descriptor, [target], begin)
        if size == 0:
            raise OSError(f"{path} ends at {begin} bytes, in the middle of a tensor")
        target, begin = target[size:], begin + size
