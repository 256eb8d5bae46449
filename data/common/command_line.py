"""Reads command lines on which `key=value` texts stand among options: --force-config epochs=3 --steps 0:4 data.flip=0."""

import argparse
import re
from collections.abc import Sequence

_OVERRIDE = re.compile(r"[^\W\d][\w.]*=")


def is_override(word: str) -> bool:
    """Returns whether a word is `key=value`, not a path that has an equals sign."""
    return _OVERRIDE.match(word) is not None


def job_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the CONFIG and the `key=value` texts of a job's command line, without its options."""
    config, *overrides = [word for word in words if not word.startswith("-")]
    return config, overrides


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line; `overrides` takes words from anywhere, where argparse alone takes those before the first option."""
    args, rest = parser.parse_known_args(arguments)
    if rest and ("overrides" not in args or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args
