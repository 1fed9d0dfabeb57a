"""Fused MXFP8 and NVFP4 quantizes: what is merged, and the bits of the chain."""

import pytest
import torch
import torch.nn.functional as F
from oracle import FFN, MICRO, WithExperts

from lpcompile import ops, pipeline
from lpcompile.passes import fuse_micro
from lpcompile.pipeline import observe
from lpcompile.recipes import RECIPES

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def step(recipe, device, monkeypatch, fused, model=FFN):
    """Output and gradients, the calls of each op of ours, and how many quantizes were merged."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    m = model().to(device).bfloat16()
    x = torch.randn(2, 40, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    calls = []
    with monkeypatch.context() as patch, observe() as compiles:

        def watched(graph):
            count = fuse_micro.run(graph) if fused else 0
            graph.eliminate_dead_code()
            calls.extend(n.target for n in graph.nodes if n.op == "call_function")
            return count

        # Where a GPU emulates the products, tests/passes/test_emulate.py tells what is fused.
        apart = "fuse_micro", "emulate"
        others = [step for step in pipeline.AFTER_THE_CUT if step[0] not in apart]
        steps = [*others, ("fuse_micro", watched)]
        patch.setattr(pipeline, "AFTER_THE_CUT", steps)
        m.compile(
            backend="lowprec", options={"recipe": recipe, "rewrite": "all", "codegen": "eager"}
        )
        y = m(x)
        torch.manual_seed(1)
        y.backward(torch.randn_like(y))
    (compile,) = compiles
    return [y, x.grad, *(p.grad for p in m.parameters())], calls, compile.counts["fuse_micro"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", MICRO)
def test_fused_gradients_are_those_of_the_chain_to_the_bit(recipe, device, monkeypatch):
    made, calls, count = step(recipe, device, monkeypatch, fused=True)
    chain, before, none = step(recipe, device, monkeypatch, fused=False)
    assert none == 0
    assert count >= 10
    assert calls.count(ops.fused_cast_micro.op) > 3
    assert ops.fused_cast_micro.op not in before
    close = (
        torch.equal if device == "cpu" else lambda a, b: torch.allclose(a, b, rtol=0.1, atol=0.1)
    )
    assert [i for i, (a, b) in enumerate(zip(made, chain, strict=True)) if not close(a, b)] == []


@pytest.mark.parametrize("recipe", MICRO)
def test_what_experts_read_too_keeps_its_bits(recipe, monkeypatch):
    made, calls, count = step(recipe, "cpu", monkeypatch, True, WithExperts)
    chain, _, _ = step(recipe, "cpu", monkeypatch, False, WithExperts)
    assert count >= 2
    assert calls.count(ops.scaled_grouped_mm.op) == (3 if RECIPES[recipe].wgrad else 2)
    assert [
        i for i, (a, b) in enumerate(zip(made, chain, strict=True)) if not torch.equal(a, b)
    ] == []


def test_no_transform_and_no_swizzle_of_an_activation_is_left(monkeypatch):
    _, calls, _ = step("nvfp4", "cpu", monkeypatch, fused=True)
    _, before, _ = step("nvfp4", "cpu", monkeypatch, fused=False)
    assert before.count(ops.hadamard.op) >= 5
    assert calls.count(ops.hadamard.op) == 0
    assert calls.count(ops.amax_tensor.op) < before.count(ops.amax_tensor.op) / 2
    assert before.count(ops.swizzle.op) > 10
    # Of scales that the forward saves, which a GEMM of the backward reads, no other.
    assert calls.count(ops.swizzle.op) <= 2


def test_sizes_that_only_the_hints_show_to_be_equal_are_no_error():
    w1, w2 = (torch.nn.Parameter(torch.randn(64, 64).bfloat16()) for _ in range(2))
    x = torch.randn(20, 64, dtype=torch.bfloat16, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 0)
    options = {"recipe": "nvfp4", "rewrite": "all", "codegen": "eager", "verify": True}

    @torch.compile(backend="lowprec", options=options)
    def saves_what_is_dropped_out(x):
        return F.dropout(x @ w1, 0.5) @ w2

    with observe() as compiles:
        saves_what_is_dropped_out(x).sum().backward()
    assert compiles[0].counts["fuse_micro"] >= 10
