"""Inductor's and AOTAutograd's caches on disk: a hit equals its miss, and nothing takes another's.

Every process runs some steps of one linear, in full Inductor over one cache folder, and says of
each whether lpcompile's log called it cached, and a digest of the bits it computed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.fx.traceback import annotate
from torch.utils.checkpoint import checkpoint

import lpcompile
from lpcompile.flow import Leaves
from lpcompile.pipeline import graph_key

STEPS = """
import hashlib, json, logging, sys
import torch
from torch import nn
from torch.fx.traceback import annotate
import lpcompile

lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logger = logging.getLogger("lpcompile")
logger.addHandler(handler)
logger.setLevel(logging.INFO)


class Model(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(32, 32, bias=False))

    def forward(self, x):
        return self.get_submodule(self.name)(x)


class Annotated(Model):
    def forward(self, x):
        with annotate({"lowprec": "bf16"}):
            return super().forward(x)


def step(annotated=False, name="up", recipes={}, own=False, **options):
    torch._dynamo.reset()
    if own:
        row, tensor = lpcompile.Operand("fp8", "row"), lpcompile.Operand("fp8", "tensor")
        recipe = lpcompile.Recipe(lpcompile.Gemm(row, row), None, lpcompile.Gemm(tensor, tensor))
        options.update(recipe=recipe, rules=[lpcompile.Rule("*", recipe)])
    lpcompile.RECIPES.update({n: lpcompile.RECIPES[r] for n, r in recipes.items()})
    torch.manual_seed(0)
    model = (Annotated if annotated else Model)(name).bfloat16()
    x = torch.randn(32, 32).bfloat16().requires_grad_()
    lines.clear()
    model.compile(backend="lowprec", options={"rewrite": "all", **options})
    y = model(x)
    y.backward(torch.randn(32, 32).bfloat16())
    digest = hashlib.sha256()
    for made in (y, x.grad, *(p.grad for p in model.parameters())):
        digest.update(made.detach().view(torch.uint8).numpy().tobytes())
    return lines[-1], digest.hexdigest()  # before it, the warning of a rule that matched nothing


print("STEPS", json.dumps([step(**given) for given in json.loads(sys.argv[1])]))
print("FROM", lpcompile.__file__)
"""


class Step(NamedTuple):
    """The line that lpcompile logged for a graph, and a digest of y, dX and dW."""

    line: str
    bits: str

    @property
    def is_cached(self):
        return self.line.endswith(": from cache")


def run(steps, cache, package=None):
    """The Steps of one process, and the package that it imported."""
    env = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(cache))
    if package is not None:
        env["PYTHONPATH"] = f"{package}:{env['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-c", STEPS, json.dumps(steps)],
        env=env,
        cwd=cache,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    return [Step(*made) for made in json.loads(said["STEPS"])], Path(said["FROM"])


PLAIN = {}
ANNOTATED = {"annotated": True}
TENSORWISE = {"recipe": "fp8_tensorwise"}
RULED = {"rules": [["up", "bf16"]], "name": "up"}
RULED_NOT = {"rules": [["up", "bf16"]], "name": "down"}
OWN = {"own": True}  # Recipe and Rule objects among the options
MINE = {"recipe": "mine", "recipes": {"mine": "fp8_rowwise"}}
MINE_CHANGED = {"recipe": "mine", "recipes": {"mine": "fp8_tensorwise"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def first(folder):
    """The steps of a process that finds an empty cache."""
    return run([PLAIN, RULED, MINE, OWN], folder)[0]


@pytest.fixture(scope="module")
def second(folder, first):
    """The steps of the process after it, by name."""
    names = ("PLAIN", "ANNOTATED", "TENSORWISE", "RULED", "RULED_NOT", "MINE_CHANGED", "OWN")
    steps = [globals()[name] for name in names]
    # The annotation and the recipe are taken away again.
    made, _ = run([*steps, PLAIN, ANNOTATED], folder)
    return dict(zip((*names, "PLAIN again", "ANNOTATED again"), made, strict=True))


@pytest.mark.parametrize("name", ["PLAIN", "RULED", "OWN", "PLAIN again"])
def test_a_hit_says_so_and_equals_its_miss_to_the_bit(first, second, name):
    missed = first[{"PLAIN": 0, "RULED": 1, "OWN": 3}[name.split()[0]]]
    assert not missed.is_cached
    recipe = "fp8_rowwise" if name != "OWN" else "custom"
    assert second[name] == (f"lpcompile: {recipe}: from cache", missed.bits)


@pytest.mark.parametrize("name", ["ANNOTATED", "TENSORWISE", "RULED_NOT", "MINE_CHANGED"])
def test_what_changes_the_choice_misses(second, name):
    assert not second[name].is_cached
    of_bf16 = second["RULED"].bits
    expected = {
        "ANNOTATED": of_bf16,
        "RULED_NOT": second["PLAIN"].bits,
        "MINE_CHANGED": second["TENSORWISE"].bits,
    }
    assert second[name].bits == expected.get(name, second[name].bits)
    assert len({of_bf16, second["PLAIN"].bits, second["TENSORWISE"].bits}) == 3


def test_an_annotated_graph_hits_its_own_entry(second):
    assert second["ANNOTATED again"] == (
        "lpcompile: fp8_rowwise: from cache",
        second["ANNOTATED"].bits,
    )


def test_a_changed_source_misses(first, folder, tmp_path):
    package = Path(lpcompile.__file__).parent
    copied = shutil.copytree(package, tmp_path / "lpcompile")  # a link's target becomes a folder
    with (copied / "passes" / "linear.py").open("a") as source:
        source.write("\n# changed\n")
    (step,), origin = run([PLAIN], folder, package=tmp_path)
    assert origin.is_relative_to(tmp_path)
    assert not step.is_cached
    assert step.bits == first[0].bits


def key(f, *args, **kwargs):
    """The graph key of the one graph that f compiles to."""
    keys = []

    def backend(gm, inputs):
        keys.append(graph_key(gm, Leaves.of(gm, inputs)))
        return gm

    torch._dynamo.reset()
    torch.compile(f, backend=backend, fullgraph=True, **kwargs)(*args)
    (key,) = keys
    return key


def test_an_annotation_in_a_checkpoint_changes_the_key():
    w = torch.nn.Parameter(torch.randn(32, 32))

    def linear(x, note):
        with annotate({"lowprec": note}):
            return F.linear(x, w)

    def f(x, note):
        return checkpoint(linear, x, note, use_reentrant=False)

    x = torch.randn(16, 32)
    assert key(f, x, "bf16") == key(f, x, "bf16")
    assert key(f, x, "bf16") != key(f, x, "fp8_rowwise")


def test_the_hint_of_a_symbolic_size_changes_the_key():
    linear = torch.nn.Linear(32, 32)
    small, large = torch.randn(16, 32), torch.randn(4096, 32)
    assert key(linear, small, dynamic=True) == key(linear, small, dynamic=True)
    assert key(linear, small, dynamic=True) != key(linear, large, dynamic=True)
