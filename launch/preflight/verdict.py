"""What preflight concludes from what all nodes have found: pure functions over nodes.py's dataclasses.

    verdict = judge(nodes)
    print(table(nodes)); verdict.settings, verdict.unfit, verdict.warnings, verdict.code

What is wrong on every node is a matter of settings, data or software, and starting again won't help (exit code 2). What is wrong on some is
theirs: they are unfit (3), and the job may go on without them. A defect that is a node's own, such as a broken GPU, is so on every node.
"""

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from launch.preflight.gpus import broken, hot
from launch.preflight.nodes import DATASETS, Node, Problem
from launch.preflight.roll_call import Silent
from pretrain.run.exit_codes import EXIT_CONFIG, EXIT_UNFIT

SKEW = 1.0  # seconds
SLOW = 0.5  # of the others' median
READ_ENOUGH = 8 << 20  # bytes; less tells more of the machine's mood than of its disks


@dataclass
class Verdict:
    """`unfit` has the reasons by node; `nameless` are for what nobody knows the node of: ranks that did not come, or a network
    on which all fail. Another try may go better."""

    settings: list[str] = field(default_factory=list)
    unfit: dict[str, list[str]] = field(default_factory=dict)
    nameless: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def code(self) -> int:
        return EXIT_CONFIG if self.settings else EXIT_UNFIT if self.unfit or self.nameless else 0

    def add(self, other: "Verdict") -> None:
        self.settings += other.settings
        self.nameless += other.nameless
        self.warnings += other.warnings
        for name, reasons in other.unfit.items():
            self.unfit.setdefault(name, []).extend(reasons)


def judge(nodes: Sequence[Node], device: str) -> Verdict:
    """`device` is engine.device, as it is set."""
    verdict = Verdict()
    cuda = uses_gpus(nodes, device)
    found = {node.name: [*node.problems, *(_gpu_problems(node, device) if cuda else [])] for node in nodes}
    common, odd = _odd_ones(nodes)
    for name, problems in odd.items():
        found[name] += problems
    verdict.settings += common
    everywhere = set.intersection(*({problem.about for problem in problems if not problem.own} for problems in found.values()))
    told = set()
    for name, problems in found.items():
        for problem in problems:
            if problem.about not in everywhere or problem.own:
                verdict.unfit.setdefault(name, []).append(problem.text)
            elif problem.about not in told:
                told.add(problem.about)
                verdict.settings.append(problem.text if len(nodes) == 1 else f"on every node: {problem.text}")
    verdict.settings += _other_settings(nodes)
    verdict.warnings += _warnings(nodes)
    return verdict


def judge_silent(silent: Mapping[int, Silent], nodes: Sequence[Node]) -> Verdict:
    """Of ranks that gave no answer. Where one has ended or hangs, those that waited for it are not to blame for what they say."""
    verdict = Verdict()
    kind = next((kind for kind in ("ended", "hung", "failed") if any(one.kind == kind for one in silent.values())), None)
    to_blame = {rank: one.text for rank, one in silent.items() if one.kind == kind}
    found = {node.name: [f"rank {rank} {to_blame[rank]}" for rank in node.ranks if rank in to_blame] for node in nodes}
    if all(found.values()) and (len(nodes) > 1 or kind == "failed"):
        verdict.nameless += [f"on every node: {next(iter(found.values()))[0]}"]
    else:
        verdict.unfit |= {name: texts for name, texts in found.items() if texts}
    return verdict


def judge_absent(absent: Sequence[int], present: Mapping[str, int], tasks: Mapping[str, int], patience: float) -> Verdict:
    """Of ranks that did not come: `present` and expected `tasks` are numbers of ranks by node, the latter empty outside of Slurm."""
    short = {name: number - present.get(name, 0) for name, number in tasks.items() if number > present.get(name, 0)}
    who = f"rank{'s' if len(absent) > 1 else ''} {spans(absent)}"
    if not absent or short:
        return Verdict(
            unfit={
                name: [f"{number} of its {tasks[name]} ranks did not come within {patience:g} s (of all, {who})"]
                for name, number in short.items()
                if absent
            }
        )
    return Verdict(nameless=[f"{who} did not come within {patience:g} s"])


def uses_gpus(nodes: Sequence[Node], device: str) -> bool:
    """What engine.device comes to: with auto, GPUs where any node has one."""
    return device == "cuda" or (device == "auto" and any(node.gpus for node in nodes))


def _gpu_problems(node: Node, device: str) -> list[Problem]:
    if node.no_gpus:
        text = f"engine.device={device}, and this node has no GPU ({node.no_gpus})"
        return [Problem("GPUs", f"{text}; ask Slurm for one a task (--gpus-per-node), or set engine.device=cpu")]
    problems = [Problem("GPU", fault, own=True) for gpu in node.gpus for fault in broken(gpu)]
    if len(node.gpus) < len(node.ranks):
        text = f"{len(node.gpus)} GPUs for {len(node.ranks)} ranks; ask Slurm for one a task (--gpus-per-node and --ntasks-per-node alike)"
        problems.append(Problem("GPUs", text))
    return problems


def _odd_ones(nodes: Sequence[Node]) -> tuple[list[str], dict[str, list[Problem]]]:
    """Of versions and data sets: what has no majority, and the nodes that are unlike it."""
    unclear: list[str] = []
    odd: dict[str, list[Problem]] = {}
    kinds: dict[str, dict[str, str]] = {}
    for node in nodes:
        datasets = {f"the data set of {key}": identity for key, identity in node.fingerprints.items()}
        for what, value in (node.versions | datasets).items():
            if value != "unknown":  # a commit, where a node has no git
                kinds.setdefault(what, {})[node.name] = value
    for what, values in kinds.items():
        ranked = Counter(values.values()).most_common()
        if len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
            unclear.append(f"{what} differs: {_by_value(values)}")
        elif len(ranked) > 1:
            usual = ranked[0][0]
            for name, value in values.items():
                if value != usual:
                    odd.setdefault(name, []).append(
                        Problem(what, f"{what} is {value}, and {usual} on {ranked[0][1]} of {len(nodes)} nodes")
                    )
    return unclear, odd


def _other_settings(nodes: Sequence[Node]) -> list[str]:
    keys = {key: None for node in nodes for key in node.settings}
    differ = [key for key in keys if len({json.dumps(node.settings.get(key)) for node in nodes if node.settings}) > 1]
    return [f"{key} differs: {_by_value({node.name: str(node.settings.get(key)) for node in nodes})}" for key in differ]


def _by_value(values: Mapping[str, str]) -> str:
    """`A on n0, n2; B on n1`."""
    return "; ".join(
        f"{value} on {', '.join(name for name in values if values[name] == value)}" for value in dict.fromkeys(values.values())
    )


def _warnings(nodes: Sequence[Node]) -> list[str]:
    found = [
        f"{node.name}: its clock is {node.clock:+.1f} s off {nodes[0].name}'s; logs and locks are read together: see to NTP there"
        for node in nodes
        if abs(node.clock) > SKEW
    ]
    found += [f"{node.name}: GPU {gpu.number} is hot, and its clocks are held down" for node in nodes for gpu in node.gpus if hot(gpu)]
    found += _slow(nodes, "reads data.train at", read_rate)
    if len(nodes) > 2:  # of two, each has the other's figure
        found += _slow(nodes, "exchanges with its neighbours at", pair_rate)
    return found


def _slow(nodes: Sequence[Node], what: str, rate: Callable[[Node], float | None]) -> list[str]:
    """The nodes whose rate, in bytes a second, is far below the others'."""
    rates = {node.name: found for node in nodes if (found := rate(node)) is not None}
    if len(rates) < 2:
        return []
    slow = []
    for name, own in rates.items():
        usual = statistics.median(other for node, other in rates.items() if node != name)
        if own < SLOW * usual:
            slow.append(f"{name}: {what} {own / 1e6:.3g} MB/s, the others at {usual / 1e6:.3g}")
    return slow


def read_rate(node: Node) -> float | None:
    """Bytes a second; None where too little was read to judge by it."""
    return node.read_bytes / node.read_seconds if node.read_bytes >= READ_ENOUGH and node.read_seconds else None


def pair_rate(node: Node) -> float | None:
    """Bytes a second, each way; None where it has no neighbour."""
    return node.pair_bytes / node.pair_seconds if node.pair_seconds else None


# ---------------------------------------------------------------- for people


def table(nodes: Sequence[Node], device: str) -> str:
    """What all have in common, then a row for each node."""
    cuda = uses_gpus(nodes, device)
    rows = [["node", "ranks", "GPUs", "clock", *(f"{what} free" for what in _spaces(nodes)), "data", "read", "network"]]
    rows += [
        [
            node.name,
            spans(node.ranks),
            _gpus(node) if cuda else "not asked for",
            f"{round(node.clock * 1e3):+d} ms",
            *(next((f"{space.free / 1e9:.0f} GB" for space in node.spaces if space.what == what), "-") for what in _spaces(nodes)),
            ", ".join(f"{key.removeprefix('data.')} {node.fingerprints[key][:8]}" for key in DATASETS if key in node.fingerprints) or "-",
            f"{rate / 1e6:.0f} MB/s" if (rate := read_rate(node)) is not None else f"{node.read_bytes / 1e6:.1f} MB",
            f"{rate / 1e9:.2f} GB/s" if (rate := pair_rate(node)) is not None else "-",
        ]
        for node in nodes
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([_in_common(nodes), *lines])


def _in_common(nodes: Sequence[Node]) -> str:
    same = [f"{what} {value}" for what, value in nodes[0].versions.items() if all(node.versions.get(what) == value for node in nodes)]
    hashes = {settings_hash(node) for node in nodes}
    return ", ".join([*same, *(f"settings {found}" for found in hashes if len(hashes) == 1)])


def settings_hash(node: Node) -> str:
    return hashlib.sha256(json.dumps(node.settings, sort_keys=True).encode()).hexdigest()[:12]


def _spaces(nodes: Sequence[Node]) -> list[str]:
    return list(dict.fromkeys(space.what for node in nodes for space in node.spaces))


def _gpus(node: Node) -> str:
    if not node.gpus:
        return "none"
    names = Counter(f"{gpu.name} {gpu.memory / 1e9:.0f} GB" for gpu in node.gpus)
    shown = ", ".join(f"{count} x {name}" for name, count in names.items())
    faulty = sum(bool(broken(gpu)) for gpu in node.gpus)
    return f"{shown}, {max(gpu.used for gpu in node.gpus) / 1e9:.1f} GB used at most" + (f", {faulty} broken" if faulty else "")


def spans(numbers: Sequence[int]) -> str:
    """`0-7, 9` for 0 to 7 and 9."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
