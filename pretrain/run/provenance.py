"""What it takes to repeat a run, beside its settings: the command, the commit and the versions it ran with.

Checkpoints hold the short form. RUN/starts/0001, 0002, … hold all of it, a folder for each start of the run:

    config.yaml         the settings
    environment.json    command, commit, time, data, hosts, GPUs, driver, and the environment variables that matter
    diff.patch          what had been changed since that commit, of files that git tracks
    packages.txt        every installed distribution, as pip takes them
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import distributions, version
from pathlib import Path

import torch
import torch.distributed as dist

from data.common.git import git_commit
from pretrain import config as settings
from pretrain.config import Config
from pretrain.engine.distributed import gather_objects
from pretrain.run.place import host

PACKAGES = ("torch", "deepspeed", "nvidia-dali-cuda130", "timm", "numpy")
STARTS = "starts"
DIFF_BYTES = 256 << 10  # of a diff that are kept: a run may be started hundreds of times
# Environment variables that change how a job runs, and words in a name that make one a secret (SLURM_JWT is one).
_MATTER = re.compile(
    r"(SLURM|NCCL|CUDA|NVIDIA|OMP|MKL|TORCH|PYTORCH|TRITON|DS|DALI|MASTER|GLOO|UCX|FI|LD)_|RANK|WORLD_SIZE|LOCAL_RANK|PATH$|TMPDIR$"
)
_SECRET = re.compile(r"JWT|TOKEN|KEY|SECRET|PASS|CREDENTIAL")


def provenance() -> dict[str, object]:
    """`command`, as typed after python; `commit`, with a mark where files were changed since; `versions` by package."""
    return {
        "command": f"python -m pretrain {shlex.join(sys.argv[1:])}",
        "commit": git_commit(),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
    }


def record_start(run: Path, config: Config, data: Mapping[str, str], device: torch.device) -> Path | None:
    """Writes the folder of this start; returns it, or None on ranks other than 0. Collective.

    Args:
        data: fingerprints of the data sets.
    """
    hosts = gather_objects(_host(device))
    if dist.get_rank():
        return None
    starts = run / STARTS
    starts.mkdir(exist_ok=True)
    folder = starts / f"{1 + max((int(path.name) for path in starts.iterdir()), default=0):04d}"
    folder.mkdir()
    settings.save(config, folder / "config.yaml")
    found = {
        **provenance(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "platform": platform.platform(),
        "data": dict(data),
        "ranks": hosts,
        "variables": variables(os.environ),
    }
    (folder / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "diff.patch").write_bytes(diff(Path(__file__).parent))
    packages = sorted({f"{found.name}=={found.version}" for found in distributions()}, key=str.lower)
    (folder / "packages.txt").write_text("\n".join(packages) + "\n")
    return folder


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that matter to a job, without secrets."""
    return {name: value for name, value in sorted(environment.items()) if _MATTER.match(name) and not _SECRET.search(name)}


def diff(folder: Path) -> bytes:
    """`git diff HEAD` of the work tree that a folder lies in, DIFF_BYTES of it at most and a note where that cut it; empty without git."""
    try:
        # Without a user's own colours, tools and prefixes, so that `git apply` takes it.
        command = ["git", "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--src-prefix=a/", "--dst-prefix=b/"]
        found = subprocess.run(command, cwd=folder, capture_output=True).stdout
    except OSError:  # no git on this machine
        return b""
    note = f"\n# cut here: {len(found)} bytes in all\n".encode()
    return found if len(found) <= DIFF_BYTES else found[:DIFF_BYTES] + note


def _host(device: torch.device) -> dict[str, str]:
    """Where this rank runs."""
    found = {"host": host()}
    if device.type == "cuda":
        driver = Path("/sys/module/nvidia/version")
        found |= {"gpu": torch.cuda.get_device_name(device), "driver": driver.read_text().strip() if driver.exists() else "unknown"}
    return found
