"""Loops over experts: which become grouped products, and their gradients."""

import pytest
import torch
from expert_loops import (
    CASES,
    COUNTS,
    DEVICES,
    FP8,
    KNOWN,
    E,
    Experts,
    K,
    N,
    T,
    assert_same,
    compiled,
    data,
    gated,
    product,
    reasons,
    roles,
    run,
    split,
    step,
    times,
)
from torch import nn
from torch._inductor import config

import lpcompile
from lpcompile.ops.define import per_column
from lpcompile.pipeline import observe
from lpcompile.recipes import RECIPES

pytestmark = pytest.mark.usefixtures("sizes_in_the_graph")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_spelling_is_grouped_with_the_oracles_gradients(case, device):
    args = data(device, KNOWN if case.name.startswith("numbers") else COUNTS)
    with observe() as compiles:
        made = run(compiled(case.loop), *args)
    assert roles(compiles) == times(case.products), reasons(compiles)
    assert reasons(compiles) == {"4 experts of a loop"}
    assert compiles[0].rows[0][2:6] == (T, N, K, E)
    bound = 0.006 if case.oracle is product else 0.02  # what is between two products rounds
    assert_same(made, run(lambda *a: case.oracle(*a, "fp8_rowwise"), *args), bound)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", FP8)
def test_a_recipe_narrows_the_products_it_names(recipe, device):
    args = data(device)
    case = next(c for c in CASES if c.name == "SwiGLU")
    with observe() as compiles:
        made = run(compiled(case.loop, recipe), *args)
    named = RECIPES[recipe].grouped or RECIPES[recipe]
    narrowed = {(p, E): 3 for p in ("fprop", "dgrad", "wgrad") if named.gemm(p)}
    assert roles(compiles) == narrowed
    assert {row.num_groups for row in compiles[0].rows} == {E}
    assert_same(made, run(lambda *a: gated(*a, recipe), *args), 0.02)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_lie_apart_are_stacked_and_no_copy_is_saved(device):
    model, (x, _, counts) = Experts().to(device), data(device)
    with observe(measures=True) as compiles:
        made = step(compiled(model), model, x, counts)
    assert roles(compiles) == times(3)
    (said,) = reasons(compiles)
    assert said == "4 experts of a loop, their weights copied into a stack"
    after = compiles[0].saved_bytes.after
    assert after < 2 * T * (2 * K + 3 * N) + 64 * E  # x, gate, up and no weight of E * 3 * K * N
    for m, e in zip(made, step(model.oracle, model, x, counts), strict=True):
        assert per_column(0.02)(m, e) == ""


def test_experts_whose_weights_are_in_another_order_have_the_oracles_gradients():
    def backwards(x, w, counts):
        return torch.cat([t @ w[E - 1 - e] for e, t in enumerate(split(x, counts))])

    args = data()
    with observe() as compiles:
        made = run(compiled(backwards), *args)
    assert roles(compiles) == times(1)
    expected = run(lambda x, w, counts: product(x, w.flip(0), counts, "fp8_rowwise"), *args)
    assert_same(made, expected)


class Few(Experts):
    """Experts of known, few rows."""

    def forward(self, x):
        parts = zip(self.experts, x.split([16] * E), strict=True)
        return torch.cat([expert(t) for expert, t in parts])


def test_a_stack_that_costs_more_than_it_gains_is_not_made():
    with torch.device("meta"):
        model = Few(dim=8192, hidden=8192)
        x = torch.empty(16 * E, 8192, dtype=torch.bfloat16)
    report = lpcompile.explain(model, x, options={"rewrite": "all"})
    assert {row.num_groups for row in report.rows} == {1}
    assert all("copying their weights into a stack takes" in row.reason for row in report.rows)


@pytest.mark.parametrize("device", DEVICES)
def test_through_inductor_the_gradients_are_the_oracles(device):
    args = data(device)
    case = next(c for c in CASES if c.name == "SwiGLU")
    options = {"codegen": "inductor", "emulate_precision_casts": True}
    with observe() as compiles, config.patch(force_disable_caches=True):  # on a hit no pass runs
        made = run(compiled(case.loop, **options), *args)
    assert roles(compiles) == times(3)
    for m, e in zip(made, run(lambda *a: gated(*a, "fp8_rowwise"), *args), strict=True):
        # A last place of one product moves codes of the next one's operands.
        error, size = (m - e).norm(dim=-2), e.norm(dim=-2)
        assert (error <= 0.1 * (size + size.mean())).all()


def test_other_sizes_do_not_recompile():
    f = compiled(CASES[0].loop)
    with observe() as compiles:
        for counts in (COUNTS, (0, 64, 0, 0), (16, 16, 16, 16)):
            args = data(counts=counts)
            made = run(f, *args)
            assert_same(made, run(lambda *a: product(*a, "fp8_rowwise"), *args))
    assert len(compiles) == 1


def test_inference_is_grouped_too():
    x, w, counts = data()
    w = nn.Parameter(w)
    with torch.no_grad(), observe() as compiles:
        made = compiled(CASES[0].loop)(x, w, counts)
    assert roles(compiles) == {("fprop", E): 1}
    assert torch.equal(made, product(x, w, counts, "fp8_rowwise"))
