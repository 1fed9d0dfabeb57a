"""Every spelling of a linear: its roles, and its gradients against the eager oracle, per column."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lpcompile
from lpcompile.ops.define import per_column
from lpcompile.pipeline import observe
from lpcompile.recipes import RECIPES

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NARROW = [name for name, recipe in RECIPES.items() if not recipe.is_bf16]
LINEAR = {"fprop": 1, "dgrad": 1, "wgrad": 1}
close = per_column(0.006)


@dataclass(frozen=True)
class Case:
    """A spelling of Y = X @ W.T, and the same through the oracle ``linear(x, w)``."""

    name: str
    spelled: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    x: tuple[int, ...] = (48, 64)
    w: tuple[int, ...] = (96, 64)
    roles: tuple[tuple[str, int], ...] = tuple(LINEAR.items())
    make: Callable[[Tensor], Tensor] = lambda x: x  # how x is laid out
    bound: float = 0.006  # the order of a sum, then one rounding to bf16


def plain(linear, x, w):
    return linear(x, w)


def transposed(linear, x, w):
    return linear(x, w).t()


def times(count):
    return tuple((product, count) for product in LINEAR)


CASES = [
    Case("F.linear", lambda x, w: F.linear(x, w), plain),
    Case("x @ w.T", lambda x, w: x @ w.T, plain),
    Case("torch.mm", lambda x, w: torch.mm(x, w.t()), plain),
    Case(
        "torch.addmm",
        lambda x, w: torch.addmm(torch.arange(96.0).to(x), x, w.t()),
        lambda f, x, w: f(x, w, torch.arange(96.0).to(x)),
    ),
    Case(
        "torch.addmm of a matrix",
        lambda x, w: torch.addmm(x @ x.t(), x, w.t()),
        lambda f, x, w: x @ x.t() + f(x, w),
        w=(48, 64),
    ),
    Case("torch.matmul 3-d", lambda x, w: torch.matmul(x, w.t()), plain, x=(3, 16, 64)),
    Case("4-d", lambda x, w: F.linear(x, w), plain, x=(2, 3, 8, 64)),
    Case("1-d", lambda x, w: F.linear(x, w), plain, x=(64,)),
    Case("einsum", lambda x, w: torch.einsum("btk,nk->btn", x, w), plain, x=(3, 16, 64)),
    Case("einsum 2-d", lambda x, w: torch.einsum("tk,nk->tn", x, w), plain),
    Case("tensordot", lambda x, w: torch.tensordot(x, w, dims=([2], [1])), plain, x=(3, 16, 64)),
    Case("x @ w", lambda x, w: x @ w, lambda f, x, w: f(x, w.t()), w=(64, 96)),
    Case("w @ x.T", lambda x, w: w @ x.T, transposed),
    Case("a batch of 1", lambda x, w: torch.bmm(x[None], w.t()[None])[0], plain),
    Case("transposed output", lambda x, w: F.linear(x, w).t(), transposed),
    Case("square transposed", lambda x, w: F.linear(x, w).t(), transposed, (64, 64), (64, 64)),
    Case("transposed x", lambda x, w: F.linear(x, w), plain, make=lambda x: x.t().clone().t()),
    Case(
        "an x whose rows are one",
        lambda x, w: F.linear(x.expand(48, 64), w),
        lambda f, x, w: f(x.expand(48, 64), w),
        x=(1, 64),
    ),
    Case(
        "a dY whose elements are one",
        lambda x, w: F.linear(x, w).sum(),
        lambda f, x, w: f(x, w).sum(),
        bound=0.01,  # the sum itself
    ),
    Case("a window of w", lambda x, w: F.linear(x, w[8:72]), lambda f, x, w: f(x, w[8:72])),
    Case(
        "strided x", lambda x, w: F.linear(x[:, ::2], w), lambda f, x, w: f(x[:, ::2], w), (48, 128)
    ),
    Case(
        "used twice",
        lambda x, w: F.linear(torch.tanh(F.linear(x, w)), w),
        lambda f, x, w: f(torch.tanh(f(x, w)), w),
        w=(64, 64),
        roles=times(2),
        bound=0.03,  # a last place of the first output moves codes of the second's input
    ),
    Case(
        "used once each way",
        lambda x, w: torch.tanh(x @ w.T) @ w,
        lambda f, x, w: f(torch.tanh(f(x, w)), w.t()),
        roles=times(2),
        bound=0.03,
    ),
    Case(
        "weight norm",
        lambda x, w: F.linear(x, w / w.norm(dim=1, keepdim=True)),
        lambda f, x, w: f(x, w / w.norm(dim=1, keepdim=True)),
    ),
    Case("sizes not multiples of 16", lambda x, w: F.linear(x, w), plain, (37, 72), (40, 72)),
    Case("one row", lambda x, w: F.linear(x, w), plain, x=(1, 64)),
    Case("no rows", lambda x, w: F.linear(x, w), plain, x=(0, 64)),
    Case(
        "a product of two activations",
        lambda x, w: (h := F.linear(x, w)) @ h.t(),
        lambda f, x, w: (h := f(x, w)) @ h.t(),
        roles=tuple(LINEAR.items()),
    ),
]


def run(f, x, w, dy_seed=1):
    """f(x, w) and its gradients under a fixed dY."""
    x, w = x.detach().requires_grad_(), torch.nn.Parameter(w.detach())
    y = f(x, w)
    torch.manual_seed(dy_seed)
    y.backward(torch.randn(y.shape).to(y))
    return y.detach(), x.grad, w.grad


def compile(f, recipe="fp8_rowwise", codegen="eager", **options):
    return torch.compile(
        f,
        backend="lowprec",
        options={"recipe": recipe, "rewrite": "all", "codegen": codegen, **options},
        fullgraph=True,
    )


def roles(compiles):
    return Counter(row.product for c in compiles for row in c.rows if row.rewritten)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_spelling_has_its_roles_and_the_oracles_gradients(case, device):
    x = case.make(torch.randn(case.x, device=device).bfloat16())
    w = (torch.randn(case.w, device=device) / 8).bfloat16()
    with observe() as compiles:
        made = run(compile(case.spelled), x, w)
    expected = run(lambda x, w: case.oracle(lpcompile.linear, x, w), x, w)
    assert roles(compiles) == dict(case.roles)
    for name, m, e in zip(("y", "dx", "dw"), made, expected, strict=True):
        columns = (t.reshape(-1, t.shape[-1] if t.dim() else 1) for t in (m, e))
        assert per_column(case.bound)(*columns) == "", name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", NARROW)
def test_a_recipe_narrows_the_products_it_names(recipe, device):
    x = torch.randn(48, 64, device=device).bfloat16()
    w = (torch.randn(96, 64, device=device) / 8).bfloat16()
    with observe() as compiles:
        made = run(compile(F.linear, recipe), x, w)
    named = {p: 1 for p in LINEAR if RECIPES[recipe].gemm(p) is not None}
    assert roles(compiles) == named
    expected = run(lambda x, w: lpcompile.linear(x, w, recipe=recipe), x, w)
    for m, e in zip(made, expected, strict=True):
        assert close(m, e) == ""


# Where rounding is stochastic, an element's number in dY.T is not its number in dY.
EXACT = [name for name in NARROW if not RECIPES[name].is_stochastic]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", EXACT)
def test_a_transposed_product_gives_each_operand_its_own_format(recipe, device):
    # Rows of x so far apart that a scale of several of them would leave nothing of the smallest.
    apart = torch.logspace(-5, 1, 48, device=device)[:, None]
    x = (torch.randn(48, 64, device=device) * apart).bfloat16()
    w = (torch.randn(96, 64, device=device) / 8).bfloat16()
    made = run(compile(lambda x, w: w @ x.T, recipe), x, w)
    expected = run(lambda x, w: lpcompile.linear(x, w, recipe=recipe).t(), x, w)
    for m, e in zip(made, expected, strict=True):
        assert close(m, e) == ""


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_tensorwise"])
def test_accumulation_is_fast_where_the_recipe_says(recipe, tmp_path):
    x, w = torch.randn(48, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    with lpcompile.dump(tmp_path):
        run(compile(F.linear, recipe), x, w)
    text = (tmp_path / "graph_0" / "gemms.txt").read_text()
    found = re.findall(r"(fprop|dgrad|wgrad)  m=.*?scaled_mm\(.*?(True|False)\)", text, re.DOTALL)
    assert dict(found) == {p: str(RECIPES[recipe].gemm(p).fast_accum) for p in LINEAR}
    assert len(set(dict(found).values())) == 2


def test_an_addmm_that_scales_its_product_is_left_with_that_reason():
    x, w = torch.randn(48, 64).bfloat16(), (torch.randn(96, 64) / 8).bfloat16()
    with observe() as compiles:
        run(compile(lambda x, w: torch.addmm(x[:, :1], x, w.t(), alpha=2)), x, w)
    forward = next(r for c in compiles for r in c.rows if r.product == "fprop")
    assert not forward.rewritten
    assert forward.reason == "addmm with alpha=2"


@pytest.mark.parametrize(
    ("x", "w", "says"), [((48, 64), (8, 64), "n=8"), ((48, 8), (96, 8), "k=8")], ids=["n", "k"]
)
def test_a_gemm_of_fewer_than_16_columns_is_left_with_that_reason(x, w, says):
    x, w = torch.randn(x).bfloat16(), torch.randn(w).bfloat16()
    with observe() as compiles:
        run(compile(F.linear), x, w)
    assert {r.reason for c in compiles for r in c.rows} == {f"{says} is below 16"}
    assert roles(compiles) == {}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_an_unbacked_number_of_rows_is_narrowed(count, device):
    def chosen(linear, x, w):
        return linear(x[x[:, 0].nonzero().squeeze(1)], w)

    x = torch.randn(48, 64, device=device).bfloat16()
    x[:, 0] = 0
    x[:count, 0] = 1
    w = (torch.randn(96, 64, device=device) / 8).bfloat16()
    with observe() as compiles, torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        made = run(compile(lambda x, w: chosen(F.linear, x, w), rewrite="profitable"), x, w)
    assert roles(compiles) == LINEAR
    assert {r.m for c in compiles for r in c.rows} == {None}
    expected = run(lambda x, w: chosen(lpcompile.linear, x, w), x, w)
    for m, e in zip(made, expected, strict=True):
        assert close(m, e) == ""


def test_the_gradient_of_a_master_weight_is_not_rounded_to_bf16():
    w, x = torch.nn.Parameter(torch.randn(48, 64)), torch.randn(32, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = compile(F.linear)(x, w)
    y.backward(torch.randn(32, 48).bfloat16())
    assert w.grad.dtype == torch.float32
    assert not torch.equal(w.grad, w.grad.bfloat16().float())
