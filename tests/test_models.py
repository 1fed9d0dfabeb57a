"""What real models put around a linear: roles, reasons and gradients through a whole module."""

import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lpcompile
from lpcompile.ops.define import per_column
from lpcompile.pipeline import observe

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EAGER = {"rewrite": "all", "codegen": "eager"}
close = per_column(0.02)


class FFN(nn.Module):
    def __init__(self, dim=64, hidden=96, bias=False):
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.w1 = nn.Linear(dim, hidden, bias)
        self.w3 = nn.Linear(dim, hidden, bias)
        self.w2 = nn.Linear(hidden, dim, bias)

    def forward(self, x):
        h = self.norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class OracleLinears(torch.overrides.TorchFunctionMode):
    """Every F.linear through the eager oracle."""

    def __init__(self, recipe="fp8_rowwise"):
        super().__init__()
        self.recipe = recipe

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            return lpcompile.linear(*args, **(kwargs or {}), recipe=self.recipe)
        return func(*args, **(kwargs or {}))


def step(model, x, loss=lambda y: y):
    """Output and every gradient by name, under a fixed dY."""
    model.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    y = loss(model(x))
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **({"x": x.grad} if x.requires_grad else {}), **grads}


def compiled(model, **options):
    return torch.compile(model, backend="lowprec", options={**EAGER, **options}, fullgraph=True)


def to_nearest(recipe):
    """A recipe without stochastic rounding."""

    def gemm(how):
        return how and replace(how, lhs=replace(how.lhs, rounding="nearest"))

    return replace(recipe, dgrad=gemm(recipe.dgrad), wgrad=gemm(recipe.wgrad))


def roles(compiles, **where):
    return dict(
        Counter(
            row.product
            for c in compiles
            for row in c.rows
            if row.rewritten and all(getattr(row, k) == v for k, v in where.items())
        )
    )


def times(count):
    return {"fprop": count, "dgrad": count, "wgrad": count}


def reasons(compiles):
    return {row.module: row.reason for c in compiles for row in c.rows if not row.rewritten}


def assert_close(made, expected):
    assert made.keys() == expected.keys()
    for name, m in made.items():
        e = expected[name]
        flat = (t.reshape(-1, t.shape[-1] if t.dim() > 1 else 1).float() for t in (m, e))
        assert close(*flat) == "", name


def bf16(model, device="cpu"):
    return model.to(device, torch.bfloat16)


def data(*shape, device="cpu", grad=True):
    return torch.randn(*shape, device=device, dtype=torch.bfloat16).requires_grad_(grad)


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


def test_functional_call_takes_matrices_that_require_grad_for_weights():
    model, x = bf16(FFN()), data(32, 64, grad=False)
    weights = {k: p.detach().requires_grad_() for k, p in model.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(model, weights, (x,))

    fast = torch.compile(loss, backend="lowprec", options=EAGER, fullgraph=True)
    with observe() as compiles:
        fast(weights, x).sum().backward()
    assert roles(compiles) == times(3)


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


def must_save_mm(ctx, op, *args, **kwargs):
    saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_tensorwise"])
@pytest.mark.parametrize("policy", [None, must_save_mm], ids=["all", "selective"])
def test_a_checkpointed_block_keeps_its_policy(policy, recipe):
    model, x = bf16(FFN()), data(3, 16, 64)
    context = {}
    if policy:
        context["context_fn"] = lambda: create_selective_checkpoint_contexts(policy)

    def block(x):
        return checkpoint(model, x, use_reentrant=False, **context)

    fast = torch.compile(
        block, backend="lowprec", options={**EAGER, "recipe": recipe}, fullgraph=True
    )
    with observe(measures=True) as compiles:
        y = fast(x)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape).to(y))
    made = {"y": y.detach(), "x": x.grad, "w2.weight": model.w2.weight.grad}
    made["w1.weight"], x.grad = model.w1.weight.grad, None
    assert roles(compiles) == times(3)
    with OracleLinears(recipe):
        expected = step(model, x)
    assert_close(made, {k: expected[k] for k in made})
    # x alone is saved, or with it what the policy says: the outputs of the three products.
    rows = x.numel() * x.element_size()
    before, after = compiles[0].saved_bytes
    assert after == before
    assert (after == rows) == (policy is None)


def test_what_the_backward_holds_anyway_is_not_saved_narrowed_too():
    def swiglu(x, w1, w3, w2):
        return (F.silu(x @ w1.t()) * (x @ w3.t())) @ w2.t()

    (m, dim, hidden), x = (64, 64, 96), data(64, 64)
    weights = [nn.Parameter(torch.randn(s).bfloat16()) for s in [(96, 64), (96, 64), (64, 96)]]
    with observe(measures=True) as compiles:
        compiled(swiglu)(x, *weights).sum().backward()
    before, after = compiles[0].saved_bytes
    assert before == 2 * m * (dim + 3 * hidden)  # x, gate, up and h = silu(gate) * up
    assert after == 2 * m * (dim + 2 * hidden)  # h is made again where it is narrowed


def test_what_the_backward_does_not_hold_is_saved_narrow():
    def deep(x, w1, w2):
        return x @ w1.t() @ w2.t()

    (m, dim, hidden), x = (64, 64, 96), data(64, 64)
    weights = [nn.Parameter(torch.randn(s).bfloat16()) for s in [(96, 64), (64, 96)]]
    with observe(measures=True) as compiles:
        compiled(deep)(x, *weights).sum().backward()
    before, after = compiles[0].saved_bytes
    assert before == 2 * m * (dim + hidden)
    assert after == 2 * m * dim + m * hidden + 4 * hidden  # h.T of one byte, a scale a column


def test_a_memory_budget_saves_less_and_recomputes_no_weight():
    saved = {}
    for budget in (1.0, 0.4):
        torch._dynamo.reset()
        model, x = bf16(FFN(64, 256)), data(64, 64)
        with (
            torch._functorch.config.patch(activation_memory_budget=budget),
            observe(measures=True) as compiles,
        ):
            made = step(compiled(model), x)
        with OracleLinears():
            expected = step(model, x)
        assert_close({k.removeprefix("_orig_mod."): v for k, v in made.items()}, expected)
        saved[budget] = compiles[0].saved_bytes.after
    assert 0 < saved[0.4] < saved[1.0]


def test_no_copy_of_a_weight_is_saved():
    model, x = FFN(), torch.randn(48, 64, requires_grad=True)
    fast = compiled(model)
    sizes = set()

    def pack(t):
        sizes.add((tuple(t.shape), t.dtype, t.data_ptr()))
        return t

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        fast(x).sum().backward()
    own = {p.data_ptr() for p in model.parameters()}
    matrices = {tuple(sorted(p.shape)) for p in model.parameters() if p.dim() == 2}
    copies = [s for s in sizes if tuple(sorted(s[0])) in matrices and s[2] not in own]
    assert sizes
    assert copies == []


def test_every_backward_draws_a_seed_of_its_own():
    w, x = nn.Parameter(torch.randn(96, 64).bfloat16()), data(64, 64)
    with torch._functorch.config.patch(donated_buffer=False):
        y = compiled(F.linear, recipe="nvfp4")(x, w)
        dy = torch.randn(64, 96).bfloat16()
        first, second = (torch.autograd.grad(y, (x, w), dy, retain_graph=True) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
