"""Eager low-precision grouped product: x[T, K], w[E, K, N], offs[E] -> y[T, N], differentiable.

Rows offs[e - 1] to offs[e] are times w[e]. For use without a compiler, and the oracle of the
compiled path, which traces the same functions of ``lpcompile.gemm_grouped``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lpcompile import gemm_grouped
from lpcompile.errors import ShapeError
from lpcompile.gemm import new_seed
from lpcompile.recipes import DEFAULT, Recipe, get_recipe


class _GroupedMM(torch.autograd.Function):
    """Its products in bf16 where the recipe says so, through ``torch._grouped_mm``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, offs: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(x, w, offs)
        ctx.recipe = recipe
        if recipe.fprop is None:
            return torch._grouped_mm(x, w, offs=offs)
        return gemm_grouped.grouped_mm(x, w, offs, recipe.fprop, transpose=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, w, offs = ctx.saved_tensors
        dx = dw = None
        dgrad, wgrad = ctx.recipe.dgrad, ctx.recipe.wgrad
        seed = new_seed(dy.device) if ctx.recipe.is_stochastic else None
        if ctx.needs_input_grad[0] and dgrad is None:
            dx = torch._grouped_mm(dy, w.mT, offs=offs)
        elif ctx.needs_input_grad[0]:
            dx = gemm_grouped.grouped_mm(dy, w, offs, dgrad, seed=seed)
        if ctx.needs_input_grad[1] and wgrad is None:
            dw = torch._grouped_mm(x.t(), dy, offs=offs)
        elif ctx.needs_input_grad[1]:
            dw = gemm_grouped.grouped_mm_t(dy, x, offs, wgrad, seed=seed).mT  # of [E, N, K]
        return dx, dw, None, None


def grouped_mm(x: Tensor, w: Tensor, offs: Tensor, *, recipe: Recipe | str = DEFAULT) -> Tensor:
    """``torch._grouped_mm`` with each of its three GEMMs as ``recipe`` says, differentiable.

    x[T, K] and w[E, K, N] bf16; offs[E] int32, where the rows of each expert end. Rows past
    offs[-1] may hold anything, and so may those of the result. Where the recipe has one for
    grouped GEMMs, that is used. ShapeError for other dtypes or shapes.
    """
    if x.dtype != torch.bfloat16 or w.dtype != torch.bfloat16:
        raise ShapeError(
            f"grouped_mm narrows bf16 operands, got x {x.dtype} and w {w.dtype}: cast both to bf16"
        )
    if x.dim() != 2 or w.dim() != 3 or x.shape[1] != w.shape[1]:
        raise ShapeError(
            f"grouped_mm takes x[T, K] and w[E, K, N], got {list(x.shape)} and {list(w.shape)}"
        )
    if offs.dtype != torch.int32 or offs.shape != w.shape[:1]:
        raise ShapeError(
            f"grouped_mm takes the ends of {w.shape[0]} groups, offs[E] int32, got "
            f"{offs.dtype}{list(offs.shape)}: cumsum the counts with dtype=torch.int32"
        )
    found = get_recipe(recipe)
    return _GroupedMM.apply(x, w, offs, found.grouped or found)
