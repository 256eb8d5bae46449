"""Reading ahead keeps order and depth, and raises errors at their turn."""

import threading
import time
from collections.abc import Iterator

import pytest

from data.loader.read_ahead import ReadAhead


def numbers(count: int, taken: list[int] | None = None) -> Iterator[int]:
    for number in range(count):
        if taken is not None:
            taken.append(number)
        yield number


def square(number: int) -> int:
    time.sleep(0.002 * (number % 3))  # so that they are not done in order
    return number**2


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize(("threads", "depth"), [(1, 1), (3, 2), (2, 6), (8, 8)])
def test_results_are_in_order_and_complete(threads: int, depth: int) -> None:
    with ReadAhead(numbers(60), square, threads=threads, depth=depth) as reader:
        assert list(reader) == [number**2 for number in range(60)]
        assert next(reader, None) is None
    assert not readers()


def test_reads_ahead_but_no_further_than_depth() -> None:
    taken: list[int] = []
    with ReadAhead(numbers(100, taken), square, threads=4, depth=6) as reader:
        for consumed in (0, 1, 5):
            while reader._returned < consumed:
                next(reader)
            deadline = time.monotonic() + 5
            while len(taken) < 6 + consumed and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)
            assert len(taken) == 6 + consumed
    assert not readers()


def test_error_is_raised_at_its_turn() -> None:
    def broken(number: int) -> int:
        if number == 20:
            raise ValueError("number 20 is broken")
        return square(number)

    with ReadAhead(numbers(100), broken, threads=3, depth=4) as reader:
        assert [next(reader) for _ in range(20)] == [number**2 for number in range(20)]
        for _ in range(2):
            with pytest.raises(ValueError, match="number 20 is broken"):
                next(reader)
    assert not readers()


def test_error_of_the_work_is_raised() -> None:
    def broken() -> Iterator[int]:
        yield from numbers(3)
        raise RuntimeError("no more order")

    with ReadAhead(broken(), square, threads=3, depth=4) as reader:
        assert [next(reader) for _ in range(3)] == [0, 1, 4]
        with pytest.raises(RuntimeError, match="no more order"):
            next(reader)
    assert not readers()
