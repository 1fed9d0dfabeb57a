"""Sums that a grouped GEMM makes as it stores: which it does, and that no bit changes."""

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICES, after_every_pass, bf16, data
from torch import nn

from lpcompile import ops
from lpcompile.graph import aten, calls
from lpcompile.pipeline import observe
from lpcompile.recipes import RECIPES

E, T, DIM, HIDDEN = 3, 96, 64, 32
NARROW = [name for name, recipe in RECIPES.items() if not recipe.is_bf16]


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(E, HIDDEN, DIM))
        self.w3 = nn.Parameter(torch.randn(E, HIDDEN, DIM))
        self.w2 = nn.Parameter(torch.randn(E, DIM, HIDDEN))

    def forward(self, x, offs):
        gate, up = (F.grouped_mm(x, w.mT, offs=offs) for w in (self.w1, self.w3))
        return F.grouped_mm(F.silu(gate) * up, self.w2.mT, offs=offs)


def ends(device="cpu"):
    return torch.tensor([20, 20, T], dtype=torch.int32, device=device)


def run(model, *xs, folds=True, codegen="eager", recipe="fp8_rowwise"):
    """Outputs, gradients, how many sums were folded, and the graphs after the last pass."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    model.zero_grad()
    options = {"recipe": recipe, "rewrite": "all", "codegen": codegen, "verify": True}
    with observe() as compiles, after_every_pass(() if folds else ["addend"]) as graphs:
        xs = [x.detach().requires_grad_() for x in xs]
        y = torch.compile(model, backend="lowprec", options=options)(*xs, ends(xs[0].device))
        y.backward(torch.randn(y.shape).to(y))
    made = [y.detach(), *(x.grad for x in xs), *(p.grad for p in model.parameters())]
    return made, sum(c.counts.get("addend", 0) for c in compiles), graphs


def same(made, expected):
    return all(torch.equal(m, e) for m, e in zip(made, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", NARROW)
def test_the_gradient_of_x_is_summed_in_the_second_gemm(recipe, device):
    model, x = bf16(SwiGLU(), device), data(T, DIM, device=device)
    made, count, (_, backward) = run(model, x, recipe=recipe)
    assert count == 1
    assert not any(n.meta["val"].shape == x.shape for n in calls(backward, [aten.add.Tensor]))
    # The second is the first emulated, where a GPU has no other.
    products = ops.scaled_grouped_mm.op, ops.wide_grouped_mm.op
    (product,) = (n for n in calls(backward, products) if n.kwargs)
    assert product.kwargs["addend"].target is product.target
    expected, count, _ = run(model, x, recipe=recipe, folds=False)
    assert count == 0
    assert same(made, expected)


@pytest.mark.gpu
def test_inductor_sums_to_the_same_bits():
    model, x = bf16(SwiGLU(), "cuda"), data(T, DIM, device="cuda")
    made, count, _ = run(model, x, codegen="inductor")
    expected, _, _ = run(model, x, codegen="inductor", folds=False)
    assert count == 1
    assert same(made, expected)


class Sum(nn.Module):
    """A grouped product of x and ``spelled`` of what else there is."""

    def __init__(self, spelled):
        super().__init__()
        self.ws = nn.ParameterList(torch.randn(E, DIM, DIM) for _ in range(3))
        self.spelled = spelled

    def forward(self, x, other, offs):
        return self.spelled(*(F.grouped_mm(x, w.mT, offs=offs) for w in self.ws), other)


SUMS = {
    "a tensor that is there": (lambda a, b, c, other: torch.cat([a + other, b, c]), 1),
    "three products": (lambda a, b, c, other: torch.cat([a + b + c, other]), 2),
    "in any order": (lambda a, b, c, other: torch.cat([c + (b + a), other]), 2),
    "by the one that others do not read": (
        lambda a, b, c, other: torch.cat([a, a + b, c, other]),
        1,
    ),
    "a product that is read again": (lambda a, b, c, other: torch.cat([a + other, a, b, c]), 0),
    "itself": (lambda a, b, c, other: torch.cat([a + a, b, c, other]), 0),
    "with a factor": (lambda a, b, c, other: torch.cat([a.add(other, alpha=2), b, c]), 0),
    "a number": (lambda a, b, c, other: torch.cat([a + 1, b, c, other]), 0),
    "of a pointwise op": (lambda a, b, c, other: torch.cat([a + other.relu(), b, c]), 0),
    "of one row": (lambda a, b, c, other: torch.cat([a + other[:1], b, c]), 0),
    "laid out otherwise": (lambda a, b, c, other: torch.cat([a + other.view(DIM, T).mT, b, c]), 0),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_made_in_a_gemm_or_stays(name):
    spelled, folded = SUMS[name]
    model, x, other = bf16(Sum(spelled)), data(T, DIM), data(T, DIM)
    made, _, (forward, _) = run(model, x, other)
    assert sum("addend" in n.kwargs for n in calls(forward, [ops.scaled_grouped_mm.op])) == folded
    expected, *_ = run(model, x, other, folds=False)
    assert same(made, expected)


class OfRelu(Sum):
    def forward(self, x, other, offs):
        return super().forward(x, other.relu(), offs)


def test_what_a_pointwise_op_made_before_the_product_stays_with_the_sum():
    model = bf16(OfRelu(SUMS["a tensor that is there"][0]))
    _, _, (forward, _) = run(model, data(T, DIM), data(T, DIM))
    assert not any("addend" in n.kwargs for n in calls(forward, [ops.scaled_grouped_mm.op]))
