"""Loops over experts that stay linears, or stay in bf16, and why."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from expert_loops import (
    CASES,
    E,
    Experts,
    K,
    N,
    assert_same,
    compiled,
    data,
    reasons,
    roles,
    run,
    split,
    step,
    times,
)

import lpcompile
from lpcompile import Rule
from lpcompile.ops.define import per_column
from lpcompile.pipeline import observe
from lpcompile.recipes import BF16, RECIPES

pytestmark = pytest.mark.usefixtures("sizes_in_the_graph")


def unchecked(x, counts):
    a = 0
    for size in counts.tolist():
        torch._check(size >= 0)
        yield x[a : a + size]
        a = a + size


def by_numbers(*ranges):
    return lambda x, counts: [x[a:b] for a, b in ranges]


def plain(linear, t, w, e):
    return linear(t, w[e].t())


def of_other_sizes(linear, t, w, e):
    return linear(t, w[e, :, : 16 * (e % 3 + 1)].t())


def padded(parts):
    return torch.cat([F.pad(part, (0, N - part.shape[1])) for part in parts])


def doubled_first(parts):
    return torch.cat([parts[0] * 2, *parts[1:]])


LEFT = {
    "sizes that may be anything": (unchecked, plain, torch.cat, "not known to tile the rows"),
    "rows that overlap": (
        by_numbers((0, 20), (10, 30), (30, 50), (50, 64)),
        plain,
        torch.cat,
        "do not tile the rows",
    ),
    "rows that begin alike": (
        by_numbers((0, 20), (0, 40), (20, 40), (40, 64)),
        plain,
        torch.cat,
        "slices of the rows overlap",
    ),
    "rows that are left out": (
        by_numbers((0, 20), (20, 30), (30, 50), (50, 60)),
        plain,
        torch.cat,
        "do not tile the rows",
    ),
    "an expert that does more": (split, plain, doubled_first, "not computed alike"),
    "experts of other sizes": (split, of_other_sizes, padded, "not all of them compute it"),
}


@pytest.mark.parametrize("name", LEFT)
def test_another_loop_is_linears_with_the_reason(name):
    pick, of, put, said = LEFT[name]

    def experts(linear):
        return lambda x, w, counts: put(
            [of(linear, t, w, e) for e, t in enumerate(pick(x, counts))]
        )

    args = data()
    with observe() as compiles:
        made = run(compiled(experts(F.linear)), *args)
    assert roles(compiles) == times(E, 1)
    assert all(said in reason for reason in reasons(compiles)), reasons(compiles)
    assert_same(made, run(experts(lpcompile.linear), *args))


def test_master_weights_that_lie_apart_are_not_saved_in_bf16():
    model, (x, _, counts) = Experts().float(), data()

    def f(x, counts):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x, counts)

    with observe() as compiles:  # verified: no copy of a weight is saved
        made = step(compiled(f), model, x, counts)
    assert roles(compiles) == times(3)

    def oracle(x, counts):
        with torch.autocast("cpu", torch.bfloat16):
            return model.oracle(x, counts)

    for m, e in zip(made, step(oracle, model, x, counts), strict=True):
        assert per_column(0.006)(m, e) == ""


def test_rows_in_pieces_that_share_a_weight_are_no_experts():
    args = data()

    def pieces(linear):
        return lambda x, w, counts: torch.cat([linear(t, w[0].t()) for t in split(x, counts)])

    with observe() as compiles:
        made = run(compiled(pieces(F.linear)), *args)
    assert roles(compiles) == times(E, 1)
    assert reasons(compiles) == {""}
    assert_same(made, run(pieces(lpcompile.linear), *args))


def test_a_weight_in_pieces_is_no_loop():
    def heads(x, w, counts):
        return torch.cat([F.linear(x, part) for part in w.flatten(0, 1).split([K, K, 2 * K])], 1)

    x, w, counts = data()
    w = w.mT.contiguous().mT.reshape(E, K, N)
    x = x[:, :N].contiguous()
    with observe() as compiles:
        run(compiled(heads), x, w, counts)
    assert reasons(compiles) == {""}


def test_experts_with_other_recipes_are_linears_of_theirs():
    model, (x, _, counts) = Experts(), data()
    with observe() as compiles:
        step(compiled(model, rules=[Rule("experts.1.w1", "bf16")]), model, x, counts)
    rows = compiles[0].rows
    assert {row.num_groups for row in rows} == {1}
    assert {row.module for row in rows if not row.rewritten} == {"experts.1.w1"}
    assert all("rules give the others other recipes" in row.reason for row in rows)


def test_a_loop_that_is_to_stay_bf16_stays_a_loop():
    args = data()
    with observe() as compiles:
        run(compiled(CASES[0].loop, replace(RECIPES["fp8_rowwise"], grouped=BF16)), *args)
    assert roles(compiles) == times(E, 1)
    with observe() as compiles:
        run(compiled(CASES[0].loop, rules=[Rule("*", "bf16")]), *args)
    assert {(row.num_groups, row.rewritten) for row in compiles[0].rows} == {(1, False)}
