"""Records the streams that a GPU would use while a CPU computes, to find races between streams.

    streams = Streams()          DeepSpeed's accelerator from here on; before deepspeed.initialize
    with streams.watched(): …    engine's steps
    streams.races, streams.host_waits

The CPU computes everything in program order, so results prove nothing about the order on a GPU. But the code that assigns operators to
streams, makes one stream wait for another, or makes the host wait, is the same. A race is an operator that reads a tensor which another
stream has written, or writes one which another stream has used, without waiting for that stream; or a tensor whose memory Python frees
while another stream uses it. The model of memory: pooled by stream, as in torch's caching allocator, and kept for the streams that
`record_stream` names. A collective counts as an operator of the stream that calls it.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Stream:
    """A stream; `seen[other]` operators of `other` are complete before the next operator of this stream."""

    def __init__(self) -> None:
        self.seen: dict[Stream, int] = {self: 0}

    def wait_stream(self, other: "Stream") -> None:
        for stream, number in other.seen.items():
            self.seen[stream] = max(self.seen.get(stream, 0), number)

    def unknown(self, uses: dict["Stream", int]) -> bool:
        return any(self.seen.get(stream, 0) < number for stream, number in uses.items())


class Memory:
    """The uses of one storage: the last read and write by each stream, and the streams that `record_stream` named."""

    def __init__(self, home: Stream):
        self.home, self.reads, self.writes, self.recorded = home, {}, {}, set[Stream]()  # type: ignore[var-annotated]


class Streams(CPU_Accelerator):
    Stream = Stream  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.main = self.current = Stream()
        self.races: list[str] = []
        self.host_waits = 0
        self.used: set[Stream] = set()
        self._memory: dict[int, Memory] = {}
        self._freed: list[Memory] = []
        set_accelerator(self)

    def is_synchronized_device(self) -> bool:
        return False

    def handles_memory_backpressure(self) -> bool:
        return True

    def current_stream(self, device_index: Any = None) -> Stream:
        return self.current

    def default_stream(self, device_index: Any = None) -> Stream:
        return self.main

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def synchronize(self, device_index: Any = None) -> None:
        self.host_waits += 1
        self.main.wait_stream(self.current)
        for stream in self.used:
            self.main.wait_stream(stream)

    @contextmanager
    def watched(self) -> Iterator[None]:
        record_stream = Tensor.record_stream
        Tensor.record_stream = lambda tensor, stream: self._of(tensor).recorded.add(stream)  # type: ignore[method-assign,assignment,return-value]
        with _Operators(self):
            yield
        Tensor.record_stream = record_stream  # type: ignore[method-assign]

    def ran(self, function: Any, args: Any, kwargs: Any, made: Any) -> None:
        """Records an operator of the current stream."""
        if function.is_view:  # a view touches no memory
            return
        here = self.current
        self.used.add(here)
        here.seen[here] += 1
        now, written = here.seen[here], set()
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written |= {id(leaf) for leaf in tree_leaves(value)}
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and id(leaf) not in written]
        for tensor in (leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor)):
            memory = self._of(tensor)
            writes = id(tensor) in written or not any(tensor is one for one in read)
            if here.unknown(memory.writes) or (writes and here.unknown(memory.reads)):
                self.races.append(f"{function} {'writes' if writes else 'reads'} a tensor of {tuple(tensor.shape)}")
            (memory.writes if writes else memory.reads)[here] = now

    def _of(self, tensor: Tensor) -> Memory:
        storage = tensor.untyped_storage()
        if id(storage) not in self._memory:
            waiting = [memory for memory in self._freed if memory.home is self.current]
            for memory in waiting:
                uses = {s: n for which in (memory.reads, memory.writes) for s, n in which.items() if s not in memory.recorded}
                if self.current.unknown(uses):
                    self.races.append(f"memory freed in use, before a tensor of {tuple(tensor.shape)}")
                self._freed.remove(memory)
            self._memory[id(storage)] = Memory(self.current)
            weakref.finalize(storage, self._free, id(storage))
        return self._memory[id(storage)]

    def _free(self, number: int) -> None:
        self._freed.append(self._memory.pop(number))


class _Operators(TorchDispatchMode):
    def __init__(self, streams: Streams):
        super().__init__()
        self._streams = streams

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self._streams.ran(function, args, kwargs or {}, made)
        return made
