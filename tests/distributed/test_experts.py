"""A mixture of experts over two processes computes what it computes in one."""

from collections import Counter
from dataclasses import replace
from functools import cache, partial

import pytest
import torch.nn.functional as F
from experts import (
    BATCH,
    BOUNDS,
    CASES,
    DIM,
    HIDDEN,
    TOKENS,
    ShardedExperts,
    batch,
    build,
    compile_block,
)
from ranks import WORLD, far_from, gradients, of_columns, of_rows, results, step


@cache
def whole(case, device):
    """The loss and the gradients of one process, whatever ``spread`` is."""
    model = build(case).to(device)
    compile_block(model, case)
    return step(model, *batch(device)).item(), gradients(model)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_have_the_loss_and_gradients_of_one_process(world, case):
    plain = replace(case, name="", spread="", codegen="eager", masters=False)
    loss, expected = whole(plain, world[0])
    for made in results(world, case.name):
        assert made["loss"] == pytest.approx(loss, rel=2e-3)
        assert far_from(expected, made["gradients"], BOUNDS[case.recipe]) == {}


@cache
def in_shards(case, device):
    """The gradients of one process that computes in the shards of two ranks."""
    model = build(case).to(device)
    x, target = batch(device)
    parts = [(x, target)]
    if case.spread == "fsdp":  # accumulates over the batches of the ranks
        parts = list(zip(x.chunk(WORLD), target.chunk(WORLD), strict=True))
    else:
        model.moe.experts.__class__ = ShardedExperts
        shared = model.moe.shared_experts
        for linear, of_shards in (
            (shared.w1, of_columns),
            (shared.w3, of_columns),
            (shared.w2, of_rows),
        ):
            linear.forward = partial(of_shards, F.linear, linear)
    compile_block(model, case)
    for part in parts:
        step(model, *part)
    return {name: g.float() / len(parts) for name, g in gradients(model).items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_quantize_like_one_process_that_computes_in_their_shards(world, case):
    spread = "fsdp" if case.spread == "fsdp" else "tp"  # of which the others have the shards
    plain = replace(case, name="", spread=spread, codegen="eager", masters=False)
    expected = in_shards(plain, world[0])
    # TP adds what the shared and the routed experts give in another order than one process does, so
    # that the gradient of the loss differs in last places and some codes do. FSDP adds nothing.
    bound = 0.01 if case.spread == "fsdp" else 0.1
    for made in results(world, case.name):
        assert far_from(expected, made["gradients"], bound) == {}


def local_rows(case):
    """The GEMMs that a rank must narrow, with the sizes of its own shard."""
    args, rows = case.args, Counter()
    tokens, split = (
        (BATCH * TOKENS // WORLD, 1) if case.spread == "fsdp" else (BATCH * TOKENS, WORLD)
    )
    routed = tokens * args.top_k
    if args.pads_groups:  # and the row of zeros, to a multiple of 16 for each expert
        routed += 16 * (args.num_experts + 1)
    for product in ("fprop", "dgrad", "wgrad"):
        for name, m, hidden, num_groups in (
            ("moe.experts", routed, HIDDEN // split, args.num_experts),
            ("moe.shared_experts.{}", tokens, args.num_shared_experts * HIDDEN // split, 1),
        ):
            for weight, (n, k) in (
                ("w1", (hidden, DIM)),
                ("w3", (hidden, DIM)),
                ("w2", (DIM, hidden)),
            ):
                rows[name.format(weight), product, m, n, k, num_groups] += 1
    return rows


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rank_narrows_the_products_of_its_shard_and_no_router(world, case):
    for made in results(world, case.name):
        assert Counter(row[:6] for row in made["rows"] if row[7]) == local_rows(case)
        assert all(row[6] == case.recipe for row in made["rows"] if row[7])
        routers = [row[8] for row in made["rows"] if row[0] == "moe.router.gate"]
        assert routers == ["a router: its output reaches a top-k"] * 3
