"""A low-precision GEMM, spelled once: passes trace it, the eager functions and tests call it.

Nothing here looks at a shape, so that it can be traced with fx proxies: every shape is the ops'
business. Operands are matrices, or stacks of them (the weights of experts), and ``transpose`` says
that the operand is x.T, so that its scales run along the rows of x.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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


Quantizer = Callable[..., Quantized]  # of x, operand, transpose, and what its format adds


def _tensor(x: Tensor, operand: Operand, transpose: bool) -> Quantized:
    amax = ops.amax_tensor.op(x)
    op = ops.quantize_fp8_tensor_t.op if transpose else ops.quantize_fp8_tensor.op
    return _pair(op(x, amax, operand.fmt.element, operand.fmt.scaling == "pow2"))


def _row(x: Tensor, operand: Operand, transpose: bool) -> Quantized:
    args = (operand.fmt.element, operand.fmt.scaling == "pow2")
    if transpose:
        return _pair(ops.quantize_fp8_row_t.op(x, ops.amax_column.op(x), *args))
    return _pair(ops.quantize_fp8_row.op(x, *args))


def _of_blocks(op: Any, op_t: Any, second: str) -> Quantizer:
    """A quantizer of blocks by an op of x or of x.T, told whether the scaling is its second one."""

    def quantizer(x: Tensor, operand: Operand, transpose: bool) -> Quantized:
        how = (operand.fmt.element, operand.fmt.scaling == second)
        return _pair((op_t if transpose else op)(x, *how))

    return quantizer


_block = _of_blocks(ops.quantize_fp8_block.op, ops.quantize_fp8_block_t.op, "pow2")
_square = _of_blocks(ops.quantize_fp8_square.op, ops.quantize_fp8_square_t.op, "pow2")
_mx = _of_blocks(ops.quantize_mxfp8.op, ops.quantize_mxfp8_t.op, "floor")
_mx_square = _of_blocks(ops.quantize_mxfp8_square.op, ops.quantize_mxfp8_square_t.op, "floor")


def _nv(
    x: Tensor,
    operand: Operand,
    transpose: bool,
    tensor_amax: Tensor | None = None,
    seed: Tensor | None = None,
    draw: int = 0,
) -> Quantized:
    square = operand.block == (16, 16)
    if operand.hadamard:  # of the transpose of what it reads
        x = x if transpose else torch.ops.aten.transpose.int(x, -2, -1)
        x, transpose = ops.hadamard.op(x, ops.hadamard.SIGNS), False
    if transpose:
        op = ops.quantize_nvfp4_square_t.op if square else ops.quantize_nvfp4_t.op
    else:
        op = ops.quantize_nvfp4_square.op if square else ops.quantize_nvfp4.op
    amax = ops.amax_tensor.op(x) if tensor_amax is None else tensor_amax
    made = op(x, amax, seed, draw)
    return Quantized(made[0], made[1], amax)


def _pair(made: tuple[Tensor, Tensor]) -> Quantized:
    return Quantized(made[0], made[1])  # by index: a traced pair cannot be unpacked


# (scaling of the format, kind of block) -> quantizer. What Operand admits stands here.
QUANTIZERS: dict[tuple[str, object], Quantizer] = {
    ("fp32", "tensor"): _tensor,
    ("fp32", "row"): _row,
    ("fp32", (1, 128)): _block,
    ("fp32", (128, 128)): _square,
    ("pow2", "tensor"): _tensor,
    ("pow2", "row"): _row,
    ("pow2", (1, 128)): _block,
    ("pow2", (128, 128)): _square,
    ("rceil", (1, 32)): _mx,
    ("rceil", (32, 32)): _mx_square,
    ("floor", (1, 32)): _mx,
    ("floor", (32, 32)): _mx_square,
    ("nvfp4", (1, 16)): _nv,
    ("nvfp4", (16, 16)): _nv,
}


HIGHEST_SEED = 2**63 - 1


def new_seed(device: torch.device) -> Tensor:
    """A seed[1] int64 for stochastic rounding, from torch's own generator."""
    return torch.randint(HIGHEST_SEED, (1,), device=device)


def quantize(
    x: Tensor,
    operand: Operand,
    *,
    transpose: bool = False,
    tensor_amax: Tensor | None = None,
    seed: Tensor | None = None,
    draw: int = 0,
) -> Quantized:
    """Narrow x[R, C], or x.T, as ``operand`` says, with scales along what will be contracted. Of
    x[E, R, C], every matrix alone.

    tensor_amax: fp32 [1], instead of the amax of x (after a Hadamard transform), for formats with
    a tensor scale. seed: int64 [1] for stochastic rounding, by default a new one; ``draw`` tells
    apart the operands that share a seed.
    """
    if operand.fmt.nan_to_num:
        x = torch.ops.aten.nan_to_num.default(x)
    more: dict[str, Any] = {}
    if operand.fmt.tensor_scale:
        more["tensor_amax"] = tensor_amax
    if operand.rounding == "stochastic":
        more.update(seed=new_seed(x.device) if seed is None else seed, draw=draw)
    return QUANTIZERS[operand.fmt.scaling, operand.block](x, operand, transpose, **more)


def multiply(
    a: Quantized,
    b: Quantized,
    *,
    out_dtype: torch.dtype,
    fast_accum: bool,
    swizzled: bool = False,
) -> Tensor:
    """a[M, K] @ b[N, K].T of quantized operands -> [M, N].

    swizzled: bring the scales into the tiles of block-scaled tensor cores first, on every device,
    so that a graph never depends on the machine.
    """
    a_scales, b_scales = a.scales, b.scales
    if swizzled:
        a_scales, b_scales = ops.swizzle.op(a_scales), ops.swizzle.op(b_scales)
    amax = () if a.tensor_amax is None else (a.tensor_amax, b.tensor_amax)
    return ops.scaled_mm.op(a.values, a_scales, b.values, b_scales, out_dtype, fast_accum, *amax)


def mm(
    a: Tensor,
    b: Tensor,
    gemm: Gemm,
    *,
    transpose: tuple[bool, bool] = (False, False),
    out_dtype: torch.dtype = torch.bfloat16,
    seed: Tensor | None = None,
    draw: int = 0,
) -> Tensor:
    """a[M, K] @ b[N, K].T with a quantized as gemm.lhs says and b as gemm.rhs says -> [M, N].

    ``transpose`` says of each that it is given the other way round: a[K, M], b[K, N]. ``seed`` and
    ``draw`` are for a stochastic operand.
    """
    return multiply(
        quantize(a, gemm.lhs, transpose=transpose[0], seed=seed, draw=draw),
        quantize(b, gemm.rhs, transpose=transpose[1], seed=seed, draw=draw),
        out_dtype=out_dtype,
        fast_accum=gemm.fast_accum,
        swizzled=gemm.lhs.fmt.swizzled,
    )
