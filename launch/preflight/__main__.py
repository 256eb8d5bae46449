"""Whether a job can work on these nodes, before it starts: half a minute instead of hours in a queue.

    python -m launch.preflight CONFIG [--force-config] key=value …                          this machine
    srun --nodes=2 --ntasks-per-node=1 .venv/bin/python -m launch.preflight CONFIG …        the nodes of an allocation

As a Slurm step of the shape of the job (one task a GPU) it is what launch/job.sh runs before each start. It shows a row for each node
and then its verdict, which is also the exit code of every rank:

    0   fit; there may be warnings
    2   settings, data or software can't work; all problems that could be found are named
    3   nodes are unfit, and named, also to the batch script (attempts.py); or all fail together on the network, and none is named

Rank 0 leads (roll_call.py). The first rank of each node looks at it (nodes.py, gpus.py); when nothing is wrong all ranks import torch
and time the network (network.py). verdict.py judges. Every wait is bounded, so a node that hangs is named.
"""

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.common.command_line import parse
from launch.__main__ import free_port, slurm_rank
from launch.preflight.nodes import DATASETS, Here, Node, Problem
from launch.preflight.roll_call import Lead, Task, follow
from launch.preflight.verdict import Verdict, judge, judge_absent, judge_silent, table, uses_gpus
from launch.task import HEARD_S
from pretrain import config as settings
from pretrain.config import Config, ConfigError
from pretrain.run import attempts
from pretrain.run.exit_codes import EXIT_CONFIG, EXIT_UNFIT
from pretrain.run.position import host_name

PATIENCE = 20.0  # seconds without a sign of a rank
IMPORT_PATIENCE = 60.0  # seconds; a cold file system takes its time to give all of torch
NAMED_SHARDS = 5  # damaged ones that all nodes look at
_WHY_LENGTH = 140  # characters: the batch script's lines must stay below 1,000 bytes, and JSON may take six for one
# What rank 0 asks for, in words for when a rank gives no answer.
LOOK, RECHECK, IMPORT, MEET = "looking at its node", "looking at damaged shards", "importing torch", "timing the network"


@dataclass(frozen=True)
class Position:
    """Which rank this is, and where rank 0 listens."""

    rank: int
    ranks: int
    local_rank: int
    node: str
    address: str
    port: int


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.preflight", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--force-config", action="store_true", help="as for training: a run may go on though its settings have changed")
    args = parse(parser, arguments)
    position = find_position(os.environ)
    try:
        config, problems = read_settings(args.config, args.overrides, position.ranks)
    except ConfigError as error:  # all ranks read the same
        if position.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    tasks = Rank(position, Here(position.node, config, problems, args.force_config)).tasks()
    hello = {"rank": position.rank, "node": position.node}
    try:
        if position.rank > 0:
            return follow((position.address, position.port), hello, tasks, PATIENCE)
        with Lead(position.port, position.ranks, PATIENCE) as lead:
            threading.Thread(target=_follow_itself, args=(lead.port, hello, tasks), daemon=True).start()
            code = conduct(lead, config)
            lead.end(code)
            return code
    except OSError as error:
        print(f"error on rank {position.rank} on {position.node}: {error}", file=sys.stderr, flush=True)
        return EXIT_UNFIT


def read_settings(path: Path, overrides: Sequence[str], ranks: int) -> tuple[Config, list[str]]:
    """The settings, and what is wrong with them for all that this node can see; other nodes may see more.

    Raises ConfigError for what is wrong wherever it is read, naming all that is.
    """
    problems: list[str] = []
    try:
        config = settings.load(path, overrides)
    except ConfigError as error:
        problems = error.problems
        if not all(problem.partition(" ")[0] in settings.ON_A_NODE for problem in problems):
            raise
        config = settings.load(path, overrides, unchecked=settings.ON_A_NODE)
    try:
        settings.accumulation(config, ranks)
    except ConfigError as error:
        raise ConfigError(str(path), error.problems + problems) if problems else error from None
    return config, problems


# ---------------------------------------------------------------- who and where


def find_position(environment: Mapping[str, str]) -> Position:
    """Of a task of a Slurm step, of a rank of torch.distributed, or of a process that is alone."""
    known = dict(environment)
    node = host_name(known)
    if "SLURM_PROCID" in known and "SLURM_STEP_ID" in known:
        known |= slurm_rank(known)
        if "MASTER_ADDR" not in known:
            known |= _address_of_step(known)
    if "RANK" not in known:
        return Position(0, 1, 0, node, "127.0.0.1", 0)
    rank, ranks, local_rank = (int(known[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Position(rank, ranks, local_rank, node, known["MASTER_ADDR"], int(known["MASTER_PORT"]))


def _address_of_step(known: Mapping[str, str]) -> dict[str, str]:
    """Where there is no job script that says it: the first node's address as Slurm itself reaches it, and a port of this job's own."""
    shown = subprocess.run(["scontrol", "show", "node", step_nodes(known)[0], "--oneliner"], capture_output=True, text=True, check=True)
    found = re.search(r"NodeAddr=(\S+)", shown.stdout)
    assert found is not None, shown.stdout
    return {"MASTER_ADDR": found[1], "MASTER_PORT": str(10000 + int(known["SLURM_JOB_ID"]) % 20000)}


def step_nodes(known: Mapping[str, str]) -> list[str]:
    listed = subprocess.run(["scontrol", "show", "hostnames", known["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True)
    return listed.stdout.split()


def tasks_per_node(known: Mapping[str, str]) -> dict[str, int]:
    """How many ranks each node of the step should have; empty outside of Slurm."""
    if "SLURM_STEP_NODELIST" not in known:
        return {}
    return dict(zip(step_nodes(known), counts(known["SLURM_STEP_TASKS_PER_NODE"]), strict=True))


def counts(text: str) -> list[int]:
    """[8, 8, 4] of Slurm's `8(x2),4`."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(number) for number, times in found for _ in range(int(times or 1))]


# ---------------------------------------------------------------- every rank


@dataclass(frozen=True)
class Rank:
    """What rank 0 may ask of a rank."""

    position: Position
    here: Here

    def tasks(self) -> dict[str, Task]:
        return {LOOK: self.look, RECHECK: self.recheck, IMPORT: self.import_torch, MEET: self.meet}

    def look(self, message: dict[str, Any], doing: Callable[[str], None]) -> dict[str, Any]:
        return self.here.look(message["number"], message["nodes"], doing).to_json()

    def recheck(self, message: dict[str, Any], doing: Callable[[str], None]) -> list[list[str]]:
        return [[problem.about, problem.text] for problem in self.here.recheck(message["shards"])]

    def import_torch(self, message: dict[str, Any], doing: Callable[[str], None]) -> None:
        import launch.preflight.network  # noqa: F401

    def meet(self, message: dict[str, Any], doing: Callable[[str], None]) -> dict[str, Any]:
        from launch.preflight.network import BYTES, Meeting, measure

        position, device = self.position, message["device"]
        meeting = Meeting(position.rank, position.ranks, message["firsts"], device, position.local_rank, position.address, message["port"])
        reduced, exchanged = measure(meeting, doing)
        return {"bytes": BYTES[device], "reduced": reduced, "exchanged": list(exchanged.items())}


def _follow_itself(port: int, hello: dict[str, Any], tasks: Mapping[str, Task]) -> None:
    with suppress(OSError):  # the lead has said why
        follow(("127.0.0.1", port), hello, tasks, PATIENCE)


# ---------------------------------------------------------------- rank 0


def conduct(lead: Lead, config: Config) -> int:
    """Asks, shows and judges; returns the exit code."""
    absent = lead.call()
    ranks: dict[str, list[int]] = {}
    for rank, line in sorted(lead.lines.items()):
        ranks.setdefault(line.hello["node"], []).append(rank)
    came = f"{len(lead.lines)} of {lead.ranks}" if absent else str(lead.ranks)
    print(f"preflight: {came} rank{'s' * (lead.ranks > 1)} on {len(ranks)} node{'s' * (len(ranks) > 1)}", flush=True)
    verdict = Verdict()
    if absent:
        present = {name: len(its) for name, its in ranks.items()}
        verdict.add(judge_absent(absent, present, tasks_per_node(os.environ), PATIENCE))
    nodes = look(lead, ranks, verdict)
    reduced = ""
    if nodes:
        verdict.add(judge(nodes, config.engine.device))
        if verdict.code == 0:
            reduced = meet(lead, nodes, config.engine.device, verdict)
        print(table(nodes, config.engine.device), flush=True)
    show(verdict, reduced)
    return verdict.code


def look(lead: Lead, ranks: Mapping[str, Sequence[int]], verdict: Verdict) -> list[Node]:
    """What each node has found, those left out that did not answer."""
    firsts = {its[0]: name for name, its in ranks.items()}
    questions = {first: {"task": LOOK, "number": number, "nodes": len(ranks)} for number, first in enumerate(firsts)}
    answers, silent = lead.ask(questions, PATIENCE)
    verdict.add(judge_silent(silent, [Node(name, list(its)) for name, its in ranks.items()]))
    nodes = {first: Node.from_json({**answers[first], "ranks": list(ranks[name])}) for first, name in firsts.items() if first in answers}
    suspects = {key: sorted({shard for node in nodes.values() for shard in node.suspects.get(key, [])}) for key in DATASETS}
    if any(suspects.values()):
        named = {key: shards[:NAMED_SHARDS] for key, shards in suspects.items()}
        answers, silent = lead.ask({first: {"task": RECHECK, "shards": named} for first in nodes}, PATIENCE)
        verdict.add(judge_silent(silent, list(nodes.values())))
        for first, problems in answers.items():
            nodes[first].problems += [Problem(*problem) for problem in problems]
        verdict.warnings += [
            f"{key}: {len(shards)} shards look damaged, the first {NAMED_SHARDS} are looked at by all nodes"
            for key, shards in suspects.items()
            if len(shards) > NAMED_SHARDS
        ]
    for first, node in nodes.items():
        node.clock = lead.clock(first) or 0.0
    return list(nodes.values())


def meet(lead: Lead, nodes: Sequence[Node], device: str, verdict: Verdict) -> str:
    """Times the network; returns a line about all ranks together."""
    _, silent = lead.ask({rank: {"task": IMPORT} for rank in lead.lines}, IMPORT_PATIENCE)
    if not silent:
        message = {
            "task": MEET,
            "device": "cuda" if uses_gpus(nodes, device) else "cpu",
            "firsts": [node.ranks[0] for node in nodes],
            "port": free_port(),
        }
        answers, silent = lead.ask(dict.fromkeys(lead.lines, message), PATIENCE)
    verdict.add(judge_silent(silent, nodes))
    if silent:
        return ""
    exchanged = {rank: dict(answer["exchanged"]) for rank, answer in answers.items()}
    for node in nodes:
        own = node.ranks[0]
        times = [max(seconds, exchanged[peer][own]) for peer, seconds in exchanged[own].items()]  # of a pair, the later one's
        node.pair_bytes, node.pair_seconds = answers[own]["bytes"], min(times, default=0.0)
    verdict.warnings = judge(nodes, device).warnings  # again, with what is now known
    slowest = max(answer["reduced"] for answer in answers.values())
    return f"all-reduce of {answers[0]['bytes'] / 1e6:.0f} MB over {lead.ranks} ranks: {slowest * 1e3:.3g} ms" if lead.ranks > 1 else ""


def show(verdict: Verdict, reduced: str) -> None:
    """Tells people, and the batch script."""
    if reduced:
        print(reduced)
    for warning in verdict.warnings:
        print(f"warning: {warning}")
    sys.stdout.flush()
    for text in [*verdict.settings, *verdict.nameless, *(f"{name}: {text}" for name, texts in verdict.unfit.items() for text in texts)]:
        print(f"error: {text}", file=sys.stderr, flush=True)
    if verdict.code == EXIT_UNFIT:
        for name, texts in verdict.unfit.items():
            attempts.tell("node", host=name, why="; ".join(texts)[:_WHY_LENGTH])
    conclusion = {0: "fit", EXIT_CONFIG: "settings, data or software can't work", EXIT_UNFIT: "unfit"}[verdict.code]
    print(f"preflight: {conclusion}{': ' + ', '.join(verdict.unfit) if verdict.code == EXIT_UNFIT and verdict.unfit else ''}", flush=True)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    if code and "SLURM_STEP_ID" in os.environ:
        time.sleep(HEARD_S)
    os._exit(code)  # past whatever still hangs
