"""Every spelling of experts' products: roles, reasons, and the eager oracle's gradients."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from oracle import to_nearest
from torch import Tensor
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

import lpcompile
from lpcompile.ops.define import per_column
from lpcompile.pipeline import observe
from lpcompile.recipes import RECIPES, Gemm, Operand, Recipe

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NARROW = [name for name, recipe in RECIPES.items() if not recipe.is_bf16]
E, K, N = 5, 64, 48
COUNTS = (20, 0, 37, 1, 102)
T, PAST = sum(COUNTS), 8
EACH = {"fprop": 1, "dgrad": 1, "wgrad": 1}


def oracle(x, w, offs, recipe="fp8_rowwise"):
    """x[T, K] by w[E, N, K]."""
    return lpcompile.grouped_mm(x, w.mT, offs, recipe=recipe)


def each(x, w, recipe):
    """x[E, M, K] by w[E, N, K], one linear after another."""
    pairs = zip(x, w, strict=True)
    return torch.stack([lpcompile.linear(a, b, recipe=recipe) for a, b in pairs])


@dataclass(frozen=True)
class Case:
    """A spelling, the same through the oracle, and the shape of its weight."""

    name: str
    spelled: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    x: tuple[int, ...] = (T + PAST, K)
    w: tuple[int, ...] = (E, N, K)
    make: Callable[[Tensor], Tensor] = lambda x: x  # how x is laid out


def spelled(x, w, offs):
    return F.grouped_mm(x, w.mT, offs=offs)


RAGGED = [
    Case("F.grouped_mm", spelled, oracle),
    Case("_grouped_mm", lambda x, w, o: torch._grouped_mm(x, w.transpose(1, 2), o), oracle),
    Case(
        "a weight [E, K, N]",
        lambda x, w, o: F.grouped_mm(x, w, offs=o),
        lambda x, w, o: oracle(x, w.mT, o),
        w=(E, K, N),
    ),
    Case(
        "with a bias",
        lambda x, w, o: F.grouped_mm(x, w.mT, offs=o) + w.sum((0, 2)),
        lambda x, w, o: oracle(x, w, o) + w.sum((0, 2)),
    ),
    Case("through casts", lambda x, w, o: spelled(x, w.float().bfloat16(), o), oracle),
    Case("a transposed x", spelled, oracle, make=lambda x: x.t().clone().t()),
    Case(
        "a transposed result",
        lambda x, w, o: F.grouped_mm(x, w.mT, offs=o).t(),
        lambda x, w, o: oracle(x, w, o).t(),
    ),
    Case(
        "half of a weight",
        lambda x, w, o: F.grouped_mm(x, w[:, :32].mT, offs=o),
        lambda x, w, o: oracle(x, w[:, :32], o),
    ),
    Case("one expert", spelled, oracle, w=(1, N, K)),
]
BATCH = [
    Case("bmm", lambda x, w: torch.bmm(x, w.mT), each, x=(E, 24, K)),
    Case(
        "bmm [E, K, N]",
        torch.bmm,
        lambda x, w, recipe: each(x, w.mT, recipe),
        (E, 24, K),
        (E, K, N),
    ),
    Case("the weight first", lambda x, w: (w @ x.mT).mT, each, x=(E, 24, K)),
    Case("einsum", lambda x, w: torch.einsum("emk,enk->emn", x, w), each, x=(E, 24, K)),
    Case("3-d _grouped_mm", lambda x, w: torch._grouped_mm(x, w.mT), each, x=(E, 24, K)),
    Case(
        "baddbmm",
        lambda x, w: torch.baddbmm(w.sum(2)[:, None], x, w.mT),
        lambda x, w, recipe: each(x, w, recipe) + w.sum(2)[:, None],
        x=(E, 24, K),
    ),
    Case(
        "baddbmm of one expert",
        lambda x, w: torch.baddbmm(w.sum(2)[:, None], x, w.mT),
        lambda x, w, recipe: each(x, w, recipe) + w.sum(2)[:, None],
        (1, 24, K),
        (1, N, K),
    ),
    Case("of one expert", lambda x, w: torch._grouped_mm(x, w.mT), each, (1, 24, K), (1, N, K)),
]


def run(f, x, w, *args):
    """f(x, w) and its gradients under a fixed dY."""
    x, w = x.detach().requires_grad_(), torch.nn.Parameter(w.detach())
    y = f(x, w, *args)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y))
    return y.detach(), x.grad, w.grad


def compile(f, recipe="fp8_rowwise", **options):
    options = {"recipe": recipe, "rewrite": "all", "codegen": "eager", "verify": True, **options}
    return torch.compile(f, backend="lowprec", options=options, fullgraph=True)


def roles(compiles):
    return Counter(row.product for c in compiles for row in c.rows if row.rewritten)


def reasons(compiles):
    return {row.reason for c in compiles for row in c.rows if not row.rewritten}


def data(case, device):
    x = case.make(torch.randn(case.x, device=device).bfloat16())
    w = (torch.randn(case.w, device=device) / 8).bfloat16()
    if len(case.x) == 3:
        return x, w
    counts = COUNTS if case.w[0] == E else (T,)
    return x, w, torch.tensor(counts, device=device).cumsum(0).int()


def same(made, expected, rows=slice(T)):
    """Every gradient; of tokens, what is not past the last group."""
    for name, m, e in zip(("y", "dx", "dw"), made, expected, strict=True):
        if m.dim() == 2:
            m, e = (t[rows] if t.shape[0] == T + PAST else t[:, rows] for t in (m, e))
        assert per_column(0.006)(m, e) == "", name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", RAGGED, ids=lambda c: c.name)
def test_a_spelling_of_ragged_groups_has_its_roles_and_the_oracles_gradients(case, device):
    args = data(case, device)
    with observe() as compiles:
        made = run(compile(case.spelled), *args)
    assert roles(compiles) == EACH
    row = compiles[0].rows[0]
    n = 32 if case.name == "half of a weight" else N
    assert row[2:6] == (T + PAST, n, K, case.w[0])
    same(made, run(case.oracle, *args))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", BATCH, ids=lambda c: c.name)
@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_blockwise", "mxfp8", "nvfp4"])
def test_a_spelling_of_equal_groups_has_its_roles_and_the_oracles_gradients(case, recipe, device):
    x, w = data(case, device)
    recipe = to_nearest(RECIPES[recipe])
    with observe() as compiles:
        made = run(compile(case.spelled, recipe), x, w)
    assert roles(compiles) == EACH
    assert compiles[0].rows[0][2:6] == (case.x[0] * 24, N, K, case.w[0])
    same(made, run(lambda x, w: case.oracle(x, w, recipe), x, w))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", NARROW)
def test_a_recipe_narrows_the_products_it_names(recipe, device):
    args = data(RAGGED[0], device)
    with observe() as compiles:
        made = run(compile(spelled, recipe), *args)
    named = RECIPES[recipe].grouped or RECIPES[recipe]
    assert roles(compiles) == {p: 1 for p in EACH if named.gemm(p) is not None}
    same(made, run(lambda *a: oracle(*a, recipe), *args))


@pytest.mark.parametrize(
    ("freeze", "expected"),
    [("x", {"fprop": 1, "wgrad": 1}), ("w", {"fprop": 1, "dgrad": 1})],
)
def test_what_needs_no_gradient_has_no_product(freeze, expected):
    x, w, offs = data(RAGGED[0], "cpu")
    w = torch.nn.Parameter(w, requires_grad=freeze != "w")
    with observe() as compiles:
        compile(spelled)(x.requires_grad_(freeze != "x"), w, offs).sum().backward()
    assert roles(compiles) == expected


def test_inference_narrows_fprop_alone():
    args = data(RAGGED[0], "cpu")
    with observe() as compiles, torch.no_grad():
        made = compile(spelled)(*args[:1], torch.nn.Parameter(args[1]), args[2])
    assert roles(compiles) == {"fprop": 1}
    assert torch.equal(made[:T], oracle(*args)[:T])


def test_equal_inputs_of_two_experts_products_are_quantized_once():
    def gated(x, w, v, offs):
        return F.silu(F.grouped_mm(x, w.mT, offs=offs)) * F.grouped_mm(x, v.mT, offs=offs)

    x, w, offs = data(RAGGED[0], "cpu")
    compiled = compile(gated)
    args = (x.requires_grad_(), *(torch.nn.Parameter(t) for t in (w, w.flip(0))), offs)
    compiled(*args).sum().backward()
    with profile() as profiled:
        compiled(*args).sum().backward()
    calls = Counter(event.name for event in profiled.events())
    assert calls["lpcompile::scaled_grouped_mm"] == 6
    assert calls["lpcompile::quantize_fp8_grouped_t"] == 1  # x
    assert calls["lpcompile::fused_quantize_row"] == 3  # x, both weights, and maxima of each
    assert calls["lpcompile::quantize_fp8_row"] == 0
    assert calls["lpcompile::amax_column"] == calls["lpcompile::amax_column_grouped"] == 0
    assert calls["lpcompile::fused_amax"] == 1  # the gradients of both


@pytest.mark.parametrize("recipe", NARROW)
def test_less_is_saved_for_the_backward_and_no_weight(recipe):
    x, w, offs = data(replace(RAGGED[0], x=(2048, K)), "cpu")
    offs = offs * 10

    def two(x, w, offs):
        h = F.silu(F.grouped_mm(x * 2, w.mT, offs=offs))
        return F.grouped_mm(h, w, offs=offs)

    with observe(measures=True) as compiles:
        run(compile(two, recipe), x, w, offs)
    saved = compiles[0].saved_bytes
    narrow = RECIPES[recipe].wgrad is not None
    assert saved.after < saved.before if narrow else saved.after <= saved.before


def test_a_checkpointed_product_is_narrowed_in_its_recompute_too():
    def f(x, w, offs):
        return checkpoint(spelled, torch.tanh(x), w, offs, use_reentrant=False)

    args = data(RAGGED[0], "cpu")
    with observe() as compiles:
        made = run(compile(f), *args)
    assert set(roles(compiles)) == set(EACH)
    same(made, run(lambda x, w, o: oracle(torch.tanh(x), w, o), *args))


def test_another_number_of_tokens_does_not_recompile():
    compiled = compile(spelled)
    x, w, offs = data(RAGGED[0], "cpu")
    torch._dynamo.mark_dynamic(x, 0)
    with observe() as compiles:
        run_dynamic(compiled, x, w, offs)
        again = torch.randn(T + 40, K).bfloat16()
        torch._dynamo.mark_dynamic(again, 0)
        made = run_dynamic(compiled, again, w, offs)
    assert len(compiles) == 1
    expected = oracle(again, w, offs)
    assert per_column(0.006)(made[:T], expected[:T]) == ""


def run_dynamic(f, x, w, offs):
    y = f(x, torch.nn.Parameter(w), offs)
    y.sum().backward()
    return y.detach()


def gathered(x, w):
    """What Hugging Face calls batched_mm: a weight matrix for each token."""
    return torch.bmm(w[x.abs().argmax(1) % len(w)], x.unsqueeze(-1)).squeeze(-1)


def gathered_in_order(x, w):
    return torch.bmm(w[torch.arange(len(x)) % len(w)], x.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize(
    ("f", "x", "said"),
    [
        (gathered, (32, K), "gathers a weight matrix for each token"),
        (gathered_in_order, (32, K), "gathers a weight matrix for each token"),
        (
            lambda x, w: torch.bmm(x, w[:1].mT.expand(E, K, N)),
            (E, 24, K),
            "a batch that shares one weight",
        ),
        (
            lambda x, w: torch.bmm(torch.tanh(x), x.mT) * w.sum(),
            (E, 24, K),
            "a product of two activations",
        ),
    ],
    ids=["batched_mm", "batched_mm by constants", "one weight", "two activations"],
)
def test_a_batch_that_is_no_group_of_experts_is_left_with_the_reason(f, x, said, caplog):
    w = torch.randn(E, N, K).bfloat16()
    with observe() as compiles:
        run(compile(f), torch.randn(x).bfloat16(), w)
    assert not roles(compiles)
    assert all(said in reason for reason in reasons(compiles)), reasons(compiles)


def test_blocks_that_tokens_cannot_have_are_left_with_the_reason(caplog):
    args = data(RAGGED[0], "cpu")
    square = Operand("mxfp8", (32, 32))
    gemm = Gemm(square, square)
    with observe() as compiles:
        run(compile(spelled, Recipe(gemm, gemm, gemm)), *args)
    assert not roles(compiles)
    assert all("cannot be mxfp8 in blocks of (32, 32)" in reason for reason in reasons(compiles))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", ["no Hadamard", "1x16 weights", "32x32 weights", "floor"])
def test_a_recipe_with_another_part_has_the_oracles_gradients(part, device):
    x, w = Operand("nvfp4", (1, 16)), Operand("nvfp4", (16, 16))
    mx, square = Operand("mxfp8", (1, 32)), Operand("mxfp8", (32, 32))
    floor = Gemm(*[Operand("mxfp8_floor", (1, 32))] * 2)
    recipe = {
        "no Hadamard": Recipe(Gemm(x, w), Gemm(x, w), Gemm(x, x)),
        "1x16 weights": replace(RECIPES["nvfp4"], fprop=Gemm(x, x)),
        "32x32 weights": Recipe(Gemm(mx, square), Gemm(mx, square), Gemm(mx, mx)),
        "floor": Recipe(floor, floor, floor),
    }[part]
    args = data(RAGGED[0], device)
    with observe() as compiles:
        made = run(compile(spelled, recipe), *args)
    assert roles(compiles) == EACH
    same(made, run(lambda *a: oracle(*a, recipe), *args))


def test_two_experts_products_draw_apart():
    """Of one dY, under one seed: what each rounds stochastically takes a draw of its own."""

    def both(x, w, v, offs):
        return torch.cat([F.grouped_mm(x, w.mT, offs=offs), F.grouped_mm(x, v.mT, offs=offs)], 1)

    x, w, offs = data(RAGGED[0], "cpu")
    twin = torch.nn.Parameter(w), torch.nn.Parameter(w.clone())
    compile(both, "nvfp4")(x[:T].requires_grad_(), *twin, offs).backward(
        torch.randn(T, N).bfloat16().repeat(1, 2)
    )
    first, second = (p.grad for p in twin)
    differ = (first != second).flatten(1).float().mean(1)
    assert bool((differ[torch.tensor(COUNTS) > 1] > 0.5).all())


def test_one_expert_has_the_grouped_part_of_its_recipe():
    case = next(c for c in RAGGED if c.name == "one expert")
    args = data(case, "cpu")
    made = run(compile(case.spelled, "fp8_tensorwise"), *args)
    same(made, run(lambda *a: oracle(*a, "fp8_tensorwise"), *args))
