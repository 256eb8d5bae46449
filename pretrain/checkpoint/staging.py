"""Host copies of the training state, which a thread can write while training goes on.

    staging = Staging(updated, running, device)      once: allocates, and finds what lies end to end
    staging.copy()                                   at a step's end; on a GPU it only queues the copies
    staging.before_update()                          before the next update of the weights
    staging.wait()                                   in the writing thread, before it writes staging.memory

The memory, page-locked on a GPU, is allocated once and used by every save: one save is in flight at a time, so however slow the disk
is, it takes no more. ZeRO's flat buffers are copied as the few long stretches that they are, not parameter by parameter.
"""

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; any element type may begin there


class Staging:
    """Copies tensors to `memory` (bytes), in which `host` holds one for each name and `offsets` says where it begins.

    Args:
        updated: contiguous tensors that change in the optimizer's step alone: weights and their states. On a GPU they are copied
            beside the next step's forward and backward passes, on a stream of their own.
        running: contiguous tensors that the forward pass changes: BatchNorm's statistics. On a GPU they are first copied on the
            device, in the order of the device's work, so no step can tear them.

    All of them are looked up once: they must stay where they are in memory for the whole run, and do, as ZeRO's flat buffers.
    """

    def __init__(self, updated: dict[str, Tensor], running: dict[str, Tensor], device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        stretches = [(stretch, parts, False) for stretch, parts in _stretches(updated)]
        stretches += [(stretch, parts, self._stream is not None) for stretch, parts in _stretches(running)]
        self.bytes = sum(_padded(stretch.nbytes) for stretch, _, _ in stretches)
        # Filled now: the pages of fresh memory are found when they are first written, which the first save would wait for.
        self.memory = torch.empty(self.bytes, dtype=torch.uint8, pin_memory=self._stream is not None).fill_(0)
        self._snapshots: list[tuple[Tensor, Tensor]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.host: dict[str, Tensor] = {}
        self.offsets: dict[str, int] = {}
        offset = 0
        for stretch, parts, by_snapshot in stretches:
            if by_snapshot:
                self._snapshots.append((stretch, torch.empty_like(stretch)))
                stretch = self._snapshots[-1][1]
            place = self.memory.narrow(0, offset, stretch.nbytes).view(stretch.dtype)
            self._copies.append((stretch, place))
            begin = 0
            for name, tensor in parts:
                self.host[name] = place.narrow(0, begin, tensor.numel()).view(tensor.shape)
                self.offsets[name] = offset + begin * tensor.itemsize
                begin += tensor.numel()
            offset += _padded(stretch.nbytes)

    def copy(self) -> None:
        """Begins the copies; on a CPU it makes them."""
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
        """Makes the device's next work wait for the copies; the host does not wait."""
        if self._copied is not None:
            assert self._stream is not None
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)
            self._copied = None

    def wait(self) -> None:
        """Returns when `memory` holds all of the last copy."""
        if self._stream is not None:
            self._stream.synchronize()


def _stretches(tensors: dict[str, Tensor]) -> list[tuple[Tensor, list[tuple[str, Tensor]]]]:
    """The fewest 1-D tensors that cover these, each with the names and tensors that lie in it end to end."""
    groups: list[list[tuple[str, Tensor]]] = []
    end = None
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].untyped_storage().data_ptr(), item[1].data_ptr())):
        assert tensor.is_contiguous()
        begin = (tensor.untyped_storage().data_ptr(), tensor.dtype, tensor.data_ptr())
        if begin != end:
            groups.append([])
        groups[-1].append((name, tensor))
        end = (*begin[:2], tensor.data_ptr() + tensor.nbytes)
    found = []
    for parts in groups:
        first = parts[0][1].detach()
        found.append((first.as_strided((sum(tensor.numel() for _, tensor in parts),), (1,)), parts))
    return found


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
