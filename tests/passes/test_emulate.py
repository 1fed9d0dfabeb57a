"""Emulated MXFP8 and NVFP4 products: what is written in bf16, what stays narrow, and the bits."""

import pytest
import torch
import torch.nn.functional as F
from oracle import FFN, MICRO, NVFP4_PARTS, WithExperts

from lpcompile import ops
from lpcompile.ops import pointwise
from lpcompile.passes import emulate
from lpcompile.pipeline import AFTER_THE_CUT, observe
from lpcompile.recipes import RECIPES

PARTS = {
    **{name: RECIPES[name] for name in MICRO},
    **{f"nvfp4, {part}": recipe for part, recipe in NVFP4_PARTS.items()},
}


class Experts(torch.nn.Module):
    """SwiGLU experts of ragged groups, one empty, and rows past the last."""

    def __init__(self):
        super().__init__()
        self.w1, self.w3 = (torch.nn.Parameter(torch.randn(4, 96, 64) / 8) for _ in range(2))
        self.w2 = torch.nn.Parameter(torch.randn(4, 64, 96) / 10)
        self.register_buffer("offs", torch.tensor([30, 30, 47, 71], dtype=torch.int32))

    def forward(self, x):
        rows = x.flatten(0, 1)
        gate, up = (F.grouped_mm(rows, w.mT, offs=self.offs) for w in (self.w1, self.w3))
        return F.grouped_mm(F.silu(gate) * up, self.w2.mT, offs=self.offs)[:71]


class Fork(torch.nn.Module):
    """Two linears that read what a third makes, and nothing else needs."""

    def __init__(self):
        super().__init__()
        self.w0, self.w1, self.w2 = (torch.nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x):
        y = self.w0(x)
        return torch.tanh(self.w1(y)) * self.w2(y)


def step(recipe, model, emulated, monkeypatch, device="cpu"):
    """Output and gradients, and the nodes of the forward and the backward after every pass."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    m = model().to(device).bfloat16()
    x = torch.randn(2, 40, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    seen = []
    with monkeypatch.context() as patch, observe() as compiles:
        patch.setattr(emulate, "emulates", lambda x: emulated)

        def watch(graph):
            seen.append([n for n in graph.nodes if n.op == "call_function"])
            return 0

        patch.setattr("lpcompile.pipeline.AFTER_THE_CUT", [*AFTER_THE_CUT, ("watch", watch)])
        options = {"recipe": recipe, "rewrite": "all", "codegen": "eager", "verify": True}
        m.compile(backend="lowprec", options=options)
        y = m(x)
        torch.manual_seed(1)
        y.backward(torch.randn_like(y))
    (compile,) = compiles
    return [y, x.grad, *(p.grad for p in m.parameters())], seen, compile.counts["emulate"]


def targets(nodes):
    return [n.target for n in nodes]


@pytest.mark.parametrize("model", [FFN, Fork, Experts, WithExperts])
@pytest.mark.parametrize("name", PARTS)
def test_emulated_gradients_are_those_of_the_chain_to_the_bit(name, model, monkeypatch):
    made, seen, count = step(PARTS[name], model, True, monkeypatch)
    chain, before, none = step(PARTS[name], model, False, monkeypatch)
    products = {ops.scaled_mm.op, ops.scaled_grouped_mm.op}
    assert none == 0
    assert count == sum(t in products for nodes in before for t in targets(nodes))
    assert [t for nodes in seen for t in targets(nodes) if t in products] == []
    assert [
        i for i, (a, b) in enumerate(zip(made, chain, strict=True)) if not torch.equal(a, b)
    ] == []


@pytest.mark.parametrize("model", [FFN, Fork, Experts])
@pytest.mark.parametrize("name", MICRO)
def test_only_what_is_saved_is_narrow(name, model, monkeypatch):
    _, (forward, backward), _ = step(RECIPES[name], model, True, monkeypatch)
    wide = {ops.fused_wide_micro.op, ops.dequantize.op}
    products = {ops.wide_mm.op, ops.wide_grouped_mm.op}
    (saved,) = {n for n in forward[0].graph.nodes if n.op == "output"}
    narrow = {
        n
        for n in forward
        if n.target is ops.fused_cast_micro.op or n.target.__name__.startswith("quantize")
    }
    assert all(saved in item.users for n in narrow for item in n.users if item.args[1] == 0)
    assert ops.dequantize.op not in targets(forward)
    assert not any(n.target.__name__.startswith("quantize") for n in backward)
    assert ops.fused_cast_micro.op not in targets(backward)
    assert ops.swizzle.op not in targets(forward + backward)
    assert any(n.target in wide for n in backward)
    assert sum(n.target in products for n in forward + backward) >= 3


def test_a_copy_that_two_products_read_is_dequantized_once(monkeypatch):
    _, (_, backward), _ = step(RECIPES["mxfp8"], Fork, True, monkeypatch)
    (read,) = [n for n in backward if n.target is ops.dequantize.op]
    assert [n.op for n in read.args] == ["placeholder"] * 2  # narrow, as it was saved
    assert targets(sorted(read.users)) == [ops.wide_mm.op] * 2


@pytest.mark.parametrize(("model", "along"), [(FFN, "t"), (Experts, "g")])
def test_each_tensor_of_swiglus_backward_is_made_from_its_inputs_both_ways(
    model, along, monkeypatch
):
    _, (_, backward), _ = step(RECIPES["mxfp8"], model, True, monkeypatch)
    made = [n for n in backward if n.target is ops.fused_wide_micro.op]
    ways = sorted(
        (pointwise.parse(n.args[3]).kinds.count("full"), sorted(f.split()[1] for f in n.args[4]))
        for n in made
        if "sigmoid" in n.args[3] or "exp" in n.args[3]
    )
    both = sorted(["n", along])
    # Of h, from gate and up; of the gradients of up and of gate.
    assert ways == sorted([(2, [along]), (2, both), (3, both)])


@pytest.mark.parametrize("model", [FFN, Experts])
def test_what_is_rounded_stochastically_is_in_memory(model, monkeypatch):
    _, (_, backward), _ = step(RECIPES["nvfp4"], model, True, monkeypatch)
    made = [n for n in backward if n.target is ops.fused_wide_micro.op]
    drawn = [n for n in made if any("draw" in form for form in n.args[4])]
    assert len(drawn) == 3  # dY, and the gradients of gate and up
    assert {n.args[3] for n in drawn} == {pointwise.IDENTITY}


def test_a_cpu_and_a_gpu_that_is_not_here_keep_scaled_products():
    assert not emulate.emulates(torch.empty(1))
    if not torch.cuda.is_available():
        with torch._subclasses.FakeTensorMode():
            assert not emulate.emulates(torch.empty(1, device="cuda"))
