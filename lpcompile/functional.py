"""Eager low-precision linears over ``lpcompile.gemm``: for use without a compiler, and the oracle.

    linear(x[..., K], w[N, K], bias[N]) -> y[..., N], every product as the recipe says

The compiled path traces the same ``gemm.mm``, so per linear, on the same x, it gives these bits.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed.tensor import DTensor

from lpcompile import gemm, sharded
from lpcompile.errors import ShapeError
from lpcompile.recipes import DEFAULT, Gemm, Recipe, get_recipe


def product(
    a: Tensor,
    b: Tensor,
    how: Gemm | None,
    *,
    transpose: tuple[bool, bool] = (False, False),
    seed: Tensor | None = None,
    draw: int = 0,
) -> Tensor:
    """a[M, K] @ b[N, K].T, or with either given transposed, narrowed or (None) in its own dtype."""
    if how is not None:
        return gemm.mm(a, b, how, transpose=transpose, seed=seed, draw=draw)
    return (a.t() if transpose[0] else a) @ (b if transpose[1] else b.t())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, w: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.recipe = recipe  # type: ignore[attr-defined]
        return product(x, w, recipe.fprop)

    @staticmethod
    @once_differentiable  # rounding has no gradient of its own, and its ops none to give
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, w), recipe = ctx.saved_tensors, ctx.recipe
        seed = gemm.new_seed(dy.device) if recipe.is_stochastic else None
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = product(dy, w, recipe.dgrad, transpose=(False, True), seed=seed, draw=0)
        if ctx.needs_input_grad[1]:
            dw = product(dy, x, recipe.wgrad, transpose=(True, True), seed=seed, draw=1)
        return dx, dw, None


def linear(
    x: Tensor, w: Tensor, bias: Tensor | None = None, *, recipe: Recipe | str = DEFAULT
) -> Tensor:
    """``F.linear`` with each of its three GEMMs as ``recipe`` says, eager and differentiable.

    x[..., K] and w[N, K] bf16, bias[N] -> [..., N] bf16, DTensors if w is one. ShapeError for other
    dtypes or shapes.
    """
    if isinstance(w, DTensor):
        y: Tensor = sharded.linear(x, w, partial(linear, recipe=recipe))
        return y if bias is None else y + bias
    if x.dtype != torch.bfloat16 or w.dtype != torch.bfloat16:
        raise ShapeError(
            f"linear narrows bf16 operands, got x {x.dtype} and w {w.dtype}: cast both to bf16, or "
            f"run a converted model under torch.autocast({x.device.type!r}, torch.bfloat16)"
        )
    if w.dim() != 2 or x.dim() < 1 or x.shape[-1] != w.shape[-1]:
        raise ShapeError(
            f"linear takes x[..., K] and w[N, K], got {list(x.shape)} and {list(w.shape)}"
        )
    if bias is not None and (bias.dtype, bias.shape) != (w.dtype, w.shape[:1]):
        raise ShapeError(
            f"linear takes bias[N] bf16 with w[N, K], got {bias.dtype}{list(bias.shape)} with "
            f"{list(w.shape)}: cast it, or leave it out"
        )
    y = _Linear.apply(x.reshape(-1, x.shape[-1]), w, get_recipe(recipe))
    y = y.view(*x.shape[:-1], w.shape[0])
    return y if bias is None else y + bias
