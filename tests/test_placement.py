"""X that one read narrows both ways, in the forward: where it is, and that no bit changes."""

import pytest
import torch
import torch.nn.functional as F
from oracle import bf16, cut, data
from torch import nn
from torch.utils.checkpoint import checkpoint

from lpcompile import ops, placement
from lpcompile.graph import calls, placeholders

# Copies of x, with 128 rows more a group, are smaller than x: min-cut takes what is.
DIM, HIDDEN, E = 256, 64, 4
ENDS = (20, 20, 570)


class Experts(nn.Module):
    """SwiGLU experts of what is given, or of what a pointwise op makes of it."""

    def __init__(self, is_made=False, wrap=lambda f, x: f(x)):
        super().__init__()
        self.w1, self.w3 = (nn.Parameter(torch.randn(E, HIDDEN, DIM) / 16) for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(E, DIM, HIDDEN) / 8)
        self.is_made, self.wrap = is_made, wrap

    def forward(self, x):
        return self.wrap(self.experts, x)

    def experts(self, x):
        offs = torch.tensor([*ENDS, len(x)], device=x.device, dtype=torch.int32)
        x = F.gelu(x) if self.is_made else x
        gate, up = (torch._grouped_mm(x, w.mT, offs=offs) for w in (self.w1, self.w3))
        return torch._grouped_mm(F.silu(gate) * up, self.w2.mT, offs=offs)


def both_ways(graph):
    """What one call narrows along rows and for wgrad."""
    casts = calls(graph, {ops.fused_cast.op})
    return [n.args[0][0] for n in casts if {f[-1] for f in n.args[3]} == {"n", "g"}]


def x_in(graph, rows):
    shape = (rows, DIM)
    return [n for n in placeholders(graph) if tuple(n.meta["val"].shape) == shape]


FEW, MANY = E * DIM - 16, E * DIM


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_x_is_narrowed_both_ways_where_weights_gradients_are_larger_than_dy(rows):
    forward, backward, _ = cut(bf16(Experts()), data(rows, DIM), recipe="fp8_tensorwise")
    assert both_ways(forward) == (x_in(forward, rows) if rows == FEW else [])
    # x itself is not saved then: dY alone is left of its shape.
    assert len(x_in(backward, rows)) == (1 if rows == FEW else 2)


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        (lambda: Experts(is_made=True), "fp8_tensorwise"),  # min-cut saves the copy, or x's maker
        (Experts, "fp8_rowwise"),  # its scales of columns are of a read before
        (
            lambda: Experts(wrap=lambda f, x: checkpoint(f, x, use_reentrant=False)),
            "fp8_tensorwise",
        ),
    ],
    ids=["x is made", "row scales", "checkpointed"],
)
def test_elsewhere_x_is_narrowed_for_wgrad_in_the_backward(model, recipe):
    forward, _, _ = cut(bf16(model()), data(FEW, DIM), recipe=recipe)
    assert both_ways(forward) == []


def test_where_x_is_narrowed_changes_no_bit(monkeypatch):
    model, x = bf16(Experts()), data(FEW, DIM)
    *_, made = cut(model, x, recipe="fp8_tensorwise")
    monkeypatch.setattr(placement, "_is_read_once", lambda site, of: False)
    forward, _, expected = cut(model, x, recipe="fp8_tensorwise")
    assert both_ways(forward) == []
    assert [name for name in made if not torch.equal(made[name], expected[name])] == []
