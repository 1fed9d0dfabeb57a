"""Loops over experts: which become grouped products, their gradients, and why others do not."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config

import lpcompile
from lpcompile import Rule
from lpcompile.ops.define import per_column
from lpcompile.pipeline import observe
from lpcompile.recipes import BF16, RECIPES

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FP8 = ["fp8_rowwise", "fp8_tensorwise", "fp8_blockwise", "fp8_rowwise_wgrad_bf16"]
E, K, N = 4, 64, 48
COUNTS, KNOWN = (10, 0, 33, 21), (10, 1, 33, 20)  # an expert of no rows that is known is no GEMM
T = sum(COUNTS)


@pytest.fixture(autouse=True)
def sizes_in_the_graph():
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield


def slices(x, counts):
    """x[a:b] of every expert, with what has to be said of sizes that are not known."""
    a = 0
    for size in counts.tolist():
        b = a + size
        torch._check(size >= 0)
        torch._check(b <= len(x))
        yield x[a:b]
        a = b
    torch._check(a == len(x))


def split(x, counts):
    return torch.split(x, counts.tolist())


def by_ends(x, counts):
    a, made = 0, []
    for b in counts.cumsum(0).tolist():
        torch._check(b >= a)
        torch._check(b <= len(x))
        made.append(x[a:b])
        a = b
    torch._check(a == len(x))
    return made


def swiglu(x, w1, w3, w2):
    return (F.silu(x @ w1) * (x @ w3)) @ w2


def product(x, w, counts, recipe):
    offs = counts.cumsum(0, dtype=torch.int32)
    return lpcompile.grouped_mm(x, w, offs, recipe=recipe)


def gated(x, w, counts, recipe):
    gate, up = (product(x, v, counts, recipe) for v in (w, w.flip(0)))
    return product(F.silu(gate) * up, w.mT.flip(1), counts, recipe)


@dataclass(frozen=True)
class Case:
    """A loop over w[E, K, N], the same through the oracle, and how many products it has."""

    name: str
    loop: Callable[..., Tensor]
    oracle: Callable[..., Tensor] = product
    products: int = 1


def loop(of, pick=slices):
    """The results of every expert, put together; ``of`` takes its rows, all weights, its number."""

    def f(x, w, counts):
        return torch.cat([of(t, w, e) for e, t in enumerate(pick(x, counts))])

    return f


def halves(t, w, e):
    gate, up = (t @ w[e]).chunk(2, -1)
    return torch.cat([gate * up.sigmoid(), up], 1)


def halves_oracle(x, w, counts, recipe):
    gate, up = product(x, w, counts, recipe).chunk(2, -1)
    return torch.cat([gate * up.sigmoid(), up], 1)


def unbound(x, w, counts):
    return torch.cat([t @ v for t, v in zip(split(x, counts), w.unbind(), strict=True)])


def weighted(x, w, counts):
    scores = x.sum(1).sigmoid()
    parts = zip(split(x, counts), split(scores, counts), strict=True)
    return torch.cat([(t @ w[e]) * s.unsqueeze(-1) for e, (t, s) in enumerate(parts)])


def with_bias(x, w, counts):
    parts = enumerate(split(x, counts))
    return torch.cat([F.silu(F.linear(t, w.mT[e], w[:, 0][e])) for e, t in parts])


def biased(x, w, counts, recipe):
    biases = torch.repeat_interleave(w[:, 0], counts, 0)
    return F.silu(product(x, w, counts, recipe) + biases)


def some_experts(x, w, counts):
    w = torch.cat([w[:1], w, w[:1]])
    return torch.cat([t @ w[e] for e, t in enumerate(split(x, counts), 1)])


CASES = [
    Case("x[a:b] @ w[e]", loop(lambda t, w, e: t @ w[e])),
    Case("F.linear", loop(lambda t, w, e: F.linear(t, w.mT[e]), split)),
    Case("F.linear of a transposed weight", loop(lambda t, w, e: F.linear(t, w[e].t()), split)),
    Case("sizes from ends", loop(lambda t, w, e: t @ w[e], by_ends)),
    Case("numbers for sizes", loop(lambda t, w, e: t @ w[e], lambda x, _: x.split(KNOWN))),
    Case(
        "numbers for ends",
        loop(lambda t, w, e: t @ w[e], lambda x, _: (x[:10], x[10:11], x[11:44], x[44:])),
    ),
    Case("weights unbound", unbound),
    Case("a bias for every expert", with_bias, biased),
    Case("some of the experts", some_experts),
    Case(
        "weights in fp32",
        loop(lambda t, w, e: t @ w.float()[e].bfloat16(), split),
    ),
    Case(
        "SwiGLU",
        loop(lambda t, w, e: swiglu(t, w[e], w.flip(0)[e], w.mT.flip(1)[e])),
        gated,
        3,
    ),
    Case("halves of a product", loop(halves, split), halves_oracle),
    Case(
        "weighted rows",
        weighted,
        lambda x, w, counts, recipe: product(x, w, counts, recipe) * x.sum(1, True).sigmoid(),
    ),
]


def run(f, x, w, *args):
    """f(x, w) and its gradients under a fixed dY."""
    x, w = x.detach().requires_grad_(), nn.Parameter(w.detach())
    y = f(x, w, *args)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y))
    return y.detach(), x.grad, w.grad


def compiled(f, recipe="fp8_rowwise", **options):
    options = {"recipe": recipe, "rewrite": "all", "codegen": "eager", **options}
    return torch.compile(f, backend="lowprec", options=options, fullgraph=True)


def data(device="cpu", counts=COUNTS):
    torch.manual_seed(0)
    x = torch.randn(sum(counts), K, device=device).bfloat16()
    w = (torch.randn(E, K, N, device=device) / 8).bfloat16()
    return x, w, torch.tensor(counts, device=device)


def roles(compiles):
    return Counter(
        (row.product, row.num_groups) for c in compiles for row in c.rows if row.rewritten
    )


def reasons(compiles):
    return {row.reason for c in compiles for row in c.rows}


def times(count, num_groups=E):
    return {(product, num_groups): count for product in ("fprop", "dgrad", "wgrad")}


def assert_same(made, expected, bound=0.006):
    for name, m, e in zip(("y", "dx", "dw"), made, expected, strict=True):
        assert per_column(bound)(m, e) == "", name


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


class Expert(nn.Module):
    def __init__(self, dim=K, hidden=N, bias=False):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(dim, hidden, bias) for _ in range(2))
        self.w2 = nn.Linear(hidden, dim, bias)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Experts(nn.Module):
    """A module for every expert, whose weights lie apart."""

    def __init__(self, **sizes):
        super().__init__()
        self.experts = nn.ModuleList(Expert(**sizes) for _ in range(E)).bfloat16()

    def forward(self, x, counts):
        parts = zip(self.experts, split(x, counts), strict=True)
        return torch.cat([expert(t) for expert, t in parts])

    def oracle(self, x, counts, recipe="fp8_rowwise"):
        """The same through the grouped oracle."""

        def linear(x, name):
            w = torch.stack([getattr(expert, name).weight for expert in self.experts])
            return product(x, w.mT.bfloat16(), counts, recipe)

        return linear(F.silu(linear(x, "w1")) * linear(x, "w3"), "w2")


def step(f, model, x, *args):
    """Output and every gradient."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = f(x, *args)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y))
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


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
