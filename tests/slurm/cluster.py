"""Runs a private Slurm cluster on this machine, for tests that need real jobs, requeues and signals.

    with private_cluster(tmp_path) as cluster:
        job = cluster.sbatch(Path("job.sh"), "argument", cwd=tmp_path, options=["--nodes=2"])
        cluster.wait(job, "COMPLETED", timeout=30)
        print(cluster.output(job))

One slurmctld and one slurmd per node run as the current user, with their own configuration, ports and folders below `root`.
A Slurm cluster that this machine belongs to is neither read nor disturbed. Debian's package slurm-wlm (22.05) suffices.

auth/none trusts the user name that a client sends. The daemons listen on loopback only if the machine's name resolves to 127.0.0.1,
otherwise on every interface while the tests run: as root, use it only on machines that nobody else can reach.
"""

import contextlib
import getpass
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # with the folder of the daemons
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}

# auth/none and cred/none need no munge daemon. proctrack/linuxproc and task/none need no cgroups, which a container may lack.
# config_overrides accepts the declared CPUs and memory of a node, so two cores can act as any machine; CR_CPU checks memory at
# submission only. The hosts are called localhost because the machine's name may not resolve. A scheduling delay of 0 starts jobs
# in about 1 s instead of 3. MinJobAge keeps ended jobs for a day, for job() and output(). SlurmdTimeout sets a dead node DOWN after
# 20 to 30 s. Jobs in `urgent` preempt those in `main`, which have GraceTime seconds to end. Clusters side by side use different
# job ids, because launch/job.sh derives a job's port from its id.
CONFIG = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
{listen}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MailProg=/bin/true
MinJobAge=86400
KillWait=3
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
SlurmdTimeout=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


class Cluster:
    def __init__(self, root: Path, nodes: int = 2, cpus: int = 4) -> None:
        self.root = root.resolve()
        # slurmstepd has a socket at root/NODE/NODE_JOB.STEP, whose path may have 107 bytes; slurm.conf can't quote a space.
        if len(os.fsencode(self.root)) > 80 or " " in str(self.root):
            raise ValueError(f"the cluster's folder must have at most 80 characters and no space: {self.root}")
        self.nodes = [f"n{i}" for i in range(nodes)]
        self.cpus = cpus
        self.config = self.root / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen] = {}
        # Tests may themselves run inside a Slurm job, whose settings sbatch and srun would take as defaults.
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        self.env = outside | {"PATH": PATH, "SLURM_CONF": str(self.config)}
        self._guardian: subprocess.Popen | None = None

    def start(self, timeout: float = 30) -> None:
        """Starts the daemons; returns when every node is idle."""
        for folder in (self.root / "state", *(self.root / node for node in self.nodes)):
            folder.mkdir(parents=True)
        port, *node_ports = _free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={node_port} CPUs={self.cpus} RealMemory=1000000"
            for node, node_port in zip(self.nodes, node_ports, strict=True)
        )
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        settings = {"root": self.root, "user": getpass.getuser(), "listen": _listen(), "port": port, "nodes": nodes}
        settings |= {"first_job": 1 + 400 * worker}
        self.config.write_text(CONFIG.format_map(settings))
        # slurmd always loads a cgroup plugin; that of v2 needs systemd, that of v1 does nothing until it is used.
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")

        # Without SLURM_CONF and in a session of its own, so that it outlives everything that it has to end.
        guard = [sys.executable, __file__, str(self.config)]
        self._guardian = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self._daemon(node, "slurmd", "-D", "-N", node)  # -N: one of several on a machine

        deadline = time.monotonic() + timeout
        while (states := self._node_states()) != dict.fromkeys(self.nodes, "idle"):
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"the cluster did not start: ended {dead}, nodes {states}\n{self._log_tails()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends every job, then the daemons, then their remaining processes."""
        controller = self.daemons.get("slurmctld")
        if controller is not None and controller.poll() is None:
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):  # a controller that does not answer is killed below
                self.run("scancel", f"--user={getpass.getuser()}")
                deadline = time.monotonic() + 15  # a task that ignores TERM takes 9 s
                while self.run("squeue", "--noheader") and time.monotonic() < deadline:
                    time.sleep(0.1)
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
        if self._guardian:
            self._guardian.communicate(b"stop\n")
            self._guardian = None
        for daemon in self.daemons.values():
            daemon.wait()
        self.daemons.clear()

    def run(self, *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] = {}) -> str:
        """Runs a Slurm command on this cluster, with `env` added to the environment; returns its output."""
        done = subprocess.run(command, cwd=cwd, env={**self.env, **env}, capture_output=True, text=True, timeout=30)
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stderr}")
        return done.stdout

    def sbatch(self, script: Path, *args: str, cwd: Path, options: Sequence[str] = (), env: Mapping[str, str] = {}) -> int:
        """Submits a job from the folder `cwd`, with `env` added to its environment; returns the job id."""
        return int(self.run("sbatch", "--parsable", *options, script, *args, cwd=cwd, env=env))

    def job(self, job_id: int) -> dict[str, str]:
        """Returns the fields of `scontrol show job`: JobState, Restarts, ExitCode, NodeList, …"""
        line = self.run("scontrol", "--oneliner", "show", "job", str(job_id)).strip()
        return dict(field.split("=", 1) for field in re.split(r" (?=[A-Z][\w/:]*=)", line))

    def wait(self, job_id: int, *states: str, timeout: float) -> str:
        """Waits for one of `states`, by default for the end of the job; returns the state."""
        wanted = set(states) or FINAL_STATES
        deadline = time.monotonic() + timeout
        while (state := self.job(job_id)["JobState"]) not in wanted:
            if state in FINAL_STATES or time.monotonic() > deadline:
                output, queue = self.output(job_id)[-3000:], self.run("squeue")
                message = f"job {job_id} is {state}, waited up to {timeout} s for {sorted(wanted)}"
                raise RuntimeError(f"{message}\n-- output\n{output}\n-- squeue\n{queue}\n{self._log_tails()}")
            time.sleep(0.1)
        return state

    def wait_until_idle(self, timeout: float = 60) -> None:
        """Waits until the nodes have cleaned up after their jobs."""
        deadline = time.monotonic() + timeout
        while (states := self._node_states()) != dict.fromkeys(self.nodes, "idle"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"nodes are not idle after {timeout} s: {states}")
            time.sleep(0.1)

    def output(self, job_id: int) -> str:
        path = Path(self.job(job_id)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def signal(self, job_id: int, name: str, *, batch: bool = False) -> None:
        """Sends a signal to the tasks of the job's steps, or with `batch` only to the shell of the batch script."""
        self.run("scancel", f"--signal={name}", *(["--batch"] if batch else []), str(job_id))

    def skip_requeue_wait(self, job_id: int) -> None:
        """Starts a requeued job now; Slurm keeps it PENDING for two minutes, the lifetime of a credential."""
        self.wait(job_id, "PENDING", timeout=30)
        time.sleep(1.1)  # slurmd refuses a new credential from the second in which it revoked the old one
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def lose(self, node: str) -> None:
        """Kills a node's slurmd but not its tasks. The controller notices after 20 to 30 s, or when a message to the node fails."""
        self.daemons[node].kill()
        self.daemons[node].wait()

    def restore(self, node: str) -> None:
        """Restarts the slurmd of a lost node."""
        self._daemon(node, "slurmd", "-D", "-N", node)

    def _daemon(self, name: str, *command: str) -> None:
        # In a session of its own: Ctrl-C must reach the tests only, which end the jobs while the daemons still run.
        with open(self.root / f"{name}.err", "wb") as err:
            self.daemons[name] = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=err, stderr=err, start_new_session=True
            )

    def _node_states(self) -> dict[str, str]:
        try:
            lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        except (RuntimeError, subprocess.TimeoutExpired):  # the controller is not listening yet
            return {}
        return dict(line.split() for line in lines)

    def _log_tails(self) -> str:
        tails = []
        for name in self.daemons:
            log = self.root / f"{name}.log"
            path = log if log.exists() else log.with_suffix(".err")  # messages before the log was open
            tails.append(f"-- {path.name}\n{path.read_text(errors='replace')[-2000:]}")
        return "\n".join(tails)


@contextlib.contextmanager
def private_cluster(root: Path, nodes: int = 2, cpus: int = 4) -> Iterator[Cluster]:
    cluster = Cluster(root, nodes, cpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def processes(config: Path) -> list[int]:
    """Returns the ids of the cluster's processes: slurmstepd and every task inherit SLURM_CONF from slurmd."""
    mark = f"SLURM_CONF={config}".encode()
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                pids.append(int(folder.name))
    return pids


def _listen() -> str:
    # These parameters bind to the address of the machine's name, so the daemons only start if it is NodeAddr.
    with contextlib.suppress(OSError):
        if socket.gethostbyname(socket.gethostname()) == "127.0.0.1":
            return "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny"
    return ""


def _free_ports(count: int) -> list[int]:
    """Returns free ports below Linux's range for outgoing connections, which could take a port before its daemon does."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            ports += [port] if port not in ports else []
    return ports


def _guard(config: Path) -> None:
    """Waits for a line from the parent process or its end, then kills the remaining processes of the cluster."""
    sys.stdin.readline()
    while pids := processes(config):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    _guard(Path(sys.argv[1]))
