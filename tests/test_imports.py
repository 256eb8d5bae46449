"""The structure of the code: imports point one way between packages and rooms, and files and functions stay short."""

import ast
from pathlib import Path

from tests.support import REPOSITORY

# Packages, and the rooms (folders and modules) of data and pretrain. Each may import itself and those before it in this list.
ORDER = (
    *(
        f"data.{room}"
        for room in ["common", "storage", "dataset", "settings", "augment", "loader", "packing", "synthetic", "inspect", "__main__"]
    ),
    *(f"pretrain.{room}" for room in ["model.formats", "loss", "config", "schedule", "config_command", "model", "run", "engine"]),
    *(f"pretrain.{room}" for room in ["checkpoint", "weights", "monitor", "evaluation", "train", "__main__"]),
    "launch",
    "benchmarks",
    "examples",
    "tests",
)
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 80


def source_files(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (REPOSITORY / package).rglob("*.py"))


def room_of(module: str) -> str | None:
    """Returns the entry of ORDER to which a dotted name belongs; None for other libraries and for data and pretrain themselves."""
    return next((room for room in ORDER if f"{module}.".startswith(f"{room}.")), None)


def imported_modules(path: Path) -> set[tuple[int, str]]:
    """Returns line and dotted name of every import in a file, also of those within functions."""
    imports = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imports |= {(node.lineno, name.name) for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imports |= {(node.lineno, f"{node.module}.{name.name}") for name in node.names}
    return imports


def test_imports_point_one_way() -> None:
    backward = []
    for path in source_files("data", "pretrain", "launch", "benchmarks", "examples"):
        file = str(path.relative_to(REPOSITORY))
        room = room_of(file.removesuffix(".py").replace("/", "."))
        for line, module in sorted(imported_modules(path)):
            target = room_of(module)
            if room and target and ORDER.index(target) > ORDER.index(room):
                backward.append(f"{file}:{line} imports {module}")
    assert not backward, "imports against ORDER:\n" + "\n".join(backward)


def test_every_room_has_a_place_in_the_order() -> None:
    for package in ("data", "pretrain"):
        modules = [path.relative_to(REPOSITORY).parts[1].removesuffix(".py") for path in source_files(package)]
        assert {f"{package}.{room}" for room in modules} - {f"{package}.__init__"} <= set(ORDER)


def test_files_and_functions_are_short() -> None:
    long = set()
    for path in source_files("data", "pretrain", "launch", "benchmarks", "examples"):
        file, source = path.relative_to(REPOSITORY), path.read_text()
        if len(source.splitlines()) > MAX_FILE_LINES:
            long.add(str(file))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES:
                long.add(f"{file}: {node.name}")
    assert not long, f"longer than {MAX_FILE_LINES} lines a file, {MAX_FUNCTION_LINES} lines a function"
