"""Both maxima of the tokens of experts are taken in one read; what they scale keeps its bits."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracle import after_every_pass, bf16, compiled, data, step
from torch import nn
from torch.utils.checkpoint import checkpoint

from lpcompile import ops
from lpcompile.graph import is_own
from lpcompile.ops.define import same_bits
from lpcompile.passes import pair_amax
from lpcompile.recipes import RECIPES

DIM, HIDDEN, E = 64, 96, 4
OFFS = [20, 20, 57, 150]
BOTH, GROUP, TOKENS = ops.amax_group_both.op, ops.amax_group.op, ops.amax_tensor_grouped.op


class Experts(nn.Module):
    """SwiGLU experts of rows of which the last are in no group; ``wrap`` runs them."""

    def __init__(self, wrap=lambda f, x: f(x)):
        super().__init__()
        self.w1, self.w3 = (nn.Parameter(torch.randn(E, HIDDEN, DIM) / 8) for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(E, DIM, HIDDEN) / 8)
        self.wrap = wrap

    def forward(self, x):
        def run(x):
            gate, up = (torch._grouped_mm(x, w.mT, offs=offs) for w in (self.w1, self.w3))
            return torch._grouped_mm(F.silu(gate) * up, self.w2.mT, offs=offs)

        offs = torch.tensor(OFFS, device=x.device, dtype=torch.int32)
        return self.wrap(run, x)[: OFFS[-1]]


def cut(monkeypatch, model, x, paired=True, recipe="nvfp4"):
    """What the forward and the backward take of maxima, and what they make."""
    torch._dynamo.reset()
    with monkeypatch.context() as patch, after_every_pass() as seen:
        if not paired:
            patch.setattr(pair_amax, "run", lambda graph: 0)
        made = step(compiled(model, recipe=recipe), x, lambda y: y.float())
    made["x"] = made["x"][: OFFS[-1]]  # what lies behind is whatever was there
    counts = [Counter(n.target for n in graph.nodes if is_own(n)) for graph in seen]
    return [[count[op] for op in (BOTH, GROUP, TOKENS)] for count in counts], made


def differing(made, expected):
    return [name for name in made if same_bits(made[name], expected[name])]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tokens_are_read_once_for_their_maxima(monkeypatch, device):
    model, x = bf16(Experts(), device), data(160, DIM, device=device)
    taken, made = cut(monkeypatch, model, x)
    assert taken == [[2, 0, 0], [3, 0, 0]]  # x and h, of which X is for wgrad; three gradients
    apart, expected = cut(monkeypatch, model, x, paired=False)
    assert apart == [[0, 0, 2], [0, 5, 3]]
    assert differing(made, expected) == []


def test_a_checkpointed_region_saves_no_maxima_of_its_tokens(monkeypatch):
    model = bf16(Experts(lambda f, x: checkpoint(f, x, use_reentrant=False)))
    x = data(160, DIM)
    taken, made = cut(monkeypatch, model, x)
    assert taken[0][:2] == [0, 0]
    assert taken[1][:2] == [3, 2]
    _, expected = cut(monkeypatch, model, x, paired=False)
    assert differing(made, expected) == []


def test_maxima_of_tokens_that_are_not_transformed_stay_as_they_are(monkeypatch):
    recipe = RECIPES["nvfp4"]
    plain = {role: replace(getattr(recipe.wgrad, role), hadamard=0) for role in ("lhs", "rhs")}
    recipe = replace(recipe, wgrad=replace(recipe.wgrad, **plain))
    taken, _ = cut(monkeypatch, bf16(Experts()), data(160, DIM), recipe=recipe)
    assert [both for both, *_ in taken] == [0, 0]
