"""Records what is needed to repeat a run: settings, command, commit and versions.

Checkpoints hold a short form. Each start of a run writes a folder RUN/starts/0001, 0002, …:

    config.yaml         the settings
    environment.json    command, commit, time, data, hosts, GPUs, driver, and the relevant environment variables
    diff.patch          changes to tracked files since that commit
    packages.txt        every installed distribution, in the format of pip
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions, version
from pathlib import Path

import torch

from data.common.git import git_commit
from pretrain import config as settings
from pretrain.config import Config
from pretrain.run.position import host_name

PACKAGES = ("torch", "deepspeed", "nvidia-dali-cuda130", "timm", "numpy")
STARTS = "starts"
DIFF_BYTES = 256 << 10  # longer diffs are truncated, because a run may be started hundreds of times
# Environment variables that affect a job, and words in the names of secrets (such as SLURM_JWT).
_RELEVANT = re.compile(
    r"(SLURM|NCCL|CUDA|NVIDIA|OMP|MKL|TORCH|PYTORCH|TRITON|DS|DALI|MASTER|GLOO|UCX|FI|LD)_|RANK|WORLD_SIZE|LOCAL_RANK|PATH$|TMPDIR$"
)
_SECRET = re.compile(r"JWT|TOKEN|KEY|SECRET|PASS|CREDENTIAL")


def provenance() -> dict[str, object]:
    """Returns `command`, as typed after python; `commit`, marked if files have changed since; and `versions`, by package."""
    return {
        "command": f"python -m pretrain {shlex.join(sys.argv[1:])}",
        "commit": git_commit(),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
    }


def record_start(run: Path, config: Config, data: Mapping[str, str], hosts: Sequence[dict[str, str]]) -> None:
    """Writes the folder of this start.

    Args:
        run: the run directory.
        config: of the job.
        data: fingerprints of the data sets, by split.
        hosts: `describe_host` of each rank.
    """
    starts = run / STARTS
    starts.mkdir(exist_ok=True)
    folder = starts / f"{1 + max((int(path.name) for path in starts.iterdir()), default=0):04d}"
    folder.mkdir()
    settings.save(config, folder / "config.yaml")
    environment = {
        **provenance(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "platform": platform.platform(),
        "data": dict(data),
        "ranks": list(hosts),
        "variables": variables(os.environ),
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    (folder / "diff.patch").write_bytes(diff(Path(__file__).parent))
    packages = sorted({f"{package.name}=={package.version}" for package in distributions()}, key=str.lower)
    (folder / "packages.txt").write_text("\n".join(packages) + "\n")


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables that affect a job, without secrets."""
    return {name: value for name, value in sorted(environment.items()) if _RELEVANT.match(name) and not _SECRET.search(name)}


def diff(folder: Path) -> bytes:
    """Returns `git diff HEAD` of the work tree of a folder, truncated with a note after DIFF_BYTES; empty without git."""
    try:
        # Without a user's own colors, tools and prefixes, so that `git apply` accepts the patch.
        command = ["git", "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--src-prefix=a/", "--dst-prefix=b/"]
        patch = subprocess.run(command, cwd=folder, capture_output=True).stdout
    except OSError:  # no git on this machine
        return b""
    note = f"\n# truncated here: {len(patch)} bytes in all\n".encode()
    return patch if len(patch) <= DIFF_BYTES else patch[:DIFF_BYTES] + note


def describe_host(device: torch.device) -> dict[str, str]:
    """Returns the host of this rank, and its GPU and driver."""
    description = {"host": host_name()}
    if device.type == "cuda":
        driver = Path("/sys/module/nvidia/version")
        description["gpu"] = torch.cuda.get_device_name(device)
        description["driver"] = driver.read_text().strip() if driver.exists() else "unknown"
    return description
