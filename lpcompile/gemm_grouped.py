"""Grouped low-precision GEMMs, spelled once: passes trace them, the eager functions call them.

Tokens x[T, C] belong, row by row, to group after group, as offs[E] says (``lpcompile.ops.groups``):

    grouped_mm     Y[T, N] = X[T, K] @ W[e].T     fprop; dgrad, with W the other way round
    grouped_mm_t   dW[E, N, K] = dY.T @ X         wgrad, over the rows of each group

As in ``lpcompile.gemm``, nothing here looks at a shape.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lpcompile import ops
from lpcompile.errors import RecipeError
from lpcompile.gemm import Quantized, new_seed, quantize
from lpcompile.recipes import Gemm, Operand

Kind = tuple[str, object]  # scaling of the format, kind of block


def _for_fp8(quantizers: dict[object, Callable[..., Any]]) -> dict[Kind, Callable[..., Any]]:
    """The quantizers of both scalings of FP8, by the kind of block."""
    return {(scaling, block): q for scaling in ("fp32", "pow2") for block, q in quantizers.items()}


def _tensor(x: Tensor, operand: Operand, offs: Tensor) -> Quantized:
    amax = ops.amax_tensor_grouped.op(x, offs)  # rows past offs[-1] may hold anything
    pow2 = operand.fmt.scaling == "pow2"
    made = ops.quantize_fp8_tensor.op(x, amax, operand.fmt.element, pow2)
    return Quantized(made[0], made[1])


def _by_token(x: Tensor, operand: Operand, offs: Tensor) -> Quantized:
    return quantize(x, operand)  # no scale is shared between rows


def _nv(
    x: Tensor, operand: Operand, offs: Tensor, seed: Tensor | None = None, draw: int = 0
) -> Quantized:
    amax = ops.amax_tensor_grouped.op(x, offs)
    return quantize(x, operand, tensor_amax=amax, seed=seed, draw=draw)


# What quantizes tokens. Blocks of more than one row would share scales between groups.
TOKENS: dict[Kind, Callable[..., Quantized]] = {
    **_for_fp8({"tensor": _tensor, "row": _by_token, (1, 128): _by_token}),
    ("rceil", (1, 32)): _by_token,
    ("floor", (1, 32)): _by_token,
    ("nvfp4", (1, 16)): _nv,
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


def _mx_t(x: Tensor, operand: Operand, offs: Tensor) -> tuple[Quantized, Tensor]:
    floor = operand.fmt.scaling == "floor"
    made = ops.quantize_mxfp8_grouped_t.op(x, offs, operand.fmt.element, floor)
    return Quantized(made[0], made[1]), made[2]


def _nv_t(
    x: Tensor, operand: Operand, offs: Tensor, seed: Tensor | None = None, draw: int = 0
) -> tuple[Quantized, Tensor]:
    signs = ops.hadamard.SIGNS if operand.hadamard else None
    amax = ops.amax_group.op(x, offs, signs)
    made = ops.quantize_nvfp4_grouped_t.op(x, amax, offs, signs, seed, draw)
    return Quantized(made[0], made[1], amax), made[2]


# What quantizes tokens that are contracted, group by group.
GROUPS_T: dict[Kind, Callable[..., tuple[Quantized, Tensor]]] = {
    **_for_fp8({"tensor": _tensor_t, "row": _row_t, (1, 128): _block_t}),
    ("rceil", (1, 32)): _mx_t,
    ("floor", (1, 32)): _mx_t,
    ("nvfp4", (1, 16)): _nv_t,
}


def obstacle(gemm: Gemm, *, along_tokens: bool = False) -> str:
    """Why there is no grouped GEMM of these operands (``along_tokens``: in wgrad), or nothing."""
    tokens = (gemm.lhs, gemm.rhs) if along_tokens else (gemm.lhs,)  # a weight may be any
    for operand in tokens:
        known = [block for scaling, block in GROUPS_T if scaling == operand.fmt.scaling]
        if operand.block not in known:
            return (
                f"the tokens of a grouped GEMM cannot be {operand.fmt.name} in blocks of "
                f"{operand.block!r}, which would be of several groups: in blocks of "
                f"{', '.join(map(repr, known))} they can"
            )
    return ""


def _check(gemm: Gemm, *, along_tokens: bool = False) -> None:
    reason = obstacle(gemm, along_tokens=along_tokens)
    if reason:
        raise RecipeError(f"{reason}; give the recipe a `grouped` recipe, or None for this product")


def quantize_tokens(
    x: Tensor, operand: Operand, offs: Tensor, seed: Tensor | None = None, draw: int = 0
) -> Quantized:
    """Narrow x[T, C], whose rows belong to groups, with scales along C.

    seed and draw: of stochastic rounding, as ``lpcompile.gemm.quantize`` takes them.
    """
    quantizer = TOKENS[operand.fmt.scaling, operand.block]
    return quantizer(_finite(x, operand), operand, offs, **_drawn(x, operand, seed, draw))


def quantize_groups_t(
    x: Tensor, operand: Operand, offs: Tensor, seed: Tensor | None = None, draw: int = 0
) -> tuple[Quantized, Tensor]:
    """Narrow each group of x[T, C], transposed: values[C, Tp] with scales along tokens.

    Also returns where the groups end in Tp, which is what ``multiply_grouped`` takes as offs.
    """
    quantizer = GROUPS_T[operand.fmt.scaling, operand.block]
    return quantizer(_finite(x, operand), operand, offs, **_drawn(x, operand, seed, draw))


def _finite(x: Tensor, operand: Operand) -> Tensor:
    return torch.ops.aten.nan_to_num.default(x) if operand.fmt.nan_to_num else x


def _drawn(x: Tensor, operand: Operand, seed: Tensor | None, draw: int) -> dict[str, Any]:
    """What a quantizer that rounds stochastically takes besides."""
    if operand.rounding == "nearest":
        return {}
    return {"seed": new_seed(x.device) if seed is None else seed, "draw": draw}


def multiply_grouped(
    a: Quantized, b: Quantized, offs: Tensor | None, *, out_dtype: torch.dtype, fast_accum: bool
) -> Tensor:
    """The product of quantized operands, group by group; shapes as in ``scaled_grouped_mm``."""
    args = (a.values, a.scales, b.values, b.scales, offs, out_dtype, fast_accum)
    amax = () if a.tensor_amax is None else (a.tensor_amax, b.tensor_amax)
    return ops.scaled_grouped_mm.op(*args, *amax)


def grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    gemm: Gemm,
    *,
    transpose: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """a[T, K] @ b[e].T of b[E, N, K], for the rows of group e -> [T, N].

    ``transpose`` says that b is given the other way round: b[E, K, N]. ``seed`` is for a
    stochastic operand, which takes draw 0. RecipeError where there is no grouped GEMM for these
    operands.
    """
    _check(gemm)
    return multiply_grouped(
        quantize_tokens(a, gemm.lhs, offs, seed),
        quantize(b, gemm.rhs, transpose=transpose),
        offs,
        out_dtype=torch.bfloat16,
        fast_accum=gemm.fast_accum,
    )


def grouped_mm_t(
    a: Tensor, b: Tensor, offs: Tensor, gemm: Gemm, *, seed: Tensor | None = None
) -> Tensor:
    """a[T, M].T @ b[T, N] over the rows of each group -> [E, M, N]; a takes draw 1 of a seed."""
    _check(gemm, along_tokens=True)
    lhs, padded = quantize_groups_t(a, gemm.lhs, offs, seed, 1)
    rhs, _ = quantize_groups_t(b, gemm.rhs, offs)
    return multiply_grouped(lhs, rhs, padded, out_dtype=torch.bfloat16, fast_accum=gemm.fast_accum)
