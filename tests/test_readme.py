"""What README.md says, run: each Python block trains narrowed GEMMs, or says what they become."""

import logging
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lpcompile
from lpcompile import RECIPES
from lpcompile.recipes import ALIASES, get_recipe

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TRAINING = [b for b in BLOCKS if "backward()" in b]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(128, 128, bias=False)
        self.w2 = nn.Linear(128, 128, bias=False)

    def forward(self, x):
        return x + self.w2(torch.relu(self.w1(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def eager():
    lpcompile.set_defaults(codegen="eager", rewrite="all")
    yield
    lpcompile.set_defaults()


def run(block, monkeypatch):
    """What a block defines, in a session that has a model, its input, torch and lpcompile."""
    set_defaults = lpcompile.set_defaults
    monkeypatch.setattr(
        lpcompile, "set_defaults", lambda **o: set_defaults(codegen="eager", rewrite="all", **o)
    )
    x = torch.randn(2, 128, 128, dtype=torch.bfloat16)
    names = {"model": Model().bfloat16(), "x": x, "torch": torch, "lpcompile": lpcompile}
    exec(block, names)
    return names


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("block", TRAINING, ids=range(len(TRAINING)))
def test_a_block_that_trains_is_narrowed(block, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, logger="lpcompile"):
        names = run(block, monkeypatch)
    narrowed = [r.message for r in caplog.records if "GEMMs narrowed" in r.message]
    assert narrowed
    assert any(not m.split(": ")[2].startswith("0 of") for m in narrowed)
    given = [v for v in names.values() if isinstance(v, nn.Parameter)]
    leaves = given or list(names["model"].parameters())
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)


def test_the_block_that_converts_narrows_every_linear(monkeypatch):
    names = run(next(b for b in BLOCKS if "lpcompile.convert" in b), monkeypatch)
    assert names["report"].num_rewritten == 3 * 8


@pytest.mark.usefixtures("eager")
def test_the_block_that_explains_has_a_row_for_every_gemm(monkeypatch):
    names = run(next(b for b in BLOCKS if "lpcompile.explain" in b), monkeypatch)
    report = names["report"]
    assert len(report.rows) == 4 * 2 * 3 - 1  # the input needs no gradient
    assert names["left"] == []
    assert report.saved_bytes.after < report.saved_bytes.before


def test_the_eager_linear_is_near_the_bf16_one(monkeypatch):
    torch.manual_seed(0)
    names = run(next(b for b in BLOCKS if "lpcompile.linear" in b), monkeypatch)
    torch.manual_seed(0)
    x = torch.randn(2, 128, 128, dtype=torch.bfloat16)
    Model()  # draws what it drew there
    expected = nn.functional.linear(x, torch.randn_like(x[0]))
    error = (names["y"] - expected).norm() / expected.norm()
    assert 0 < error < 0.06


def test_the_table_of_recipes_is_complete():
    section = README.split("## Recipes")[1].split("\n\n")[1]
    listed = re.findall(r"^\| `(\w+)`", section, re.MULTILINE)
    assert set(listed) == set(RECIPES)


def test_the_names_of_others_mean_what_the_table_says():
    row = next(line for line in README.splitlines() if '"rowwise_with_gw_hp"' in line)
    theirs, ours = (re.findall(r'`"(\w+)"`', cell) for cell in row.strip("|").split("|"))
    assert [get_recipe(name) for name in theirs] == [RECIPES[name] for name in ours]
    assert set(theirs) <= set(ALIASES)
