"""Parses command lines that mix `key=value` overrides with options: --force-config epochs=3 --steps 0:4 data.flip=0."""

import argparse
import re
from collections.abc import Sequence

_OVERRIDE = re.compile(r"[^\W\d][\w.]*=")


def is_override(word: str) -> bool:
    """Returns whether a word is a `key=value` override, and not a path with an equals sign."""
    return _OVERRIDE.match(word) is not None


def job_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the CONFIG and the overrides of a job's command line, without its options."""
    config, *overrides = [word for word in words if not word.startswith("-")]
    return config, overrides


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line with `overrides` anywhere; argparse alone accepts them only before the first option."""
    args, rest = parser.parse_known_args(arguments)
    if rest and ("overrides" not in args or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args
