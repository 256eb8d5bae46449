"""Judges a preflight step by the reports of its tasks, in pure functions that return a Verdict.

A problem on every node comes from settings, data or software, so restarting cannot help (exit code 2). A problem on some nodes makes these
nodes unfit (3), and the job may restart without them. A defect, such as a broken GPU, always makes its node unfit.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.common.text import format_table
from launch.preflight.gpus import list_faults
from launch.preflight.node import Node, Problem
from pretrain.run.exit_codes import EXIT_CONFIG, EXIT_UNFIT

SLOW_SHARE = 0.5  # of the other nodes' median rate
MIN_READ_BYTES = 8 << 20  # for a rate; reading less is too short to measure a disk


@dataclass
class Task:
    """Holds the reports of one task of a preflight step."""

    rank: int
    host: str
    doing: str = "starting"
    steps: int = 0  # reports of progress
    result: dict[str, Any] | None = None
    error: str = ""


@dataclass
class Verdict:
    settings: list[str] = field(default_factory=list)
    unfit: dict[str, list[str]] = field(default_factory=dict)  # reasons by node
    unattributed: list[str] = field(default_factory=list)  # failures of all nodes, which may succeed in another try
    warnings: list[str] = field(default_factory=list)

    @property
    def code(self) -> int:
        return EXIT_CONFIG if self.settings else EXIT_UNFIT if self.unfit or self.unattributed else 0

    def add(self, other: "Verdict") -> None:
        self.settings += other.settings
        self.unattributed += other.unattributed
        self.warnings += other.warnings
        for name, reasons in other.unfit.items():
            self.unfit.setdefault(name, []).extend(reasons)


def judge_tasks(tasks: Sequence[Task], nodes: Sequence[str], per_node: int, *, collective: bool) -> Verdict:
    """Returns a verdict that names the nodes on which any of the `per_node` tasks gave no result.

    Tasks of a `collective` step wait for each other, so one failure causes others. The cause is then taken to be the tasks with the least
    progress among those that stopped responding.
    """
    reasons: dict[str, list[str]] = {node: [] for node in nodes}
    for node in nodes:
        if missing := per_node - sum(task.host == node for task in tasks):
            reasons[node].append(f"{missing} of its {per_node} tasks reported nothing")
    failed = [task for task in tasks if task.result is None]
    if collective:
        silent = [task for task in failed if not task.error]
        least = min((task.steps for task in silent), default=0)
        failed = [] if any(reasons.values()) else [task for task in silent if task.steps == least] or failed
    for task in failed:
        ending = f"failed while {task.doing}: {task.error}" if task.error else f"stopped responding while {task.doing}"
        reasons[task.host].append(f"rank {task.rank} {ending}")
    if all(reasons.values()) and len(nodes) > 1:
        return Verdict(unattributed=[f"on every node: {reasons[nodes[0]][0]}"])
    return Verdict(unfit={name: texts for name, texts in reasons.items() if texts})


def judge_nodes(nodes: Sequence[Node], device: str, tasks: int) -> Verdict:
    """Compares the inspected nodes of a job; `device` is engine.device, `tasks` the number of ranks per node."""
    verdict = Verdict()
    gpus_used = uses_gpus(nodes, device)
    problems = {node.name: [*node.problems, *(_gpu_problems(node, device, tasks) if gpus_used else [])] for node in nodes}
    verdict.settings, outliers = _compare(nodes)
    for name, differences in outliers.items():
        problems[name] += differences
    counts = Counter(about for listed in problems.values() for about in {problem.about for problem in listed})
    common: dict[str, str] = {}  # text by subject
    for name, listed in problems.items():
        for problem in listed:
            if problem.is_defect or counts[problem.about] < (problem.checkers or len(nodes)):
                verdict.unfit.setdefault(name, []).append(problem.text)
            else:
                common.setdefault(problem.about, problem.text)
    verdict.settings += [text if len(nodes) == 1 else f"on every node: {text}" for text in common.values()]
    verdict.warnings += _slow({node.name: rate for node in nodes if (rate := read_rate(node)) is not None}, "reads data.train")
    return verdict


def judge_network(rates: Mapping[str, float]) -> Verdict:
    """Warns of nodes with slow exchanges if there are at least three nodes; two nodes always have the same rate."""
    return Verdict(warnings=_slow(rates, "exchanges data with its neighbors") if len(rates) > 2 else [])


def exchange_rates(tasks: Sequence[Task]) -> dict[str, float]:
    """Returns the rate of each node's faster exchange with a neighbor, in bytes per second each way; empty for one node."""
    seconds = {task.rank: dict(task.result["exchange_s"]) for task in tasks if task.result}
    rates = {}
    for task in tasks:
        if task.result and seconds[task.rank]:
            # The duration of an exchange is the time of the slower side.
            durations = (max(time, seconds[peer][task.rank]) for peer, time in seconds[task.rank].items())
            rates[task.host] = task.result["bytes"] / min(durations)
    return rates


def uses_gpus(nodes: Sequence[Node], device: str) -> bool:
    """Returns whether the job runs on GPUs: engine.device=auto uses them if any node has one."""
    return device == "cuda" or (device == "auto" and any(node.gpus for node in nodes))


def read_rate(node: Node) -> float | None:
    """Returns the read rate in bytes per second, or None if too little was read."""
    return node.read_bytes / node.read_seconds if node.read_bytes >= MIN_READ_BYTES else None


def _gpu_problems(node: Node, device: str, tasks: int) -> list[Problem]:
    advice = "ask Slurm for one per task (--gpus-per-node)"
    if node.no_gpus:
        return [Problem("GPUs", f"engine.device={device}, but this node has no GPU ({node.no_gpus}); {advice}, or set engine.device=cpu")]
    problems = [Problem("GPU", fault, is_defect=True) for gpu in node.gpus for fault in list_faults(gpu)]
    if len(node.gpus) < tasks:
        problems.append(Problem("GPUs", f"{len(node.gpus)} GPUs for {tasks} ranks; {advice}"))
    return problems


def _compare(nodes: Sequence[Node]) -> tuple[list[str], dict[str, list[Problem]]]:
    """Compares versions, settings and data sets; returns differences without a majority, and the problems of nodes in a minority."""
    values_of: dict[str, dict[str, str]] = {}  # by subject and node
    for node in nodes:
        datasets = {f"fingerprint of {key}": fingerprint for key, fingerprint in node.fingerprints.items()}
        for subject, value in (node.versions | node.settings | datasets).items():
            if value != "unknown":  # the commit on a node without git
                values_of.setdefault(subject, {})[node.name] = value
    undecided: list[str] = []
    outliers: dict[str, list[Problem]] = {}
    for subject, values in values_of.items():
        (usual, count), *others = Counter(values.values()).most_common()
        if others and others[0][1] == count:
            undecided.append(f"{subject} differs: {_group(values)}")
            continue
        for name, value in values.items():
            if value != usual:
                text = f"{subject} is {value}, but {usual} on {count} of {len(nodes)} nodes"
                outliers.setdefault(name, []).append(Problem(subject, text))
    return undecided, outliers


def _group(values: Mapping[str, str]) -> str:
    """Returns `A on n0, n2; B on n1`."""
    distinct = dict.fromkeys(values.values())
    return "; ".join(f"{value} on {', '.join(name for name in values if values[name] == value)}" for value in distinct)


def _slow(rates: Mapping[str, float], activity: str) -> list[str]:
    """Warns of nodes whose rate is far below the median of the others."""
    warnings = []
    for name, rate in rates.items():
        others = [other for node, other in rates.items() if node != name]
        if others and rate < SLOW_SHARE * statistics.median(others):
            warnings.append(f"{name}: {activity} at {rate / 1e6:.3g} MB/s, the others at {statistics.median(others) / 1e6:.3g} MB/s")
    return warnings


def node_table(nodes: Sequence[Node], device: str) -> str:
    """Returns a line with the versions that all nodes share, and a row for each node."""
    folders = list(dict.fromkeys(name for node in nodes for name in node.free_bytes))
    rows = [["node", "GPUs", *(f"{name} free" for name in folders), "data", "read"]]
    for node in nodes:
        rate = read_rate(node)
        rows.append(
            [
                node.name,
                _describe_gpus(node) if uses_gpus(nodes, device) else "not used",
                *(f"{node.free_bytes[name] / 1e9:.0f} GB" if name in node.free_bytes else "-" for name in folders),
                ", ".join(f"{key.removeprefix('data.')} {value[:8]}" for key, value in node.fingerprints.items()) or "-",
                f"{rate / 1e6:.0f} MB/s" if rate is not None else f"{node.read_bytes / 1e6:.1f} MB",
            ]
        )
    shared = [f"{name} {value}" for name, value in nodes[0].versions.items() if all(node.versions.get(name) == value for node in nodes)]
    return ", ".join(shared) + "\n" + format_table(rows, left=range(len(rows[0])))


def _describe_gpus(node: Node) -> str:
    if not node.gpus:
        return "none"
    names = Counter(f"{gpu.name} {gpu.memory / 1e9:.0f} GB" for gpu in node.gpus)
    return ", ".join(f"{count} x {name}" for name, count in names.items())
