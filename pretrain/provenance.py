"""What it takes to repeat a run, beside its settings: the command, the commit and the versions it ran with."""

import shlex
import sys
from importlib.metadata import version

from data.results import commit

PACKAGES = ("torch", "deepspeed", "nvidia-dali-cuda130", "timm", "numpy")


def provenance() -> dict[str, object]:
    """`command`, as typed after python; `commit`, with a mark where files were changed since; `versions` by package."""
    return {
        "command": f"python -m pretrain {shlex.join(sys.argv[1:])}",
        "commit": commit(),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
    }
