"""Which room may import which. Every import counts, also those in functions and for type checkers."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from tests.conftest import REPOSITORY

CODE = ("jobs", "pipeline", "regla", "teachers")
ARROWS = {
    "teachers": "",
    "errors": "teachers",
    "config": "errors",
    "sections": "errors config teachers",
    "runtime": "errors",
    "storage": "errors",
    "imaging": "errors runtime teachers",
    "sources": "errors sections imaging runtime storage",
    "student": "errors teachers",
    "tracking": "errors runtime storage",
    "benchmark": "errors config sections runtime student export",
    "cache.layout": "errors sections teachers imaging runtime sources storage",
    "cache.read": "errors teachers imaging runtime storage cache.layout",
    "cache.fill": "errors sections teachers imaging runtime sources storage tracking cache.layout",
    "cache.maintain": "errors sections teachers imaging runtime storage cache.layout cache.fill",
    "training": "errors sections runtime storage",
    "report": "errors storage",
    "runs": "errors sections report runtime sources storage tracking",
    "evaluate": "errors sections teachers runtime sources storage student tracking runs training "
    "cache.layout cache.fill cache.read",
    "distill": "errors sections teachers imaging runtime storage student tracking report runs training cache.layout cache.fill "
    "cache.read evaluate",
    "downstream": "errors config sections imaging report runtime sources storage student tracking runs training distill",
    "export": "errors runtime student distill downstream",
    "predict": "errors imaging runtime storage student runs downstream",
    "voices": "errors sections teachers imaging runtime sources storage student tracking runs cache.layout cache.fill cache.read "
    "evaluate distill downstream export predict",
    "compare": "errors config sections student tracking report downstream",
    "jobs": "errors config sections teachers runtime student tracking runs benchmark "
    "cache.layout cache.fill cache.maintain distill evaluate downstream export predict voices compare",
    "regla": "errors config sections storage runs predict voices jobs",
}
"""The rooms that each room may import. `sections` are the modules `<room>/config.py`, which any room may have."""


def files() -> Iterator[Path]:
    for package in CODE:
        yield from sorted((REPOSITORY / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in files()}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of the imports of our own modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in within]
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in (*CODE, "tests", "benchmarks"))


def room(module: str) -> str:
    package, *parts = module.split(".")
    if package != "pipeline" or not parts:
        return package
    if parts == ["errors"]:
        return "errors"
    if parts[-1] == "config" and len(parts) > 1:
        return "sections"
    return ".".join(parts[:2]) if parts[0] == "cache" and len(parts) > 1 else parts[0]


def test_imports_follow_the_table():
    wrong = []
    for path in files():
        own = room(module_name(path))
        allowed = {own, *ARROWS.get(own, "").split()}
        where = path.relative_to(REPOSITORY)
        wrong += [f"{where}:{line}: {own} imports {name}" for line, name in imports(path) if room(name) not in allowed]
    assert not wrong, "\n".join(wrong)


def test_every_arrow_of_the_table_is_used():
    used = {(room(module_name(path)), room(name)) for path in files() for _, name in imports(path)}
    assert [
        arrow for own, others in ARROWS.items() for other in others.split() if (arrow := (own, other)) not in used
    ] == []


def test_the_table_has_no_circle():
    graph = {own: set(others.split()) for own, others in ARROWS.items()}
    assert set().union(*graph.values()) <= graph.keys()
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_every_room_is_a_package_in_the_table():
    loose = {path.name for path in (REPOSITORY / "pipeline").glob("*.py")}
    assert loose == {"__init__.py", "errors.py"}
    assert {room(module) for module in MODULES} - {"pipeline", "cache"} == set(ARROWS)
    for package in ("pipeline", "cache"):
        (module,) = (name for name in MODULES if room(name) == package)
        assert not [*imports(REPOSITORY / module.replace(".", "/") / "__init__.py")]


def test_the_tests_mirror_the_tree():
    others = {"docs", "hostile", "cluster", *CODE}
    for folder in (REPOSITORY / "tests").rglob("*/"):
        relative = folder.relative_to(REPOSITORY / "tests")
        if [*folder.glob("*.py")] and relative.parts and relative.parts[0] not in others:
            assert (REPOSITORY / "pipeline" / relative).is_dir(), f"tests/{relative} mirrors no package"
