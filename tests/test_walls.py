"""The rooms of the package and the walls between them, as the sources keep them: imports are read, nothing is run."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mergequant"
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
# A room may import from rooms on floors below it, not from beside or above it.
FLOORS = [
    {"errors", "assets"},
    {"grids"},
    {"ops"},
    {"nn", "models", "data", "transforms", "solvers"},
    {"runtime"},
    {"checkpoint", "calibration"},
    {"steps"},
    {"recipes"},
    {"pipeline"},
    {"integrations", "eval", "bench"},
    {"comparison"},
    {"__init__"},  # the public face
    {"cli"},
    {"__main__"},
]
# Doors that are opened inside a function only, when a caller asks for what is behind them.
DOORS = {
    ("eval/evaluate.py", "__init__"),
    ("eval/evaluate.py", "integrations"),
    ("pipeline/run.py", "integrations"),
}
SERVING = ("nn", "ops", "grids", "checkpoint", "runtime")  # what a server needs, and what it must never pull in:
MAKING = {"calibration", "solvers", "transforms", "steps", "recipes", "pipeline", "data", "models"}
TENSORS_ONLY = ("transforms", "solvers", "grids", "ops", "runtime")
ROOF = 600


@dataclass(frozen=True)
class Import:
    file: str
    module: str
    inside_function: bool

    @property
    def room(self) -> str | None:
        """Room of the package that is imported from, None for other packages."""
        parts = self.module.split(".")
        return None if parts[0] != "mergequant" else parts[1] if len(parts) > 1 else "__init__"


def room_of(file: Path) -> str:
    return file.parts[0].removesuffix(".py")


def imports_of(file: Path) -> list[Import]:
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend(Import(file.as_posix(), alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}:{child.lineno}: relative import"
                # `from mergequant import ops` names a room; `from mergequant import load` the public face.
                names = [f"mergequant.{a.name}" if is_room(a.name) else "mergequant" for a in child.names]
                modules = names if child.module == "mergequant" else [child.module or ""]
                found.extend(Import(file.as_posix(), module, inside) for module in modules)
            visit(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(ast.parse((SOURCE / file).read_text(encoding="utf-8")), False)
    return found


def is_room(name: str) -> bool:
    return any(name in floor for floor in FLOORS)


def floor_of(room: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if room in floor)


def only_reads_version_of_package(file: Path) -> bool:
    """Whether a file that says `import mergequant` uses nothing of it but what is known before any room is built."""
    tree = ast.parse((SOURCE / file).read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mergequant"
    }
    return used <= {"__version__", "__file__"}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_file_imports_from_floors_below_only(file: Path) -> None:
    room = room_of(file)
    assert is_room(room), f"{room} has no floor yet: give it one in FLOORS"
    for found in imports_of(file):
        if found.room in (None, room) or (found.inside_function and (found.file, found.room) in DOORS):
            continue
        if found.module == "mergequant" and only_reads_version_of_package(file):
            continue
        assert floor_of(found.room) < floor_of(room), f"{file} imports {found.module}, which is not below it"


def test_doors_are_all_in_use() -> None:
    """A door that nobody uses any more is to be walled up."""
    used = {(found.file, found.room) for file in FILES for found in imports_of(file) if found.inside_function}
    assert used >= DOORS


@pytest.mark.parametrize("room", SERVING)
def test_serving_rooms_reach_nothing_that_makes_checkpoints(room: str) -> None:
    reached = {file for file in FILES if room_of(file) == room}
    queue = list(reached)
    while queue:
        for found in imports_of(queue.pop()):
            if found.room is None or found.module == "mergequant":
                continue
            assert found.room not in MAKING, f"{room} reaches {found.module} by way of {found.file}"
            fresh = {file for file in FILES if room_of(file) == found.room} - reached
            reached |= fresh
            queue += fresh


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) in TENSORS_ONLY], ids=str)
def test_building_blocks_never_see_transformers(file: Path) -> None:
    assert not [found.module for found in imports_of(file) if found.module.split(".")[0] == "transformers"]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_file_is_short_enough_to_be_read(file: Path) -> None:
    lines = len((SOURCE / file).read_text(encoding="utf-8").splitlines())
    assert lines <= ROOF, f"{file} has {lines} lines: make it a folder"
