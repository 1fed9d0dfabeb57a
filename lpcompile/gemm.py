"""A low-precision GEMM, spelled once: passes trace it, the eager functions and tests call it.

Nothing here looks at a shape, so that it can be traced with fx proxies: every shape is the ops'
business. Operands are 2-d, and ``transpose`` says that the operand is x.T, so that its scales run
along the rows of x.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lpcompile import ops
from lpcompile.recipes import Gemm, Operand


class Quantized(NamedTuple):
    """An operand as a GEMM reads it: values[R, C], decode scales, the contraction last.

    tensor_amax: fp32 [1], for formats that scale the tensor on top of its blocks.
    """

    values: Tensor
    scales: Tensor
    tensor_amax: Tensor | None = None


Quantizer = Callable[[Tensor, Operand, bool], Quantized]


def _tensor(x: Tensor, operand: Operand, transpose: bool) -> Quantized:
    amax = ops.amax_tensor.op(x)
    op = ops.quantize_fp8_tensor_t.op if transpose else ops.quantize_fp8_tensor.op
    return _pair(op(x, amax, operand.fmt.element, operand.fmt.scaling == "pow2"))


def _row(x: Tensor, operand: Operand, transpose: bool) -> Quantized:
    args = (operand.fmt.element, operand.fmt.scaling == "pow2")
    if transpose:
        return _pair(ops.quantize_fp8_row_t.op(x, ops.amax_column.op(x), *args))
    return _pair(ops.quantize_fp8_row.op(x, *args))


def _block(x: Tensor, operand: Operand, transpose: bool) -> Quantized:
    op = ops.quantize_fp8_block_t.op if transpose else ops.quantize_fp8_block.op
    return _pair(op(x, operand.fmt.element, operand.fmt.scaling == "pow2"))


def _square(x: Tensor, operand: Operand, transpose: bool) -> Quantized:
    op = ops.quantize_fp8_square_t.op if transpose else ops.quantize_fp8_square.op
    return _pair(op(x, operand.fmt.element, operand.fmt.scaling == "pow2"))


def _pair(made: tuple[Tensor, Tensor]) -> Quantized:
    return Quantized(made[0], made[1])  # by index: a traced pair cannot be unpacked


# (scaling of the format, kind of block) -> quantizer. What Operand admits stands here.
QUANTIZERS: dict[tuple[str, object], Quantizer] = {
    (scaling, block): quantizer
    for scaling in ("fp32", "pow2")
    for block, quantizer in (
        ("tensor", _tensor),
        ("row", _row),
        ((1, 128), _block),
        ((128, 128), _square),
    )
}


def quantize(x: Tensor, operand: Operand, *, transpose: bool = False) -> Quantized:
    """Narrow x[R, C], or x.T, as ``operand`` says, with scales along what will be contracted."""
    if operand.fmt.nan_to_num:
        x = torch.ops.aten.nan_to_num.default(x)
    return QUANTIZERS[operand.fmt.scaling, operand.block](x, operand, transpose)


def multiply(a: Quantized, b: Quantized, *, out_dtype: torch.dtype, fast_accum: bool) -> Tensor:
    """a[M, K] @ b[N, K].T of quantized operands -> [M, N]."""
    return ops.scaled_mm.op(a.values, a.scales, b.values, b.scales, out_dtype, fast_accum)


def mm(
    a: Tensor,
    b: Tensor,
    gemm: Gemm,
    *,
    transpose: tuple[bool, bool] = (False, False),
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a[M, K] @ b[N, K].T with a quantized as gemm.lhs says and b as gemm.rhs says -> [M, N].

    ``transpose`` says of each that it is given the other way round: a[K, M], b[K, N].
    """
    return multiply(
        quantize(a, gemm.lhs, transpose=transpose[0]),
        quantize(b, gemm.rhs, transpose=transpose[1]),
        out_dtype=out_dtype,
        fast_accum=gemm.fast_accum,
    )
