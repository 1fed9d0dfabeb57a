"""``bench gemm``: every GEMM of the models, product by product, in bf16 and as each recipe says.

Operands are quantized before timing: this is the GEMM alone, of random data. ``share`` is of the
fastest GEMM of its element width in the run, ``predicted TFLOP/s`` the cost model's.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lpcompile import cost, gemm, ops
from lpcompile.bench.models import Llama, linears
from lpcompile.bench.report import Row
from lpcompile.bench.timing import interleave
from lpcompile.recipes import PRODUCTS, Gemm, Product, get_recipe

BF16 = "bf16"


class Case(NamedTuple):
    """One product of one shape; ``name`` is the recipe's, or bf16."""

    linear: str
    product: Product
    m: int
    n: int
    k: int
    name: str
    gemm: Gemm | None


def cases(models: Iterable[Llama], recipes: Sequence[str]) -> list[Case]:
    """Every distinct shape and product of the blocks of the models, for bf16 and every recipe.

    Recipes that quantize a product alike share a case.
    """
    made: dict[tuple[object, ...], Case] = {}
    for model in models:
        for linear in linears(model, "block"):
            shape = (model.tokens, linear.n, linear.k)
            for product in PRODUCTS:
                key = (*shape, product)
                label = f"{model.name} {linear.name}"
                made.setdefault((key, None), Case(label, product, *shape, BF16, None))
                for recipe in recipes:
                    how = get_recipe(recipe).gemm(product)
                    if how is not None:
                        made.setdefault((key, how), Case(label, product, *shape, recipe, how))
    return list(made.values())


def measure(
    models: Iterable[Llama], recipes: Sequence[str], device: torch.device, repeats: int
) -> list[Row]:
    """One row a case. The ways to multiply one shape are interleaved, shapes are not."""
    everything = cases(models, recipes)
    shapes = dict.fromkeys((c.m, c.n, c.k, c.product) for c in everything)
    rows: list[Row] = []
    for m, n, k, product in shapes:
        same = [c for c in everything if (c.m, c.n, c.k, c.product) == (m, n, k, product)]
        operands = _operands(product, m, n, k, device)
        functions = {c.name: multiplier(c.gemm, product, *operands) for c in same}
        timings = interleave(functions, device, repeats)
        for case in same:
            us = timings[case.name].ms * 1e3
            rows.append(
                {
                    "linear": case.linear,
                    "product": product,
                    "M": m,
                    "N": n,
                    "K": k,
                    "recipe": case.name,
                    "us": us,
                    "TFLOP/s": 2 * m * n * k / us / 1e6,
                    "speedup": timings[BF16].ms / timings[case.name].ms,
                    "predicted TFLOP/s": 2 * m * n * k / _predicted_us(case) / 1e6,
                }
            )
    for is_bf16 in (True, False):
        alike = [row for row in rows if (row["recipe"] == BF16) == is_bf16]
        best = max((row["TFLOP/s"] for row in alike), default=0.0)
        for row in alike:
            row["share"] = row["TFLOP/s"] / best
    return rows


def _operands(product: Product, m: int, n: int, k: int, device: torch.device) -> list[Tensor]:
    """lhs and rhs of the product as the graph has them: x[M, K], w[N, K], dy[M, N]."""
    x, w, dy = (m, k), (n, k), (m, n)
    shapes = {"fprop": (x, w), "dgrad": (dy, w), "wgrad": (dy, x)}[product]
    return [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]


def multiplier(
    how: Gemm | None, product: Product, lhs: Tensor, rhs: Tensor
) -> Callable[[], Tensor]:
    """A function that runs the GEMM of one product, its operands quantized now."""
    across = {"fprop": (False, False), "dgrad": (False, True), "wgrad": (True, True)}[product]
    if how is None:
        return partial(torch.mm, lhs.t() if across[0] else lhs, rhs if across[1] else rhs.t())
    a = gemm.quantize(lhs, how.lhs, transpose=across[0])
    b = gemm.quantize(rhs, how.rhs, transpose=across[1])
    if how.lhs.fmt.swizzled:  # as the quantize kernels of a graph write them
        a, b = (q._replace(scales=ops.swizzle.op(q.scales)) for q in (a, b))
    return partial(gemm.multiply, a, b, out_dtype=torch.bfloat16, fast_accum=how.fast_accum)


def _predicted_us(case: Case) -> float:
    device = cost.target_for(case.gemm) if case.gemm else cost.H200
    formula = cost.gemm_expression(case.product, case.gemm, device)
    size = {cost.M: case.m, cost.N: case.n, cost.K: case.k, cost.E: 1}
    return float(formula.subs(size))
