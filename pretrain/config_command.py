"""Runs `python -m pretrain config`: lists all settings, shows those of a job, and writes docs/configuration.md."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from data.common.fields import MISSING, Setting, settings_of, to_text
from data.common.text import printable
from pretrain import config as settings
from pretrain.config import Config

INTRODUCTION = """\
# Configuration

This page is written by `make docs`; edit the fields in `pretrain/config.py` and `data/settings.py` instead.

    python -m pretrain config --list [PATTERN]         # the settings whose key or meaning contains PATTERN
    python -m pretrain config CONFIG key=value …       # the settings of a job and the places that set them

## Give settings

A job takes its settings from a YAML file and from `key=value` on the command line. The command line wins.

- `base: FILE` in a YAML file names the file that it builds on, relative to itself. Later values win.
- **Text is taken as typed.** `name=2026_12`, `name=010`, `name=1.10`, `name=1e3` and `name=yes` stay as they are.
  On the command line the value is all that follows the first `=`, quotes included; the shell removes its own.
  In a YAML file YAML's own rules come first: ` #` starts a comment, and quotes around a value are not part of it.
- `null` means no value where the type is *or null*. In a file, so do `~` and an empty value. Text can't be empty.
- Numbers are decimal: `1e-3`, `.5`, `1_000`, and `010` is 10.
- `true`, `yes`, `on` and `1` are true; `false`, `no`, `off` and `0` are false.
- Lists are YAML in both places: `run.export=[timm, hf]`, `optim.betas=[0.9, 0.95]`. Text in a list is taken as typed.
- `model.kwargs` is merged by name: `model.kwargs.drop_rate=0.1` adds to the names that files set.
  Its values have the types that YAML gives them: `0.1` and `1e-3` are numbers, `yes` is true, and `010` is octal.
  Text that looks like these needs quotes there.
- `${key}` is replaced by the value of another setting, and `${oc.env:NAME}` by an environment variable.
  `${oc.env:NAME,VALUE}` gives a default for a variable that is not set. A backslash before `${` makes it text.
  On the command line any other `${…}` is text. In a file it is OmegaConf's interpolation, or an error.
- `???` in a file: another file or the command line must set the value.

## Resume with other settings

A resumed run uses the settings of its new start. The last column shows which of them may differ:

- **free**: may change.
- **asks**: may change with `--force-config`; without it the job ends and lists the changes.
- **fixed**: can't change during a run. Start another run with `run.dir=NEW model.init_from=OLD`.
"""


def listing(pattern: str = "") -> list[str]:
    """Returns two lines for each setting whose key or meaning contains the pattern; ValueError if there is none."""
    lines = []
    for key, each in settings_of(Config).items():
        if pattern.lower() in f"{key} {each.meaning}".lower():
            lines += [f"{key}: {each.allowed}; {_default(each)}; on resume: {each.resume}", f"    {each.meaning}"]
    if not lines:
        raise ValueError(f"no setting has {pattern!r} in its key or meaning")
    return lines


def resolved(path: Path, overrides: Sequence[str]) -> list[str]:
    """Returns the key, value and origin of each setting of a job. Paths need not exist on this machine."""
    config, places = settings.resolve(path, overrides, settings.NODE_PATHS)
    return [f"{key} = {printable(to_text(value))}    ({places[key]})" for key, value in settings.flat(config).items()]


def markdown() -> str:
    """Returns docs/configuration.md."""
    return "\n".join([INTRODUCTION, *_tables()])


def _tables() -> Iterator[str]:
    """Yields the lines of a table per section, the top level first; settings without a default come before the others."""
    by_section = sorted(settings_of(Config).items(), key=lambda item: "." in item[0])
    for section, rows in groupby(by_section, lambda item: item[0].rpartition(".")[0]):
        yield from (f"## {section or 'The job'}", "", "| key | type | default | meaning | on resume |", "|---|---|---|---|---|")
        for key, each in sorted(rows, key=lambda item: item[1].default != MISSING):
            default = "" if each.default == MISSING else f"`{to_text(each.default)}`"
            yield f"| `{key}` | {each.allowed.removeprefix('a ')} | {default} | {each.meaning} | {each.resume} |"
        yield ""


def _default(each: Setting) -> str:
    return "no default" if each.default == MISSING else f"default {to_text(each.default)}"
