"""A private Slurm cluster on this machine, for tests that need real jobs, requeues and signals.

    with private_cluster(tmp_path) as cluster:
        job = cluster.sbatch("job.sh", "argument", cwd=tmp_path, options=["--nodes=2"])
        cluster.wait(job, "COMPLETED", timeout=30)
        print(cluster.output(job))

One slurmctld and one slurmd per node run as the current user, root or not, with their own configuration, ports and folders below `root`;
a Slurm that is already installed and configured here is neither read nor disturbed. Debian's package slurm-wlm (22.05) has all it takes.

auth/none believes whatever user a client says it is. The daemons listen on loopback alone where the machine's own name means 127.0.0.1;
elsewhere they listen on every interface while the tests run, so as root start this only where others can't reach the machine.
"""

import contextlib
import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # the daemons' folder, which ordinary users don't search
FINAL_STATES = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
}

# auth/none and cred/none do without a munge daemon. proctrack/linuxproc and task/none do without cgroups, which a container may not
# have. config_overrides takes a node's declared CPUs and memory for true, so two cores can play any machine; CR_CPU alone means memory is
# checked when a job is submitted and then not counted. Jobs are remembered for a day so that job() and output() work after the end.
# SlurmdTimeout is when a silent node is DOWN (pings go out every third of it). No mail program: none is installed, none is wanted.
CONFIG = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
CommunicationParameters={communication}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
JobRequeue=1
MinJobAge=86400
KillWait=3
ReturnToService=2
SlurmdTimeout=20
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    programs = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
    return [name for name in programs if shutil.which(name, path=PATH) is None]


class Cluster:
    """`root` must be short: slurmstepd keeps a socket at root/NODE/NODE_JOB.STEP, and a socket's path has at most 107 characters."""

    def __init__(self, root: Path, nodes: int = 2, cpus: int = 4) -> None:
        self.root = root.resolve()
        self.nodes = [f"n{i}" for i in range(nodes)]
        self.cpus = cpus
        self.config = self.root / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen] = {}
        # Tests may themselves run inside a Slurm job, whose settings sbatch and srun would take as defaults.
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        self.env = outside | {"PATH": PATH, "SLURM_CONF": str(self.config)}
        self._guardian: subprocess.Popen | None = None

    def start(self, timeout: float = 30) -> None:
        """Returns when every node is idle."""
        for folder in (self.root / "state", *(self.root / node for node in self.nodes)):
            folder.mkdir(parents=True)
        controller_port, *node_ports = _free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} RealMemory=1000000"
            for node, port in zip(self.nodes, node_ports, strict=True)
        )
        self.config.write_text(
            CONFIG.format(
                controller_port=controller_port,
                user=getpass.getuser(),
                communication=_communication(),
                root=self.root,
                nodes=nodes,
            )
        )
        # slurmd loads a cgroup plugin whatever the other settings; the one for v2 asks systemd for a scope and fails without it.
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")

        # It is given neither SLURM_CONF nor the terminal's signals, so that it outlives everything that it has to end.
        self._guardian = subprocess.Popen(
            [sys.executable, __file__, self.config], stdin=subprocess.PIPE, start_new_session=True
        )
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self._daemon(node, "slurmd", "-D", "-N", node)

        deadline = time.monotonic() + timeout
        while (states := self._node_states()) != dict.fromkeys(self.nodes, "idle"):
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"the cluster did not start: ended {dead}, nodes {states}\n{self._log_tails()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends every job, then the daemons, then whatever is left of them."""
        controller = self.daemons.get("slurmctld")
        if controller is not None and controller.poll() is None:
            with contextlib.suppress(subprocess.SubprocessError):  # a cluster that no longer answers is killed below
                if jobs := self.run("squeue", "--noheader", "--format=%A").split():
                    self.run("scancel", *jobs)
                deadline = time.monotonic() + 10
                while self.run("squeue", "--noheader") and time.monotonic() < deadline:
                    time.sleep(0.1)
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
        if self._guardian is not None:
            self._guardian.communicate()
            self._guardian = None
        for daemon in self.daemons.values():
            daemon.wait()
        self.daemons.clear()

    def run(self, *command: str | Path) -> str:
        """Runs one of Slurm's commands on this cluster and returns what it printed."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=30)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def sbatch(
        self, script: str | Path, *args: str, cwd: Path, options: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> int:
        """Submits from the folder `cwd`, with `env` added to the job's environment, and returns the job id."""
        command = ["sbatch", "--parsable", *options, script, *args]
        done = subprocess.run(command, cwd=cwd, env=self.env | dict(env or {}), capture_output=True, text=True, timeout=30)
        if done.returncode:
            raise RuntimeError(f"sbatch failed: {done.stderr}")
        return int(done.stdout)

    def job(self, job_id: int) -> dict[str, str]:
        """What `scontrol show job` says, by its names (JobState, Restarts, ExitCode, NodeList, ...)."""
        line = self.run("scontrol", "--oneliner", "show", "job", str(job_id)).strip()
        return dict(field.split("=", 1) for field in re.split(r" (?=[A-Z][\w/:]*=)", line))

    def wait(self, job_id: int, *states: str, timeout: float) -> str:
        """Waits for one of `states`, or with none given for the end of the job, and returns the state reached."""
        wanted = set(states) or FINAL_STATES
        deadline = time.monotonic() + timeout
        while (state := self.job(job_id)["JobState"]) not in wanted:
            if state in FINAL_STATES:
                raise RuntimeError(f"job {job_id} ended as {state} on the way to {sorted(wanted)}\n{self._report(job_id)}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} is {state}, not {sorted(wanted)}, after {timeout} s\n{self._report(job_id)}")
            time.sleep(0.1)
        return state

    def output(self, job_id: int) -> str:
        path = Path(self.job(job_id)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def signal(self, job_id: int, name: str, *, batch: bool = False) -> None:
        """Sends a signal to the tasks of the job's steps, or with `batch` to the batch script's shell alone."""
        self.run("scancel", f"--signal={name}", *(["--batch"] if batch else []), str(job_id))

    def skip_requeue_wait(self, job_id: int) -> None:
        """Lets a job that waits in the queue after a requeue start now; Slurm holds it back for the two minutes a credential lives."""
        self.wait(job_id, "PENDING", timeout=30)
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def _daemon(self, name: str, *command: str) -> None:
        # In a session of its own: Ctrl-C must reach the tests alone, which then end the jobs while the daemons still can.
        with open(self.root / f"{name}.err", "wb") as errors:
            program = shutil.which(command[0], path=PATH)
            self.daemons[name] = subprocess.Popen(
                [program, *command[1:]],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )

    def _node_states(self) -> dict[str, str]:
        try:
            lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        except subprocess.SubprocessError:  # the controller isn't listening yet
            return {}
        return dict(line.split() for line in lines)

    def _report(self, job_id: int) -> str:
        return f"-- output of job {job_id}\n{self.output(job_id)[-3000:]}\n-- squeue\n{self.run('squeue')}\n{self._log_tails()}"

    def _log_tails(self) -> str:
        # The .err file holds what a daemon says before it has read where its log goes.
        files = [
            path for name in self.daemons for path in (self.root / f"{name}.log", self.root / f"{name}.err") if path.exists()
        ]
        return "\n".join(f"-- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in files)


@contextlib.contextmanager
def private_cluster(root: Path, nodes: int = 2, cpus: int = 4) -> Iterator[Cluster]:
    cluster = Cluster(root, nodes, cpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def processes(config: Path) -> list[int]:
    """Ids of the processes that belong to the cluster: slurmd hands its SLURM_CONF on to slurmstepd and to every task."""
    mark = f"SLURM_CONF={config}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def _communication() -> str:
    try:
        on_loopback = socket.gethostbyname(socket.gethostname()) == "127.0.0.1"
    except OSError:
        on_loopback = False
    # These make everything bind to the address of the machine's own name, so nothing starts if it has none or if that isn't NodeAddr.
    return "NoCtldInAddrAny,NoInAddrAny" if on_loopback else ""


def _free_ports(count: int) -> list[int]:
    """Ports below Linux's range for outgoing connections, one of which could otherwise take a port before its daemon does."""
    ports: list[int] = []
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports between 20000 and 32000")


def _guard(config: Path) -> None:
    """Waits until its parent closes the pipe or dies, however that happens, and kills what is left of the cluster."""
    sys.stdin.read()
    while found := processes(config):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    _guard(Path(sys.argv[1]))
