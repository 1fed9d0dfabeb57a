"""Small models, and what a compiled one is compared with: every linear through the eager oracle."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lpcompile
from lpcompile import pipeline
from lpcompile.ops.define import per_column
from lpcompile.recipes import RECIPES

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EAGER = {"rewrite": "all", "codegen": "eager"}
close = per_column(0.02)
MICRO = [n for n, r in RECIPES.items() if r.dgrad is not None and r.dgrad.lhs.fmt.swizzled]
NVFP4 = RECIPES["nvfp4"]
# NVFP4 with each part of it changed.
NVFP4_PARTS = {
    "no Hadamard": replace(
        NVFP4,
        wgrad=replace(
            NVFP4.wgrad,
            lhs=replace(NVFP4.wgrad.lhs, hadamard=0),
            rhs=replace(NVFP4.wgrad.rhs, hadamard=0),
        ),
    ),
    "no stochastic rounding": replace(
        NVFP4,
        dgrad=replace(NVFP4.dgrad, lhs=replace(NVFP4.dgrad.lhs, rounding="nearest")),
        wgrad=replace(NVFP4.wgrad, lhs=replace(NVFP4.wgrad.lhs, rounding="nearest")),
    ),
    "1x16 weights": replace(
        NVFP4,
        fprop=replace(NVFP4.fprop, rhs=replace(NVFP4.fprop.rhs, block=(1, 16))),
        dgrad=replace(NVFP4.dgrad, rhs=replace(NVFP4.dgrad.rhs, block=(1, 16))),
    ),
    "wgrad in bf16": replace(NVFP4, wgrad=None),
    "fprop in bf16": replace(NVFP4, fprop=None),
}


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


class WithExperts(nn.Module):
    """Experts and a shared one that read the same rows, made by a pointwise op."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(64, 48, bias=False)
        self.weights = nn.Parameter(torch.randn(3, 48, 64) / 8)
        self.register_buffer("offs", torch.tensor([30, 30, 71], dtype=torch.int32))

    def forward(self, x):
        rows = torch.tanh(x).flatten(0, 1)
        y = F.grouped_mm(rows, self.weights.mT, offs=self.offs)[:71]
        return y * torch.sigmoid(y) + self.shared(rows)[:71]


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


@contextmanager
def after_every_pass(without=()):
    """Collects the graphs that are compiled meanwhile, as the passes leave them, some left out."""
    seen = []
    steps = [step for step in pipeline.AFTER_THE_CUT if step[0] not in without]
    look = ("look", lambda graph: seen.append(graph) or 0)
    with patch.object(pipeline, "AFTER_THE_CUT", [*steps, look]):
        yield seen


def cut(model, x, without=(), **options):
    """The forward and the backward of a step after every pass, and what they make."""
    torch._dynamo.reset()
    with after_every_pass(without) as seen:
        made = step(compiled(model, **options), x)
    forward, backward = seen
    return forward, backward, made


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
