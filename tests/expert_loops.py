"""Loops over experts in their spellings, what they are compared with, and how they are run."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lpcompile
from lpcompile.ops.define import per_column

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FP8 = ["fp8_rowwise", "fp8_tensorwise", "fp8_blockwise", "fp8_rowwise_wgrad_bf16"]
E, K, N = 4, 64, 48
COUNTS, KNOWN = (10, 0, 33, 21), (10, 1, 33, 20)  # an expert of no rows that is known is no GEMM
T = sum(COUNTS)


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
