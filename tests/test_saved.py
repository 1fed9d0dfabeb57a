"""What the forward saves for the backward under the narrowest recipe, on the meta device."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses import FakeTensorMode

import lpcompile
from lpcompile import saved
from lpcompile.flow import Leaves
from lpcompile.graph import aten, call

T, DIM, HIDDEN = 8192, 4096, 14336  # of Llama3-8B
ALL = {"rewrite": "all"}


class FeedForward(nn.Module):
    def __init__(self, has_norm):
        super().__init__()
        self.norm = nn.RMSNorm(DIM) if has_norm else nn.Identity()
        self.w1, self.w3 = (nn.Linear(DIM, HIDDEN, bias=False) for _ in range(2))
        self.w2 = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x):
        x = self.norm(x)
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def saved_bytes(make, recipe, dim=DIM):
    with torch.device("meta"):
        model = make().bfloat16()
        x = torch.empty(T, dim, dtype=torch.bfloat16, requires_grad=True)
    return lpcompile.explain(model, x, recipe=recipe, options=ALL).saved_bytes


@pytest.mark.parametrize("has_norm", [False, True], ids=["alone", "after a norm"])
def test_nvfp4_saves_three_quarters_for_an_ffn_and_a_third_of_what_its_linears_read(has_norm):
    before, after = saved_bytes(lambda: FeedForward(has_norm), "nvfp4")
    assert after <= 0.75 * before
    gate_and_up = 2 * T * HIDDEN * 2  # bf16, which SiLU's and the product's backward read
    norms = 4 * T + 2 * T * DIM if has_norm else 0  # its input, which it reads itself, and rsqrt
    x_and_h = before - gate_and_up - norms
    assert x_and_h == T * (DIM + HIDDEN) * 2
    assert after - gate_and_up - norms <= 0.30 * x_and_h


@pytest.mark.parametrize(("recipe", "bits"), [("nvfp4", 4.5), ("mxfp8", 8.25), ("fp8_rowwise", 8)])
def test_what_nothing_else_holds_is_saved_in_the_bits_of_its_format(recipe, bits):
    def chain():
        return nn.Sequential(*(nn.Linear(DIM, DIM, bias=False) for _ in range(3)))

    before, after = saved_bytes(chain, recipe)
    given = T * DIM * 2  # the model's own input, which somebody holds
    assert before == 3 * given
    copies = 2 * T * DIM * bits / 8
    vectors = 3 * 4 * DIM  # row-wise scales of the copies, and the maxima of what is given
    assert copies <= after - given <= copies + vectors + 8  # tensor scales


def test_a_tensor_that_is_saved_in_two_views_counts_once_by_the_larger():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["desc"] = None
    with FakeTensorMode():
        x.meta["val"] = torch.empty(8, 64, dtype=torch.bfloat16)
    y = call(graph, aten.sin.default, x)
    half = call(graph, aten.slice.Tensor, y, 0, 0, 4)
    graph.output([y, half, y])
    found = saved.find(graph, Leaves(frozenset()), 1)
    assert [(s.kind, s.num_bytes) for s in found] == [("activation", 1024), ("alias", 512)]
    assert saved.total(found) == 1024
