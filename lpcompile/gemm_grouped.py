"""Grouped low-precision GEMMs, spelled once: passes trace them, the eager functions call them.

Tokens x[T, C] belong, row by row, to group after group, as offs[E] says (``lpcompile.ops.groups``):

    grouped_mm     Y[T, N] = X[T, K] @ W[e].T     fprop; dgrad, with W the other way round
    grouped_mm_t   dW[E, N, K] = dY.T @ X         wgrad, over the rows of each group
    batched_mm     [E, M, K] @ [E, N, K].T        any of them, where every group has as many rows

As in ``lpcompile.gemm``, nothing here looks at a shape.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lpcompile import ops
from lpcompile.errors import RecipeError
from lpcompile.gemm import Quantized, quantize
from lpcompile.recipes import Gemm, Operand

Kind = tuple[str, object]  # scaling of the format, kind of block


def _tensor(x: Tensor, operand: Operand, offs: Tensor) -> Quantized:
    amax = ops.amax_tensor_grouped.op(x, offs)  # rows past offs[-1] may hold anything
    pow2 = operand.fmt.scaling == "pow2"
    made = ops.quantize_fp8_tensor.op(x, amax, operand.fmt.element, pow2)
    return Quantized(made[0], made[1])


def _by_token(x: Tensor, operand: Operand, offs: Tensor) -> Quantized:
    return quantize(x, operand)  # no scale is shared between rows


# What quantizes tokens. Blocks of 128x128 would share scales between groups.
TOKENS: dict[Kind, Callable[[Tensor, Operand, Tensor], Quantized]] = {
    (scaling, block): quantizer
    for scaling in ("fp32", "pow2")
    for block, quantizer in (("tensor", _tensor), ("row", _by_token), ((1, 128), _by_token))
}


def _tensor_t(x: Tensor, operand: Operand, offs: Tensor) -> tuple[Quantized, Tensor]:
    return _under(ops.amax_tensor_grouped.op(x, offs), x, operand, offs)


def _row_t(x: Tensor, operand: Operand, offs: Tensor) -> tuple[Quantized, Tensor]:
    return _under(ops.amax_column_grouped.op(x, offs), x, operand, offs)


def _under(amax: Tensor, x: Tensor, operand: Operand, offs: Tensor) -> tuple[Quantized, Tensor]:
    pow2 = operand.fmt.scaling == "pow2"
    made = ops.quantize_fp8_grouped_t.op(x, amax, offs, operand.fmt.element, pow2)
    return Quantized(made[0], made[1]), made[2]


def _block_t(x: Tensor, operand: Operand, offs: Tensor) -> tuple[Quantized, Tensor]:
    pow2 = operand.fmt.scaling == "pow2"
    made = ops.quantize_fp8_block_grouped_t.op(x, offs, operand.fmt.element, pow2)
    return Quantized(made[0], made[1]), made[2]


# What quantizes tokens that are contracted, group by group.
GROUPS_T: dict[Kind, Callable[[Tensor, Operand, Tensor], tuple[Quantized, Tensor]]] = {
    (scaling, block): quantizer
    for scaling in ("fp32", "pow2")
    for block, quantizer in (("tensor", _tensor_t), ("row", _row_t), ((1, 128), _block_t))
}
WEIGHTS = {*TOKENS, ("fp32", (128, 128)), ("pow2", (128, 128))}


def obstacle(gemm: Gemm, *, along_tokens: bool = False) -> str:
    """Why there is no grouped GEMM of these operands (``along_tokens``: in wgrad), or nothing."""
    for operand, kinds in ((gemm.lhs, TOKENS), (gemm.rhs, GROUPS_T if along_tokens else WEIGHTS)):
        if (operand.fmt.scaling, operand.block) not in kinds:
            what = "weight" if kinds is WEIGHTS else "tokens"
            known = sorted({repr(block) for scaling, block in kinds if scaling == "pow2"})
            return (
                f"the {what} of a grouped GEMM cannot be {operand.fmt.name} in blocks of "
                f"{operand.block!r}: FP8 in blocks of {', '.join(known)} can"
            )
    return ""


def _check(gemm: Gemm, *, along_tokens: bool = False) -> None:
    reason = obstacle(gemm, along_tokens=along_tokens)
    if reason:
        raise RecipeError(f"{reason}; give the recipe a `grouped` recipe, or None for this product")


def quantize_tokens(x: Tensor, operand: Operand, offs: Tensor) -> Quantized:
    """Narrow x[T, C], whose rows belong to groups, with scales along C."""
    return TOKENS[operand.fmt.scaling, operand.block](_finite(x, operand), operand, offs)


def quantize_groups_t(x: Tensor, operand: Operand, offs: Tensor) -> tuple[Quantized, Tensor]:
    """Narrow each group of x[T, C], transposed: values[C, Tp] with scales along tokens.

    Also returns where the groups end in Tp, which is what ``multiply_grouped`` takes as offs.
    """
    return GROUPS_T[operand.fmt.scaling, operand.block](_finite(x, operand), operand, offs)


def _finite(x: Tensor, operand: Operand) -> Tensor:
    return torch.ops.aten.nan_to_num.default(x) if operand.fmt.nan_to_num else x


def multiply_grouped(
    a: Quantized, b: Quantized, offs: Tensor | None, *, out_dtype: torch.dtype, fast_accum: bool
) -> Tensor:
    """The product of quantized operands, group by group; shapes as in ``scaled_grouped_mm``."""
    args = (a.values, a.scales, b.values, b.scales, offs, out_dtype, fast_accum)
    return ops.scaled_grouped_mm.op(*args)


def grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    gemm: Gemm,
    *,
    transpose: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a[T, K] @ b[e].T of b[E, N, K], for the rows of group e -> [T, N].

    ``transpose`` says that b is given the other way round: b[E, K, N]. RecipeError where there is
    no grouped GEMM for these operands.
    """
    _check(gemm)
    return multiply_grouped(
        quantize_tokens(a, gemm.lhs, offs),
        quantize(b, gemm.rhs, transpose=transpose),
        offs,
        out_dtype=out_dtype,
        fast_accum=gemm.fast_accum,
    )


def grouped_mm_t(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    gemm: Gemm,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a[T, M].T @ b[T, N] over the rows of each group -> [E, M, N]."""
    _check(gemm, along_tokens=True)
    lhs, offs_padded = quantize_groups_t(a, gemm.lhs, offs)
    rhs, _ = quantize_groups_t(b, gemm.rhs, offs)
    return multiply_grouped(lhs, rhs, offs_padded, out_dtype=out_dtype, fast_accum=gemm.fast_accum)


def batched_mm(
    a: Tensor,
    b: Tensor,
    gemm: Gemm,
    *,
    transpose: tuple[bool, bool] = (False, False),
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a[E, M, K] @ b[E, N, K].T, matrix by matrix -> [E, M, N].

    ``transpose`` says of each that it is given the other way round: a[E, K, M], b[E, K, N].
    """
    _check(gemm)
    return multiply_grouped(
        quantize(a, gemm.lhs, transpose=transpose[0]),
        quantize(b, gemm.rhs, transpose=transpose[1]),
        None,
        out_dtype=out_dtype,
        fast_accum=gemm.fast_accum,
    )
