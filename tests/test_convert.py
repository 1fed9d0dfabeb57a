"""``convert``: linears over ``lpcompile.linear``, in place, and the compiled path's bits."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lpcompile
from lpcompile.errors import LowPrecisionError, RuleError, ShapeError
from lpcompile.options import Rule
from lpcompile.recipes import RECIPES

EAGER = {"rewrite": "all", "codegen": "eager"}
NARROW = [name for name, recipe in RECIPES.items() if not recipe.is_bf16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Block(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Experts(nn.Module):
    """A row to the expert of its highest score, as a grouped GEMM of sorted rows."""

    def __init__(self, count=24, dim=32):
        super().__init__()
        self.router = nn.Linear(dim, count, bias=False)
        self.weights = nn.Parameter(torch.randn(count, dim, dim) / 8)

    def forward(self, x):
        weight, expert = self.router(x).softmax(-1).max(-1)
        order = expert.argsort(stable=True)
        offs = torch.bincount(expert, minlength=len(self.weights)).cumsum(0).int()
        y = torch._grouped_mm(x[order], self.weights.mT, offs=offs)
        return weight[:, None] * y[order.argsort()]


class Model(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.embedding = nn.Embedding(48, 32)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.experts = Experts()
        self.gate = nn.Linear(32, 8)
        self.mixer = nn.MultiheadAttention(32, 2)
        self.head = nn.Linear(32, 48, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.experts(x) * self.gate(x).mean(-1, keepdim=True))


class One(nn.Module):
    """A linear in a module that is not torch's, whose own Dynamo would not compile."""

    def __init__(self, bias, device):
        super().__init__()
        self.linear = nn.Linear(64, 96, bias=bias, device=device, dtype=torch.bfloat16)

    def forward(self, x):
        return self.linear(x)


def run(f, x, parameters):
    x = x.detach().requires_grad_()
    y = f(x)
    torch.manual_seed(1)  # for dY and the seed that a stochastic backward draws
    return y.detach(), *torch.autograd.grad(y, [x, *parameters], torch.randn_like(y))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recipe", NARROW)
def test_a_converted_linear_has_the_bits_of_a_compiled_one(recipe, bias, device):
    converted = One(bias, device)
    compiled, plain = copy.deepcopy(converted), copy.deepcopy(converted)
    lpcompile.convert(converted, recipe)
    compiled.compile(backend="lowprec", options={"recipe": recipe, **EAGER}, fullgraph=True)
    x = torch.randn(2, 24, 64, device=device).bfloat16()
    made, expected, bf16 = (run(m, x, m.parameters()) for m in (converted, compiled, plain))
    for name, a, b in zip(("y", "dx", "dw", "db"), made, expected, strict=False):
        assert torch.equal(a, b), name
    assert not torch.equal(made[0], bf16[0])


def test_what_is_left_alone_is_named_with_its_reason():
    m = Model().bfloat16()
    report = lpcompile.convert(m, "mxfp8_wgrad_bf16", rules=[Rule("layers.*", "bf16", last=1)])
    why = {r.module: r.reason for r in report.rows if r.product == "fprop" and not r.rewritten}
    assert why == {
        "layers.2.up": "rule 'layers.*' of the last 1",
        "layers.2.down": "rule 'layers.*' of the last 1",
        "experts.router": "a router: it has a row for each of the experts beside it",
        "gate": "n=8 is below 16",
        "mixer": "'in_proj_weight' is not an nn.Linear's: its GEMMs are narrowed in a compiled "
        "model",
        "mixer.out_proj": "a NonDynamicallyQuantizableLinear, which may use its weight without "
        "calling nn.Linear",
        "head": "an LM head: it has a row for each row of an embedding",
    }
    done = {(r.module, r.product): (r.n, r.k, r.recipe) for r in report.rows if r.rewritten}
    sizes = {f"layers.{i}.up": (64, 32) for i in range(2)}
    sizes |= {f"layers.{i}.down": (32, 64) for i in range(2)} | {"experts": (32, 32)}
    assert done == {
        (name, product): (*size, "mxfp8_wgrad_bf16")
        for name, size in sizes.items()
        for product in ("fprop", "dgrad")
    }
    assert {r.reason for r in report.rows if (r.module, r.product) == ("layers.0.up", "wgrad")} == {
        "mxfp8_wgrad_bf16 leaves wgrad in bf16"
    }


def test_a_rule_that_names_the_head_or_the_router_narrows_it():
    report = lpcompile.convert(
        Model().bfloat16(), rules=[("head", "mxfp8"), ("experts.router", "nvfp4"), ("*", "bf16")]
    )
    assert {r.module: r.recipe for r in report.rows if r.rewritten} == {
        "head": "mxfp8",
        "experts.router": "nvfp4",
    }


def test_parameters_keys_and_hooks_are_those_of_before():
    m = Model().bfloat16()
    before = {name: id(p) for name, p in m.named_parameters()}
    keys, calls = list(m.state_dict()), []
    m.layers[0].up.register_forward_hook(lambda *_: calls.append(1))
    lpcompile.convert(m, "fp8_rowwise")
    assert {name: id(p) for name, p in m.named_parameters()} == before
    assert list(m.state_dict()) == keys
    tokens = torch.randint(48, (16,))
    y = m(tokens)
    assert calls == [1]
    twin = copy.deepcopy(m)
    assert torch.equal(twin(tokens), y)
    assert {type(p) for p in m.parameters()} == {nn.Parameter}


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8", "nvfp4"])
def test_converted_experts_have_the_bits_of_grouped_mm_and_are_copied_and_pickled(recipe):
    m = Experts().bfloat16()
    x = torch.randn(64, 32).bfloat16()
    plain = m(x)
    keys = list(m.state_dict())
    report = lpcompile.convert(m, recipe)
    done = {(r.module, r.product) for r in report.rows if r.rewritten}
    assert done == {("", product) for product in ("fprop", "dgrad", "wgrad")}
    assert list(m.state_dict()) == keys
    weight, expert = m.router(x).softmax(-1).max(-1)
    order = expert.argsort(stable=True)
    offs = torch.bincount(expert, minlength=24).cumsum(0).int()
    y = lpcompile.grouped_mm(x[order], m.weights.mT, offs, recipe=recipe)
    assert torch.equal(m(x), weight[:, None] * y[order.argsort()])
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(twin(x), m(x))
    assert lpcompile.switch(m, "bf16") == [""]
    assert torch.equal(m(x), plain)


def test_a_convolution_is_no_stack_of_experts():
    assert lpcompile.convert(nn.Sequential(nn.Conv1d(32, 32, 16))).rows == []


def test_under_autocast_fp32_parameters_are_cast_and_without_it_refused():
    linear = nn.Linear(64, 96)
    masters = copy.deepcopy(linear)
    lpcompile.convert(linear, "mxfp8")
    x = torch.randn(48, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    expected = lpcompile.linear(
        x.bfloat16(), masters.weight.bfloat16(), masters.bias.bfloat16(), recipe="mxfp8"
    )
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert linear.weight.grad.dtype is torch.float32
    with pytest.raises(ShapeError, match="autocast"):
        linear(x)


def test_a_converted_model_switches_but_for_what_a_rule_names():
    m = Model().bfloat16()
    lpcompile.convert(m, "bf16", rules=[("layers.1.*", "mxfp8"), ("layers.0.up", "bf16")])
    x = torch.randn(16, 32, dtype=torch.bfloat16)
    assert torch.equal(m.layers[2].up(x), F.linear(x, m.layers[2].up.weight, m.layers[2].up.bias))
    no_hadamard = replace(RECIPES["nvfp4"], wgrad=None)
    assert lpcompile.switch(m, no_hadamard) == [
        "layers.0.down",
        "layers.2.up",
        "layers.2.down",
        "experts",
    ]
    for i, recipe in ((1, "mxfp8"), (2, no_hadamard)):
        up = m.layers[i].up
        assert torch.equal(up(x), lpcompile.linear(x, up.weight, up.bias, recipe=recipe))


def test_converting_again_gives_the_other_recipe_and_a_wrong_rule_is_an_error():
    m = Model().bfloat16()
    lpcompile.convert(m, "fp8_rowwise")
    report = lpcompile.convert(m, "mxfp8")
    assert {r.recipe for r in report.rows if r.rewritten} == {"mxfp8"}
    assert m.layers[0].up.recipe == RECIPES["mxfp8"]
    with pytest.raises(RuleError, match="layers.0.up"):
        lpcompile.convert(m, rules=[("layers.0.upp", "bf16")])
    with pytest.raises(LowPrecisionError, match="nvfp4"):
        lpcompile.convert(m, "nvfp5")


class Wide(nn.Module):
    """As wide as it has positions, with matrices that no nn.Linear multiplies."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(48, 32), nn.Embedding(32, 32)
        self.patches = nn.Parameter(torch.randn(1, 64, 32))
        self.mix = nn.Parameter(torch.randn(32, 32))
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(32, 48, bias=False)


def test_a_model_as_wide_as_it_has_positions_is_narrowed_but_for_its_head():
    report = lpcompile.convert(Wide().bfloat16())
    done = {r.module for r in report.rows if r.rewritten}
    assert done == {f"layers.{i}.{name}" for i in range(2) for name in ("up", "down")}
    assert {r.module: r.reason for r in report.rows if not r.rewritten} == {
        "": "'mix' is not an nn.Linear's: its GEMMs are narrowed in a compiled model",
        "head": "an LM head: it has a row for each row of an embedding",
    }


def test_heads_of_models_side_by_side_stay():
    models = nn.ModuleDict({"policy": Wide(), "reference": Wide()}).bfloat16()
    left = {r.module: r.reason for r in lpcompile.convert(models).rows if not r.rewritten}
    assert all("an LM head" in left[f"{name}.head"] for name in models)


def test_a_second_derivative_is_an_error_and_no_wrong_gradient():
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(48, 64, dtype=torch.bfloat16, requires_grad=True)
    offs = torch.tensor([32], dtype=torch.int32)
    for y in (lpcompile.linear(x, w), lpcompile.grouped_mm(x, w.mT[None], offs)):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            dx.sum().backward()
