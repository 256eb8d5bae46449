"""Copies the training state to host memory, which a thread writes to disk while training continues.

The memory, page-locked for a GPU, is allocated once and reused by every save: only one save is in progress at a time, so a slow disk costs
no memory. ZeRO's flat buffers are copied as a few long ranges, not parameter by parameter.
"""

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; any element type may begin there


class Staging:
    """Copies tensors to `memory`. `host` maps each name to a view of `memory`, and `offsets` to the view's first byte.

    The addresses of all tensors must not change during the run, as is true of ZeRO's flat buffers.

    Args:
        updated: contiguous tensors that only the optimizer's step changes: weights and their states. A GPU copies them on a separate
            stream, during the next step's forward and backward passes.
        running: contiguous tensors that the forward pass changes: BatchNorm's statistics. A GPU first copies them on the device, in
            stream order, so that all values are of one step.
        device: of the tensors.
    """

    def __init__(self, updated: dict[str, Tensor], running: dict[str, Tensor], device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        ranges = [(merged, parts, False) for merged, parts in _merge(updated)]
        ranges += [(merged, parts, self._stream is not None) for merged, parts in _merge(running)]
        self.bytes = sum(_pad(merged.nbytes) for merged, _, _ in ranges)
        # Filled now, because the kernel allocates pages at their first write, which would delay the first save.
        self.memory = torch.empty(self.bytes, dtype=torch.uint8, pin_memory=self._stream is not None).fill_(0)
        self._snapshots: list[tuple[Tensor, Tensor]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.host: dict[str, Tensor] = {}
        self.offsets: dict[str, int] = {}
        offset = 0
        for merged, parts, needs_snapshot in ranges:
            if needs_snapshot:
                self._snapshots.append((merged, torch.empty_like(merged)))
                merged = self._snapshots[-1][1]
            place = self.memory.narrow(0, offset, merged.nbytes).view(merged.dtype)
            self._copies.append((merged, place))
            begin = 0
            for name, tensor in parts:
                self.host[name] = place.narrow(0, begin, tensor.numel()).view(tensor.shape)
                self.offsets[name] = offset + begin * tensor.itemsize
                begin += tensor.numel()
            offset += _pad(merged.nbytes)

    def copy(self) -> None:
        """Copies the tensors; on a GPU, queues the copies and returns at once."""
        if self._stream is None:
            for live, host in self._copies:
                host.copy_(live)
            return
        for live, snapshot in self._snapshots:
            snapshot.copy_(live)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for live, host in self._copies:
                host.copy_(live, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def before_update(self) -> None:
        """Makes the device's later work wait for the copies; the host does not wait."""
        if self._copied is not None:
            assert self._stream is not None
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)
            self._copied = None

    def wait(self) -> None:
        """Waits until the last copy is complete."""
        if self._stream is not None:
            self._stream.synchronize()


def _merge(tensors: dict[str, Tensor]) -> list[tuple[Tensor, list[tuple[str, Tensor]]]]:
    """Merges tensors that are adjacent in memory; returns each merged 1-D tensor with the named tensors in it."""
    groups: list[list[tuple[str, Tensor]]] = []
    end = None
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].untyped_storage().data_ptr(), item[1].data_ptr())):
        assert tensor.is_contiguous()
        begin = (tensor.untyped_storage().data_ptr(), tensor.dtype, tensor.data_ptr())
        if begin != end:
            groups.append([])
        groups[-1].append((name, tensor))
        end = (*begin[:2], tensor.data_ptr() + tensor.nbytes)
    return [(parts[0][1].detach().as_strided((sum(tensor.numel() for _, tensor in parts),), (1,)), parts) for parts in groups]


def _pad(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
