"""The work that is due after each optimizer step, for every combination of small periods."""

import itertools

import pytest

from pretrain.schedule import Schedule

TOTAL = 12
PERIODS = (None, 1, 2, 3, 5, 20)
SCHEDULES = [
    Schedule(TOTAL, log_every, evaluate_every, save_every, keep_every, saves_evaluations)
    for log_every in (1, 4, 20)
    for evaluate_every, save_every, keep_every in itertools.product(PERIODS, repeat=3)
    for saves_evaluations in (False, True)
]


def multiples(*periods: int | None) -> set[int]:
    return {step for period in periods if period for step in range(period, TOTAL + 1, period)}


@pytest.mark.parametrize("requested", [set(), {1, 7}])
def test_each_period_and_each_request_is_due(requested: set[int]) -> None:
    for schedule in SCHEDULES:
        due = {step: schedule.due(step, is_save_requested=step in requested) for step in range(1, TOTAL + 1)}
        evaluates = multiples(schedule.evaluate_every) | {TOTAL} if schedule.evaluate_every else set()
        saves = multiples(schedule.save_every, schedule.keep_every) | requested | {TOTAL}
        saves |= evaluates if schedule.saves_evaluations else set()
        assert {step for step in due if due[step].evaluate} == evaluates, schedule
        assert {step for step in due if due[step].save} == saves, schedule
        assert {step for step in due if due[step].log} == multiples(schedule.log_every) | evaluates | saves, schedule
