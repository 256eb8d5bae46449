"""What torch.distributed.checkpoint is told of the training state, and how a reader finds the bytes that it needs.

Its planners write down which stretch of which tensor lies where, and work out which of those a reader needs. Its own file format, a
zip archive for every tensor, and planning anew for every save cost seconds of Python for VAN-B6, during which a training thread waits
for the interpreter. Here a rank's file is its staging memory, byte for byte, written in large blocks outside of the interpreter's
lock; what lies where in it stays the same for the whole run, and so is planned once.
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
    """A stretch of a flattened parameter, as torch.distributed.checkpoint takes it: it has the whole's size, and holds a part."""

    piece: Tensor
    start: int

    @staticmethod
    def __new__(cls, piece: Tensor, start: int, numel: int) -> "PieceTensor":
        tensor = torch.Tensor._make_wrapper_subclass(cls, (numel,), dtype=piece.dtype, device=piece.device)
        tensor.piece, tensor.start = piece, start
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"a piece is only saved and loaded, not computed with: {func}")

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
    """Reads the parts of 1-D tensors that a plan needs from the files that hold them."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder = folder

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        descriptors: dict[str, int] = {}
        try:
            for request in plan.items:
                info = self.storage_data[request.storage_index]
                if info.relative_path not in descriptors:
                    descriptors[info.relative_path] = os.open(self.folder / info.relative_path, os.O_RDONLY)
                target = planner.resolve_tensor(request).detach()
                read = torch.empty(target.shape, dtype=target.dtype)
                begin = info.offset + sum(request.storage_offsets) * target.itemsize  # no offset in a scalar, one in all else
                assert math.prod(request.lengths) == target.numel()
                _read_into(
                    descriptors[info.relative_path], read.view(-1).view(torch.uint8).numpy().data, begin, self.folder / info.relative_path
                )
                target.copy_(read)
                planner.commit_tensor(request, target)
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def plan(state: dict[str, Tensor], offsets: dict[str, int], group: dist.ProcessGroup) -> bytes | None:
    """What .metadata says, on rank 0; None on others. Collective.

    Args:
        state: what this rank saves: PieceTensors, and whole tensors that no other rank saves.
        offsets: where in this rank's file each begins, in bytes.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state, is_coordinator=dist.get_rank() == 0)
    of_ranks = gather_objects((planner.create_local_plan(), offsets), group)
    if not of_ranks:
        return None
    _, metadata = planner.create_global_plan([local for local, _ in of_ranks])
    metadata.storage_data = {
        item.index: _StorageInfo(file_of(number), begins[item.index.fqn], _size_of(item))
        for number, (local, begins) in enumerate(of_ranks)
        for item in local.items
    }
    return pickle.dumps(metadata)


def file_of(rank: int) -> str:
    return f"__{rank}_0.distcp"


def load_planner() -> DefaultLoadPlanner:
    return DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def saved_tensors(path: Path) -> dict[str, Any]:
    """Size and type of each whole tensor in a checkpoint, by name."""
    return ShardReader(path).read_metadata().state_dict_metadata


def read(path: Path, kinds: tuple[str, ...]) -> dict[str, Tensor]:
    """Whole 1-D tensors of a checkpoint by name (`weight/NAME`, …), in one process, without DeepSpeed or process groups."""
    wanted = {name: saved for name, saved in saved_tensors(path).items() if kind_of(name) in kinds}
    state = {name: torch.empty(saved.size, dtype=saved.properties.dtype) for name, saved in wanted.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
        dcp.load(state, storage_reader=ShardReader(path), planner=load_planner(), no_dist=True)
    return state


def kind_of(name: str) -> str:
    """`weight`, `exp_avg`, …, `buffer`, of a saved tensor's name."""
    return name.split("/")[0]


def _size_of(item: WriteItem) -> int:
    """In bytes."""
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _read_into(descriptor: int, target: memoryview, begin: int, path: Path) -> None:
    while target:
        size = os.preadv(descriptor, [target], begin)
        if size == 0:
            raise OSError(f"{path} ends at {begin} bytes, in the middle of a tensor")
        target, begin = target[size:], begin + size
