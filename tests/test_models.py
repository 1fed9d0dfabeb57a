"""What real models put around a linear: roles, reasons and gradients through a whole module."""

import logging

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DEVICES,
    EAGER,
    FFN,
    OracleLinears,
    assert_close,
    bf16,
    compiled,
    data,
    reasons,
    roles,
    step,
    times,
    to_nearest,
)
from torch import nn

import lpcompile
from lpcompile.pipeline import observe


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", [n for n, r in lpcompile.RECIPES.items() if not r.is_bf16])
@pytest.mark.parametrize("bias", [False, True])
def test_an_ffn_has_the_oracles_gradients(recipe, bias, device):
    # The oracle draws a seed for every linear, the graph one for all: to nearest, they agree.
    chosen = to_nearest(lpcompile.RECIPES[recipe])
    model, x = bf16(FFN(bias=bias), device), data(3, 16, 64, device=device)
    with observe() as compiles:
        made = step(compiled(model, recipe=chosen), x)
    with OracleLinears(chosen):
        expected = step(model, x)
    made = {name.removeprefix("_orig_mod."): t for name, t in made.items()}
    assert sum(roles(compiles).values()) == 3 * sum(
        lpcompile.RECIPES[recipe].gemm(p) is not None for p in ("fprop", "dgrad", "wgrad")
    )
    assert_close(made, expected)


@pytest.mark.parametrize(
    ("freeze", "grad", "expected"),
    [
        ("w1", True, {"fprop": 3, "dgrad": 3, "wgrad": 2}),
        ("", False, {"fprop": 3, "dgrad": 3, "wgrad": 3}),
    ],
    ids=["a frozen weight", "x without grad"],
)
def test_products_that_nobody_needs_are_not_there(freeze, grad, expected):
    model, x = bf16(FFN()), data(3, 16, 64, grad=grad)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not freeze or freeze not in name)
    with observe() as compiles:
        step(compiled(model), x)
    assert roles(compiles) == expected


def test_a_first_layer_whose_x_needs_no_grad_has_no_dgrad():
    model = bf16(nn.Linear(64, 64))
    with observe() as compiles:
        step(compiled(model), data(16, 64, grad=False))
    assert roles(compiles) == {"fprop": 1, "wgrad": 1}


def test_tied_weights_are_rewritten_under_both_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    model, x = bf16(Tied()), data(32, 64)
    with observe() as compiles:
        made = step(compiled(model), x)
    assert roles(compiles, module="a") == times(1)
    assert roles(compiles, module="b") == times(1)
    with OracleLinears():
        expected = step(model, x)
    assert_close({k.removeprefix("_orig_mod."): v for k, v in made.items()}, expected)


def test_an_lm_head_that_shares_the_embeddings_weight_stays_bf16():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.q, self.r = nn.Embedding(80, 64), nn.Linear(64, 64), nn.Linear(64, 80)
            self.r.weight = self.p.weight

        def forward(self, i):
            return self.r(torch.tanh(self.q(self.p(i))))

    model = bf16(Model())
    with observe() as compiles:
        compiled(model)(torch.randint(0, 80, (4, 16))).sum().backward()
    assert roles(compiles) == roles(compiles, module="q") == times(1)
    assert "embedding" in reasons(compiles)["r"]


def test_what_feeds_a_cross_entropy_stays_bf16():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.z = nn.Linear(64, 64), nn.Linear(64, 80)

        def forward(self, x):
            logits = torch.tanh(self.z(torch.tanh(self.q(x))) / 30) * 30
            return F.cross_entropy(logits.float(), torch.zeros(len(x), dtype=torch.long))

    with observe() as compiles:
        step(compiled(bf16(Model())), data(32, 64))
    assert roles(compiles) == roles(compiles, module="q") == times(1)
    assert "softmax" in reasons(compiles)["z"]


class Vocabulary(nn.Module):
    """Tables of 80 tokens and 64 positions, a linear, and a head with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.p, self.o = nn.Embedding(80, 64), nn.Embedding(64, 64)
        self.q, self.z = nn.Linear(64, 64), nn.Linear(64, 80)

    def forward(self, i):
        keys = self.q(self.p(i) + self.o(torch.arange(i.shape[1])))  # come out too, as to a cache
        return torch.tanh(self.z(torch.tanh(keys)).float() / 30) * 30, keys


@pytest.mark.parametrize("training", [True, False])
def test_a_head_whose_loss_is_computed_elsewhere_stays_bf16(training):
    with observe() as compiles, torch.set_grad_enabled(training):
        logits, _ = compiled(bf16(Vocabulary()))(torch.randint(0, 80, (4, 16)))
    if training:
        logits.sum().backward()
    assert (
        roles(compiles) == roles(compiles, module="q") == (times(1) if training else {"fprop": 1})
    )
    assert "a row for each row of an embedding" in reasons(compiles)["z"]


@pytest.mark.parametrize("training", [True, False])
def test_a_head_stays_bf16_where_sizes_change(training):
    model = compiled(bf16(Vocabulary()))
    with observe() as compiles, torch.set_grad_enabled(training):
        for length in (16, 24):
            logits, _ = model(torch.randint(0, 80, (4, length)))
    assert len(compiles) == 2
    assert "a row for each row of an embedding" in reasons(compiles[1:])["z"]


def test_a_cache_as_wide_as_a_small_vocabulary_is_no_head():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.k = nn.Embedding(64, 64), nn.Linear(64, 64)

        def forward(self, i):
            return self.k(self.p(i))

    with observe() as compiles, torch.no_grad():
        compiled(bf16(Model()))(torch.randint(0, 64, (4, 16)))
    assert roles(compiles, module="k") == {"fprop": 1}


def test_a_linear_as_wide_as_the_vocabulary_that_feeds_others_is_no_head():
    class Model(Vocabulary):
        def forward(self, i):
            x = self.q(self.p(i))
            return x + torch.tanh(self.z(x))[..., :64]

    with observe() as compiles:
        compiled(bf16(Model()))(torch.randint(0, 80, (4, 16))).sum().backward()
    assert roles(compiles) == times(2)


@pytest.mark.parametrize("gate", [torch.sigmoid, lambda x: x.softmax(-1), lambda x: x])
def test_a_router_stays_bf16_whatever_it_is_called(gate):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.z = nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False)
            self.register_buffer("offset", torch.zeros(32))

        def forward(self, x):
            scores = gate(self.z(x).float())
            best = (scores + self.offset).topk(2).indices
            return self.q(x) * scores.gather(1, best).sum(1, keepdim=True).to(x.dtype)

    with observe() as compiles:
        step(compiled(bf16(Model())), data(32, 64))
    assert roles(compiles) == roles(compiles, module="q") == times(1)
    assert "top-k" in reasons(compiles)["z"]


def test_linears_before_an_attention_are_no_gates_of_what_comes_after_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(64, 64, bias=False)

        def forward(self, x):
            q = self.q(x).view(1, 1, 32, 64)
            return F.scaled_dot_product_attention(q, q, q).softmax(-1)

    with observe() as compiles:
        step(compiled(bf16(Model())), data(32, 64))
    assert roles(compiles, module="q") == times(1)


def test_a_rule_that_names_a_router_narrows_it_and_a_star_does_not():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.z = nn.Linear(64, 32, bias=False)

        def forward(self, x):
            return self.z(x).topk(2).values

    for pattern, expected in (("z", times(1)), ("*", {})):
        torch._dynamo.reset()
        with observe() as compiles:
            step(compiled(bf16(Model()), rules=[(pattern, "fp8_rowwise")]), data(32, 64))
        assert roles(compiles) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gemms_of_other_dtypes_are_left_with_what_to_do(dtype, caplog):
    model, x = nn.Linear(64, 64).to(dtype), torch.randn(32, 64, dtype=dtype)
    with observe() as compiles, caplog.at_level(logging.WARNING, "lpcompile"):
        compiled(model)(x)
    assert roles(compiles) == {}
    assert "torch.autocast('cpu', torch.bfloat16)" in reasons(compiles)[""]
    assert "0 of 2 GEMMs narrowed" in caplog.text


def test_a_graph_without_a_gemm_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "lpcompile"):
        compiled(nn.ReLU())(data(4, 4))
    assert "no GEMM in this graph" in caplog.text


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_over_master_weights_is_narrowed_and_wgrad_written_in_fp32(device):
    model, x = FFN().to(device), torch.randn(48, 64, device=device, requires_grad=True)
    fast = compiled(model)
    with observe() as compiles, torch.autocast(device, torch.bfloat16):
        made = step(fast, x, lambda y: y.float())
    with OracleLinears(), torch.autocast(device, torch.bfloat16):
        expected = _autocast_oracle(model, x)
    assert roles(compiles) == times(3)
    made = {k.removeprefix("_orig_mod."): v for k, v in made.items()}
    assert {t.dtype for k, t in made.items() if k.startswith("w")} == {torch.float32}
    assert_close(made, expected)
    # fp32 all the way: a bf16 rounding would leave 16 zero bits.
    assert (made["w2.weight"].view(torch.int32) & 0xFFFF).any() or device != "cpu"


def _autocast_oracle(model, x):
    class Cast(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.linear:
                return lpcompile.linear(*(a.bfloat16() for a in args if a is not None))
            return func(*args, **(kwargs or {}))

    with Cast():
        return step(model, x, lambda y: y.float())


def test_mark_dynamic_sizes_compile_once():
    model = bf16(FFN())
    fast = compiled(model)
    with observe() as compiles:
        for batch, tokens in ((3, 16), (5, 24), (2, 40)):
            x = data(batch, tokens, 64)
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
            made = fast(x)
            made.sum().backward()
            with OracleLinears():
                assert_close({"y": made.detach()}, {"y": model(x).detach()})
    assert len(compiles) == 1
    assert roles(compiles) == times(3)


def test_inference_and_no_grad_share_quantizes():
    model, x = bf16(FFN()), data(32, 64, grad=False)
    fast = compiled(model)
    for context in (torch.no_grad, torch.inference_mode):
        torch._dynamo.reset()
        with context(), observe() as compiles:
            made = fast(x)
        assert roles(compiles) == {"fprop": 3}
        assert compiles[0].counts["deduplicate"] > 0
        with OracleLinears(), torch.no_grad():
            assert_close({"y": made}, {"y": model(x)})


def test_a_graph_break_leaves_two_graphs_that_are_both_narrowed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            h = self.a(x)
            torch._dynamo.graph_break()
            return self.b(h)

    model = bf16(Model())
    fast = torch.compile(model, backend="lowprec", options=EAGER)
    with observe() as compiles:
        fast(data(32, 64)).sum().backward()
    assert [roles([c]) for c in compiles] == [times(1), times(1)]


@pytest.mark.parametrize("grad", [False, True], ids=["tokens", "what a layer before made"])
def test_functional_call_takes_matrices_that_require_grad_for_weights(grad):
    model, x = bf16(FFN()), torch.tanh(data(32, 64, grad=grad))
    weights = {k: p.detach().requires_grad_() for k, p in model.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(model, weights, (x,))

    fast = torch.compile(loss, backend="lowprec", options=EAGER, fullgraph=True)
    with observe() as compiles:
        fast(weights, x).sum().backward()
    assert roles(compiles) == times(3)


def test_a_product_without_a_parameter_is_left_with_what_is_missing():
    x = data(32, 64)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(64, 64)
            self.register_buffer("fixed", data(96, 64, grad=False))

        def forward(self, x):
            return F.linear(self.up(x), self.fixed)

    with observe() as compiles:
        compiled(bf16(Model()))(x).sum().backward()
    assert roles(compiles) == roles(compiles, module="up") == times(1)
    assert "an operand is a buffer or a constant" in reasons(compiles)[""]
    torch._dynamo.reset()
    with observe() as compiles:
        compiled(lambda x, w: F.linear(x, w))(x.detach(), data(96, 64, grad=False))
    assert "two activations: no input of this graph is a Parameter" in reasons(compiles)[""]
    torch._dynamo.reset()
    with observe() as compiles:
        compiled(lambda x, w: F.linear(x, w))(x, data(96, 64))
    assert "two weights: no input of this graph is a Parameter" in reasons(compiles)[""]


def test_the_gradients_of_a_merged_adapter_stay_bf16_as_its_product_does():
    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(64, 96, bias=False).requires_grad_(False)
            self.a = nn.Parameter(torch.randn(96, 32) / 8)
            self.b = nn.Parameter(torch.randn(32, 64) / 8)

        def forward(self, x):
            return F.linear(x, self.base.weight + self.a @ self.b)

    with observe() as compiles:
        step(compiled(bf16(Merged())), data(32, 64))
    assert roles(compiles) == times(1)
    left = [r.reason for c in compiles for r in c.rows if not r.rewritten]
    assert left == ["a product of two weights"] * 3


def test_gemms_in_a_users_autograd_function_have_their_roles():
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w.t()

        @staticmethod
        def backward(ctx, dy):
            x, w = ctx.saved_tensors
            return dy @ w, dy.t() @ x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(96, 64))

        def forward(self, x):
            return Own.apply(x, self.w)

    model, x = bf16(Model()), data(32, 64)
    with observe() as compiles:
        made = step(compiled(model), x)
    assert roles(compiles) == times(1)
    w = nn.Parameter(model.w.detach().clone())
    y = lpcompile.linear(x, w)
    torch.manual_seed(1)
    dx, dw = torch.autograd.grad(y, (x, w), torch.randn(y.shape).to(y))
    assert_close(made, {"y": y.detach(), "x": dx, "_orig_mod.w": dw})
