"""What torch.distributed.checkpoint is told of the training state, and how the bytes of its plans are written and read.

Its planners decide which rank writes what and which part of which file a reader needs. Its own file format, a zip archive for every
tensor, costs 0.3 ms of Python a tensor, on which a training thread waits for the interpreter; here a rank's file is the bytes of its
tensors, end to end, written in large blocks outside of the interpreter's lock, and a reader reads the bytes that it needs alone.
"""

import math
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pretrain.checkpoint.files import Entry, create

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


class ShardWriter(dcp.FileSystemWriter):
    """Writes this rank's file, and on the coordinating rank .metadata, into an existing directory; `entries` is what the manifest
    says of them. Tensors are contiguous and on the CPU."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder = folder
        self.entries: dict[str, Entry] = {}

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        with create(self.folder / name) as file:
            for item in plan.items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                offset = file.tell()
                size = file.write(_bytes_of(tensor))
                results.append(WriteResult(item.index, size, _StorageInfo(name, offset, size)))
        self.entries[name] = file.entry
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {result.index: result.storage_data for of_rank in results for result in of_rank}
        with create(self.folder / METADATA) as file:
            pickle.dump(metadata, file)
        self.entries[METADATA] = file.entry


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
                _read_into(descriptors[info.relative_path], _bytes_of(read), begin, self.folder / info.relative_path)
                target.copy_(read)
                planner.commit_tensor(request, target)
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def save_planner() -> DefaultSavePlanner:
    return DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


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


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _read_into(descriptor: int, target: memoryview, begin: int, path: Path) -> None:
    while target:
        size = os.preadv(descriptor, [target], begin)
        if size == 0:
            raise OSError(f"{path} ends at {begin} bytes, in the middle of a tensor")
        target, begin = target[size:], begin + size
