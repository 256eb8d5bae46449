"""Checks in half a minute, before a job starts, whether its nodes can run it.

    python -m launch.preflight CONFIG [--force-config] key=value …         this machine
    bash launch/job.sh preflight CONFIG [--force-config] key=value …       the nodes of a Slurm allocation

launch/job.sh runs it before each start of a job, in two steps: one task on each node inspects the node (node.py, gpus.py); if all
nodes are fit, all ranks import torch and time the network (network.py). A reader of each step,

    srun … -m launch.preflight.step nodes|network CONFIG … | python -m launch.preflight --step nodes|network CONFIG …

shows the reports of the tasks and names the unfit nodes (verdict.py). Exit codes:

    0   fit, perhaps with warnings
    2   settings, data or software are wrong on all nodes; all detected problems are listed
    3   some nodes are unfit, and named here and in events for launch/supervisor.py; or all nodes fail, and none is named
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.common.command_line import parse
from data.common.text import format_table
from launch.preflight.node import Inspection, Node, read_settings
from launch.preflight.verdict import Task, Verdict, exchange_rates, judge_network, judge_nodes, judge_tasks, node_table
from pretrain.config import Config, ConfigError
from pretrain.run.events import EventReader, emit_event, is_event
from pretrain.run.exit_codes import EXIT_CONFIG, EXIT_UNFIT
from pretrain.run.position import host_name


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.preflight", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--force-config", action="store_true", help="as for training: resume a run with changed settings")
    parser.add_argument("--step", choices=["nodes", "network"], help="judge the output of this step of srun, read from stdin")
    args = parse(parser, arguments)
    if args.step:  # read to the end in any case: srun must not lose the reader of its output
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        tasks, code = read_tasks(sys.stdin)
    ranks = int(os.environ.get("RANKS", 1))
    try:
        config, problems = read_settings(args.config, args.overrides, ranks)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    if not args.step:
        node = Inspection(host_name(), config, problems, args.force_config).run(0, 1, lambda doing: None)
        verdict = report_nodes([node], 1, ranks, config)
    elif code == 128 + signal.SIGUSR1:  # a stop request that killed a task without a handler
        return code
    else:
        verdict = judge_step(args.step, tasks, ranks, config)
    show_verdict(verdict, args.step)
    return verdict.code


def judge_step(step: str, tasks: Sequence[Task], ranks: int, config: Config) -> Verdict:
    """Prints the results of a step, "nodes" or "network"; returns the verdict on the nodes of the job."""
    nodes = os.environ["NODES"].split()
    per_node = ranks // len(nodes)
    if step == "nodes":
        verdict = judge_tasks(tasks, nodes, 1, collective=False)
        inspected = [Node.from_json(task.result) for task in tasks if task.result]
        verdict.add(report_nodes(inspected, len(nodes), per_node, config))
        return verdict
    verdict = judge_tasks(tasks, nodes, per_node, collective=True)
    return verdict if verdict.code else report_network(tasks)


def read_tasks(lines: Iterable[str]) -> tuple[list[Task], int]:
    """Reads a step's output and prints all but its events; returns the tasks by rank, and srun's exit code."""
    reader, tasks, code = EventReader(), dict[int, Task](), 0
    for line in lines:
        if not is_event(line):
            print(line, end="", flush=True)
            continue
        event = reader.read(line)
        if event is None:
            continue
        if event.kind == "step":
            code = event.values["code"]
            continue
        task = tasks.setdefault(event.values["rank"], Task(event.values["rank"], event.values["host"]))
        if event.kind == "doing":
            task.doing, task.steps = event.values["doing"], task.steps + 1
        elif event.kind == "failed":
            task.error = event.values["error"]
        else:
            task.result = event.values["result"]
    return [tasks[rank] for rank in sorted(tasks)], code


def report_nodes(nodes: Sequence[Node], expected: int, per_node: int, config: Config) -> Verdict:
    """Prints a table of the inspected nodes; returns the verdict on them."""
    print(f"preflight: {len(nodes)} of {expected} nodes inspected, for {per_node} ranks on each", flush=True)
    if not nodes:
        return Verdict()
    print(node_table(nodes, config.engine.device), flush=True)
    return judge_nodes(nodes, config.engine.device, per_node)


def report_network(tasks: Sequence[Task]) -> Verdict:
    """Prints the network's times; returns the verdict on them."""
    rates = exchange_rates(tasks)
    if rates:
        print(format_table([["node", "network"], *([name, f"{rate / 1e9:.2f} GB/s"] for name, rate in rates.items())], left=[0]))
    results = [task.result for task in tasks if task.result]
    size, seconds = results[0]["bytes"], max(result["all_reduce_s"] for result in results)
    print(f"all-reduce of {size / 1e6:.0f} MB over {len(tasks)} ranks: {seconds * 1e3:.3g} ms", flush=True)
    return judge_network(rates)


def show_verdict(verdict: Verdict, step: str | None) -> None:
    """Prints the verdict and emits an event for each unfit node."""
    for warning in verdict.warnings:
        print(f"warning: {warning}", flush=True)
    reasons = [f"{name}: {text}" for name, texts in verdict.unfit.items() for text in texts]
    for text in [*verdict.settings, *verdict.unattributed, *reasons]:
        print(f"error: {text}", file=sys.stderr, flush=True)
    if verdict.code == EXIT_UNFIT:
        for name, texts in verdict.unfit.items():
            emit_event("node", host=name, reason="; ".join(texts))
    names = f": {', '.join(verdict.unfit)}" if verdict.code == EXIT_UNFIT and verdict.unfit else ""
    conclusion = {0: "fit", EXIT_CONFIG: "settings, data or software are wrong", EXIT_UNFIT: "unfit"}[verdict.code]
    print(f"preflight of the {step}: {conclusion}{names}" if step else f"preflight: {conclusion}{names}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
