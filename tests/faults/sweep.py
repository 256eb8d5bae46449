"""One case of the sweep: a job is hit at a point, started again, and compared with one that was left alone."""

import itertools
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults import jobs
from tests.faults.points import POINTS, Fault

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
STAGES = (1, 2, 3, 0)


@dataclass(frozen=True)
class Case:
    signal: signal.Signals
    point: str
    stage: int

    def __str__(self) -> str:
        return f"{self.signal.name}, {self.point}, ZeRO-{self.stage}"


@dataclass(frozen=True)
class Result:
    """What came of a case: how the job ended, the last step it had made, the step at which it went on (None: it had completed, so there
    was nothing to go on with), and whether it then ended bit for bit as one that was left alone."""

    outcome: str
    reached: int
    resumed: int | None
    same: bool

    @property
    def lost(self) -> int:
        return 0 if self.resumed is None else self.reached - self.resumed


def cases() -> Iterator[Case]:
    """All of them; the ZeRO stages take turns so that each point and each signal meets several."""
    stages = itertools.cycle(STAGES)
    for point in POINTS:
        for number in SIGNALS:
            yield Case(number, point, next(stages))


def play(case: Case, folder: Path, dataset: Path, undisturbed: Path) -> Result:
    """Plays a case through; raises AssertionError where a promise is broken."""
    option = f"engine.zero_stage={case.stage}"
    ended = jobs.run(folder, dataset, option, fault=Fault(case.point, case.signal, folder / "run"))
    assert (folder / "run" / "hit").exists(), f"the point was not reached:\n{jobs.log_of(folder)[-3000:]}"
    reached = jobs.reached(folder)
    if case.signal == signal.SIGKILL:
        victim = POINTS[case.point].rank
        assert ended.codes[victim] == -signal.SIGKILL
        assert ended.codes[1 - victim] not in (0, 85)
        outcome = "all ranks end"
    elif case.signal == signal.SIGSTOP:
        assert ended.stopped
        outcome = "the others wait; killed from outside"
    else:
        assert ended.codes in ([0, 0], [85, 85]), f"{ended.codes}\n{jobs.log_of(folder)[-3000:]}"
        outcome = "saves, exits with 85" if ended.codes[0] else "completes"
    again = jobs.run(folder, dataset, option)
    assert again.codes == [0, 0], jobs.log_of(folder)[-3000:]
    resumed = jobs.resumed_steps(folder)[-1]
    result = Result(outcome, reached, None if outcome == "completes" else resumed, jobs.same_end(folder, undisturbed))
    assert result.same, f"{case}: it ended otherwise than undisturbed\n{jobs.log_of(folder)[-3000:]}"
    if case.signal == signal.SIGTERM:
        assert result.lost == 0
    else:
        assert resumed == POINTS[case.point].resumes, jobs.log_of(folder)[-3000:]
    return result
