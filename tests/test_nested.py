"""Linears in graphs that a graph calls: nested compile regions and torch.cond."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICES, EAGER, OracleLinears, close, compiled
from torch import nn

import lpcompile
from lpcompile.ops.define import per_column
from lpcompile.pipeline import observe


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))  # exact both ways: compared to the bit of a code


class Region(Block):
    """The graph of its forward is compiled once, and called for every instance."""

    @torch.compiler.nested_compile_region
    def forward(self, x):
        return super().forward(x)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Region() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)

    def forward(self, x):
        def up(x):
            return self.a(x)

        def down(x):
            return torch.tanh(self.b(torch.tanh(x)))

        taken = x[0, 0] > 0
        if torch.compiler.is_compiling():
            return torch.cond(taken, up, down, (x,))
        return (up if taken else down)(x)  # cond would compile it, and not see the oracle


def step(model, x):
    """Output and every gradient by name, under a fixed dY."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y))
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # A branch that was not taken has zeros where eager has nothing.
    return {"y": y.detach(), "x": x.grad, **{n: g.clone() for n, g in grads.items() if g.any()}}


def assert_oracles(model, x):
    with OracleLinears():
        expected = step(model, x)
    made = {name.removeprefix("_orig_mod."): t for name, t in step(compiled(model), x).items()}
    assert_alike(made, expected, close)


def assert_alike(made, expected, close):
    assert made.keys() == expected.keys()
    for name, e in expected.items():
        pair = (t.reshape(-1, t.shape[-1] if t.dim() > 1 else 1).float() for t in (made[name], e))
        assert close(*pair) == "", name


def rewritten(compiles):
    return sorted((r.module, r.product) for c in compiles for r in c.rows if r.rewritten)


def linears(*modules):
    return sorted((m, p) for m in modules for p in ("fprop", "dgrad", "wgrad"))


@pytest.mark.parametrize("device", DEVICES)
def test_the_linears_of_a_region_are_narrowed_once_for_all_its_calls(device):
    model, x = Layers().to(device, torch.bfloat16), torch.randn(32, 64).to(device, torch.bfloat16)
    with observe() as compiles:
        assert_oracles(model, x)
    assert rewritten(compiles) == linears("layers.0.a", "layers.0.b")
    assert all(row.rewritten for c in compiles for row in c.rows)


def test_explain_shows_a_regions_gemms_and_no_bytes_that_it_cannot_know():
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    report = lpcompile.explain(Layers().bfloat16(), x, options=EAGER)
    shown = sorted((r.module, r.product) for r in report.rows if r.rewritten)
    assert shown == linears("layers.0.a", "layers.0.b")
    assert report.saved_bytes is None


def test_a_region_in_full_inductor_computes_what_the_same_layers_do_without_it():
    model, x = Layers().bfloat16(), torch.randn(32, 64, dtype=torch.bfloat16)
    plain = copy.deepcopy(model)
    for layer in plain.layers:
        layer.__class__ = Block
    options = {"codegen": "inductor", "fx_graph_cache": False}
    with observe() as compiles:
        made = step(compiled(model, **options), x)
    assert rewritten(compiles) == linears("layers.0.a", "layers.0.b")
    assert_alike(made, step(compiled(plain, **options), x), per_column(0.01))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_linears_of_both_branches_are_narrowed_forward_and_backward(sign, device):
    model, x = Branches().to(device, torch.bfloat16), torch.randn(32, 64).bfloat16().to(device)
    x[0, 0] = sign
    with observe() as compiles:
        assert_oracles(model, x)
    # The backward of a branch computes its forward again.
    assert set(rewritten(compiles)) == set(linears("a", "b"))
    assert all(row.rewritten for c in compiles for row in c.rows)
    sizes = {(row.m, row.n, row.k) for c in compiles for row in c.rows}
    assert sizes == {(32, 64, 64)}


def test_a_rule_reaches_both_directions_of_a_branch_and_of_a_region():
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    for model, name in ((Branches(), "a"), (Layers(), "layers.*.a")):
        torch._dynamo.reset()
        with observe() as compiles:
            step(compiled(model.bfloat16(), rules=[(name, "bf16")]), x)
        assert {m.rpartition(".")[2] for m, _ in rewritten(compiles)} == {"b"}
        left = sorted((r.module, r.product) for c in compiles for r in c.rows if not r.rewritten)
        assert left == linears(name.replace("*", "0"))
        assert compiles[0].unmatched == ()


def test_activations_that_a_region_multiplies_are_no_linear():
    @torch.compiler.nested_compile_region
    def product(x, y):
        return x @ y.t()

    def model(x, w):
        h = F.linear(x, w)
        return product(h, torch.tanh(h))

    x, w = torch.randn(64, 64).bfloat16(), nn.Parameter(torch.randn(64, 64).bfloat16())
    with observe() as compiles:
        compiled(model)(x.requires_grad_(), w).sum().backward()
    assert rewritten(compiles) == linears("")
    (reason,) = {r.reason for c in compiles for r in c.rows if not r.rewritten}
    assert reason == "a product of two activations"


def test_what_is_a_weight_in_one_call_of_a_region_and_not_in_another_is_none():
    @torch.compiler.nested_compile_region
    def product(x, y):
        return x @ y.t()

    def model(x, w):
        return product(x, torch.tanh(product(x, w)))

    x, w = torch.randn(64, 64).bfloat16(), nn.Parameter(torch.randn(64, 64).bfloat16())
    with observe() as compiles:
        compiled(model)(x.requires_grad_(), w).sum().backward()
    assert {r.reason for c in compiles for r in c.rows} == {"a product of two activations"}
