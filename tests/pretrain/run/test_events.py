"""Events in a job's output, and the record of a run's attempts."""

from pathlib import Path

import pytest

from pretrain.run import attempts
from pretrain.run.attempts import Attempt, End
from pretrain.run.events import Event, EventReader, emit_event, is_event


def test_an_event_is_read_as_it_was_emitted(capsys: pytest.CaptureFixture[str]) -> None:
    emit_event("rank", rank=3, text="a \"quoted\" 'word' ü\n")
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert is_event(line)
    assert EventReader().read(line) == Event("rank", {"rank": 3, "text": "a \"quoted\" 'word' ü\n"})
    assert not is_event("step 3/40  loss 2")


def test_long_events_of_two_processes_arrive_mixed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is longer than the 1,024 bytes that srun keeps together."""
    lines = []
    for node in ("n0", "n1"):
        monkeypatch.setenv("SLURMD_NODENAME", node)
        emit_event("node", host=node, text="ü" * 1000)
        lines.append(capsys.readouterr().out.splitlines())
    reader = EventReader()
    mixed = [line for pair in zip(*lines, strict=True) for line in pair]
    assert len(mixed) > 4
    assert max(len(line.encode()) for line in mixed) < 1000
    events = [event for line in mixed if (event := reader.read(line))]
    assert events == [Event("node", {"host": node, "text": "ü" * 1000}) for node in ("n0", "n1")]


def test_attempts_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert attempts.read(tmp_path) == []
    end = End(100.0, "crashed", "its reason", 5, step=7, rank=1, host="n1", excluded=("n1",), again=True)
    run = [Attempt("12", number, 50.0, ("n0", "n1"), 2, 0, end if number != 1 else None) for number in range(3)]
    for attempt in run:
        attempts.write(tmp_path, Attempt(**vars(attempt) | {"end": None}))
        if attempt.end:
            attempts.write(tmp_path, attempt)
    assert attempts.read(tmp_path) == run
