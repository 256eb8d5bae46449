"""The documents name files, tests, commands and headings that exist."""

import re
from pathlib import Path

import pytest

from tests.support import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
FOLDERS = "benchmarks|configs|data|docs|examples|launch|pretrain|tests"


def exists(path: str) -> bool:
    """Returns whether the repository has such a file or folder; NAME and * are placeholders. Each site has its own site.env."""
    return path == "launch/site.env" or any(REPOSITORY.glob(path.replace("NAME", "*").rstrip("/")))


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_commands_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    files = re.findall(rf"`((?:{FOLDERS})/[\w./*-]+?)(?:::\w+)?`", text)
    modules = re.findall(rf"python -m ((?:{FOLDERS})(?:\.\w+)*)", text)
    scripts = re.findall(r"(?:bash|sbatch) (?:--\S+ )*(launch/\w+\.sh)", text)
    assert [path for path in (*files, *scripts) if not exists(path)] == []
    assert [
        name for name in modules if not exists(f"{name.replace('.', '/')}.py") and not exists(f"{name.replace('.', '/')}/__main__.py")
    ] == []
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert [name for path, name in tests if f"def {name}(" not in (REPOSITORY / path).read_text()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    dead = []
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (heading and heading not in map(slug, re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE))):
            dead.append(f"{target}#{heading}")
    assert dead == []
