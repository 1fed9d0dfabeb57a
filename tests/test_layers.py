"""A module imports only from lower layers or from its own, in which no two import each other."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = [  # from the bottom up; a folder is one unit
    "errors formats",
    "recipes cost options",
    "ops",
    "gemm gemm_grouped quantized sharded "
    "graph ahead flow cones fusion gathers lanes joins ends lift saved liveness sites structure "
    "select placement peak draws report source dumps verify",
    "functional grouped experts passes lowerings",
    "pipeline",
    "backend explain api convert switch",
    "bench doctor __main__",
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units.split()}


def unit_of(path):
    """The module of a file in lpcompile/, or the package of one in a folder."""
    parts = path.relative_to(ROOT).parts
    return parts[1].removesuffix(".py") if parts[0] == "lpcompile" else parts[0]


def imported(source):
    """The units that a source file imports; inside a function too."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (n.split(".")[1] for n in names if n.startswith("lpcompile."))


def graph():
    """What every unit imports; the package's own __init__ is above all."""
    made = {}
    for top in ("lpcompile", "passes", "lowerings"):
        for path in (ROOT / top).rglob("*.py"):
            unit = unit_of(path)
            if unit not in ("__init__", "passes", "lowerings") or top != "lpcompile":
                made.setdefault(unit, set()).update(set(imported(path.read_text())) - {unit})
    return made


def test_every_module_has_a_layer():
    assert set(graph()) == set(LEVEL)


def test_a_module_imports_from_no_higher_layer():
    upward = {(a, b) for a, uses in graph().items() for b in uses if LEVEL[b] > LEVEL[a]}
    assert upward == set()


def test_modules_of_a_layer_do_not_import_each_other_in_a_circle():
    order = list(TopologicalSorter(graph()).static_order())  # CycleError names a circle
    assert order.index("errors") < order.index("recipes") < order.index("backend")


def test_passes_and_lowerings_know_nothing_of_each_other():
    assert "lowerings" not in graph()["passes"]
    assert "passes" not in graph()["lowerings"]
