"""``bench gemm``: every GEMM of the models, product by product, in bf16 and as each recipe says.

Operands are quantized before timing: this is the GEMM alone, of random data. ``share`` is of the
fastest GEMM of its element width in the run, ``predicted TFLOP/s`` the cost model's. Those of
experts are grouped; their rows are of groups that are multiples of 16.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpcompile import cost, gemm, gemm_grouped, ops
from lpcompile.bench.models import Experts, Llama, linears
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
    experts: Experts | None

    @property
    def shape(self) -> tuple[object, ...]:
        """What cases that are compared have in common."""
        return self.m, self.n, self.k, self.product, self.experts


def cases(models: Iterable[Llama | Experts], recipes: Sequence[str]) -> list[Case]:
    """Every distinct shape and product of the models, for bf16 and every recipe.

    Recipes that quantize a product alike share a case.
    """
    made: dict[tuple[object, ...], Case] = {}
    for model in models:
        experts = model if isinstance(model, Experts) else None
        for linear, m, n, k in _sizes(model):
            for product in PRODUCTS:
                for recipe in (BF16, *recipes):
                    how = _gemm(recipe, product, experts)
                    if how is not None or recipe == BF16:
                        case = Case(linear, product, m, n, k, recipe, how, experts)
                        made.setdefault((case.shape, how), case)
    return list(made.values())


def _sizes(model: Llama | Experts) -> Iterator[tuple[str, int, int, int]]:
    """Name, M, N, K of every linear."""
    if isinstance(model, Experts):
        yield f"{model.name} w1, w3", model.rows, model.hidden, model.dim
        yield f"{model.name} w2", model.rows, model.dim, model.hidden
    else:
        for linear in linears(model, "block"):
            yield f"{model.name} {linear.name}", model.tokens, linear.n, linear.k


def _gemm(name: str, product: Product, experts: Experts | None) -> Gemm | None:
    """How the recipe multiplies; None where it does not narrow."""
    recipe = get_recipe(name)
    if experts is None:
        return recipe.gemm(product)
    how = (recipe.grouped or recipe).gemm(product)
    refused = how and gemm_grouped.obstacle(how, along_tokens=product == "wgrad")
    return None if refused else how


def measure(
    models: Iterable[Llama | Experts], recipes: Sequence[str], device: torch.device, repeats: int
) -> list[Row]:
    """One row a case. The ways to multiply one shape are interleaved, shapes are not."""
    everything = cases(models, recipes)
    rows: list[Row] = []
    for shape in dict.fromkeys(case.shape for case in everything):
        same = [case for case in everything if case.shape == shape]
        operands = _operands(same[0], device)
        functions = {case.name: multiplier(case, *operands) for case in same}
        timings = interleave(functions, device, repeats)
        for case in same:
            us, flops = timings[case.name].ms * 1e3, 2 * case.m * case.n * case.k
            rows.append(
                {
                    "linear": case.linear,
                    "product": case.product,
                    "groups": case.experts.num_experts if case.experts else 1,
                    "M": case.m,
                    "N": case.n,
                    "K": case.k,
                    "recipe": case.name,
                    "us": us,
                    "TFLOP/s": flops / us / 1e6,
                    "speedup": timings[BF16].ms / timings[case.name].ms,
                    "predicted TFLOP/s": flops / _predicted_us(case) / 1e6,
                }
            )
    for is_bf16 in (True, False):
        alike = [row for row in rows if (row["recipe"] == BF16) == is_bf16]
        best = max((row["TFLOP/s"] for row in alike), default=0.0)
        for row in alike:
            row["share"] = row["TFLOP/s"] / best
    return rows


def _operands(case: Case, device: torch.device) -> list[Tensor]:
    """lhs and rhs of the product as the graph has them: x[M, K], w[N, K] or of experts, dy[M, N].

    With experts, where their rows end too.
    """
    m, n, k, experts = case.m, case.n, case.k, case.experts
    x, w, dy = (m, k), (experts.num_experts, n, k) if experts else (n, k), (m, n)
    shapes = {"fprop": (x, w), "dgrad": (dy, w), "wgrad": (dy, x)}[case.product]
    made = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    return [*made, experts.offsets(ragged=False).to(device)] if experts else made


def multiplier(
    case: Case, lhs: Tensor, rhs: Tensor, offs: Tensor | None = None
) -> Callable[[], Tensor]:
    """A function that runs the GEMM of one product, its operands quantized now."""
    how = case.gemm
    across = {"fprop": (False, False), "dgrad": (False, True), "wgrad": (True, True)}[case.product]
    if how is None:
        a, b = lhs.t() if across[0] else lhs, rhs if across[1] else rhs.mT
        return partial(torch.mm, a, b) if offs is None else partial(_grouped_mm, a, b, offs)
    to: dict[str, Any] = {"out_dtype": torch.bfloat16, "fast_accum": how.fast_accum}
    if offs is not None and across[0]:
        lhs_t, ends = gemm_grouped.quantize_groups_t(lhs, how.lhs, offs)
        rhs_t, _ = gemm_grouped.quantize_groups_t(rhs, how.rhs, offs)
        return partial(gemm_grouped.multiply_grouped, lhs_t, rhs_t, ends, **to)
    if offs is not None:
        tokens = gemm_grouped.quantize_tokens(lhs, how.lhs, offs)
        weights = gemm.quantize(rhs, how.rhs, transpose=across[1])
        return partial(gemm_grouped.multiply_grouped, tokens, weights, offs, **to)
    quantized = [
        gemm.quantize(x, operand, transpose=transpose)
        for x, operand, transpose in ((lhs, how.lhs, across[0]), (rhs, how.rhs, across[1]))
    ]
    if how.lhs.fmt.swizzled:  # as the quantize kernels of a graph write them
        quantized = [q._replace(scales=ops.swizzle.op(q.scales)) for q in quantized]
    return partial(gemm.multiply, *quantized, **to)


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return torch._grouped_mm(a, b, offs=offs)


def _predicted_us(case: Case) -> float:
    device = cost.target_for(case.gemm) if case.gemm else cost.H200
    groups = case.experts.num_experts if case.experts else 1
    formula = cost.gemm_expression(case.product, case.gemm, device, grouped=groups > 1)
    size = {cost.M: case.m, cost.N: case.n, cost.K: case.k, cost.E: groups}
    return float(formula.subs(size))
