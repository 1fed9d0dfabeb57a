"""Multiply quantized operands group by group, the contraction last in both (NT):

    a[T, K],    b[E, N, K], offs[E] -> [T, N]     fprop, dgrad: the rows of group e with b[e]
    a[M, Tp],   b[N, Tp],   offs[E] -> [E, M, N]  wgrad: the columns of group e of both
    a[E, M, K], b[E, N, K], no offs -> [E, M, N]  experts with as many tokens each

fp32 accumulation, scales on the accumulator, one rounding. The shape of the scales says over what
they reach: a row each ([T]; [E, N]; flat [E * M] of wgrad's operands), a matrix ([1]; [E]), or
blocks of 128 ([T, K / 128]; [E, N, K / 128], or [E, N / 128, K / 128] of a weight).

An addend, of the result's shape and dtype, is added to the rounded product, and the sum is rounded
once more: the bits of a GEMM and a sum.

Rows of [T, N] past offs[-1] are whatever they are. offs of wgrad are the quantizer's offs_padded,
multiples of ``groups.ALIGN``.

MXFP8 and NVFP4 operands, told by the dtype of their scales, go to ``block_scaled_grouped``, NVFP4's
with the amax of a tensor, [1] for all groups or [E].
"""

from typing import Any

import torch
from torch import Tensor

from lpcompile.ops import (
    amax_column_grouped,
    amax_tensor,
    amax_tensor_grouped,
    block_scaled,
    block_scaled_grouped,
    dequantize,
    fp8,
    grouped_gemm,
    groups,
    quantize_fp8_block,
    quantize_fp8_block_grouped_t,
    quantize_fp8_grouped_t,
    quantize_fp8_row,
    quantize_fp8_square,
    quantize_fp8_tensor,
    scaled_mm,
)
from lpcompile.ops.block_scaled import Side
from lpcompile.ops.define import define, per_column


def outputs(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offs: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
    a_amax: Tensor | None = None,
    b_amax: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    if b.dim() == 2 and offs is not None:
        shape = (offs.shape[0], a.shape[0], b.shape[0])
    else:
        shape = (*a.shape[:-1], b.shape[1])
    return a.new_empty(shape, dtype=out_dtype)


def exact(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offs: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
    a_amax: Tensor | None = None,
    b_amax: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """The product of the dequantized operands in fp64, which every implementation must meet."""
    args = (a, a_scale, b, b_scale, offs, torch.float64, a_amax, b_amax)
    made = _by_groups(scaled_mm.exact, *args)
    return made if addend is None else made + addend


def reference(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offs: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
    a_amax: Tensor | None = None,
    b_amax: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    args = (a, a_scale, b, b_scale, offs, out_dtype, a_amax, b_amax)
    made = _by_groups(scaled_mm.reference, *args)
    return made if addend is None else made.add_(addend)


def _by_groups(
    multiply: Any,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offs: Any,
    dtype: Any,
    a_amax: Tensor | None,
    b_amax: Tensor | None,
) -> Tensor:
    """Every group through ``multiply``, a GEMM of two matrices; zeros past the last group."""
    made = outputs(a, a_scale, b, b_scale, offs, dtype, False).zero_()
    slices = groups.slices(offs) if offs is not None else [slice(None)] * a.shape[0]
    for e, group in enumerate(slices):
        if a.dim() == 3:
            of_a, of_b, to = (a[e], _of_matrix(a_scale, e)), (b[e], _of_matrix(b_scale, e)), made[e]
        elif b.dim() == 3:
            rows = a_scale if a_scale.shape[0] != a.shape[0] else a_scale[group]
            of_a, of_b, to = (a[group], rows), (b[e], _of_matrix(b_scale, e)), made[group]
        else:
            of_a, of_b = _of_columns(a, a_scale, e, group), _of_columns(b, b_scale, e, group)
            to = made[e]
        amaxes = (x if x is None or x.numel() == 1 else x[e : e + 1] for x in (a_amax, b_amax))
        to.copy_(multiply(*of_a, *of_b, dtype, False, *amaxes))
    return made


def _of_matrix(scales: Tensor, e: int) -> Tensor:
    """The scales of matrix e of a stack."""
    return scales[e : e + 1] if scales.dim() == 1 else scales[e]


def _of_columns(values: Tensor, scales: Tensor, e: int, group: slice) -> tuple[Tensor, Tensor]:
    """A group's columns of values[rows, Tp], and their scales."""
    rows, columns = values.shape[0], dequantize.contraction(values)
    per_byte = columns // values.shape[1]
    mine = values[:, group.start // per_byte : group.stop // per_byte]
    if scales.dim() == 2:
        block = columns // scales.shape[1]
        return mine, scales[:, group.start // block : -(-group.stop // block)]
    return mine, scales if scales.numel() == 1 else scales[e * rows : (e + 1) * rows]


def launch(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offs: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
    a_amax: Tensor | None = None,
    b_amax: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    if not fp8.runs_triton(a):
        more = (a_amax, b_amax, addend)
        return reference(a, a_scale, b, b_scale, offs, out_dtype, fast_accum, *more)
    if offs is None:
        E, M = a.shape[:2]
        offs = torch.arange(1, E + 1, device=a.device, dtype=torch.int32) * M
        rows = a_scale[:, None].expand(E, M) if a_scale.dim() == 1 else a_scale
        args = (a.flatten(0, 1), rows.flatten(0, 1), b, b_scale, offs, out_dtype, fast_accum)
        return launch(*args, a_amax, b_amax, addend).unflatten(0, (E, M))
    if not (a.shape[0] and b.shape[-2]):
        return outputs(a, a_scale, b, b_scale, offs, out_dtype, fast_accum)
    made = outputs(a, a_scale, b, b_scale, offs, out_dtype, fast_accum)
    if addend is not None:
        addend = addend.reshape(made.shape).contiguous()
    if a_scale.dtype in block_scaled.SCALES:
        sides = Side(a, a_scale, a_amax), Side(b, b_scale, b_amax)
        return block_scaled_grouped.launch(*sides, offs, made, addend)
    grouped_gemm.fill(a, a_scale, b, b_scale, offs, made, fast_accum, addend)
    return made


def _flops(a: Any, a_scale: Any, b: Any, b_scale: Any, offs: Any, *args: Any, **kwargs: Any) -> int:
    """Of every row of a, as if none were past the last group; with an amax, in two codes a byte."""
    rows = a[0] * a[1] if len(a) == 3 else a[0]
    is_fp4 = len(args) > 2 and args[2] is not None
    return 2 * rows * a[-1] * (2 if is_fp4 else 1) * b[-2]


op = define(
    "scaled_grouped_mm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? offs,"
    " ScalarType out_dtype, bool fast_accum, Tensor? a_amax=None, Tensor? b_amax=None,"
    " Tensor? addend=None) -> Tensor",
    outputs=outputs,
    reference=reference,
    launch=launch,
    flops=_flops,
)
kernel = grouped_gemm.kernel
agrees = per_column(0.01)


def samples(device: str) -> list[tuple[Any, ...]]:
    """Every shape of product, times every kind of scale, some with an addend.

    Rows past offs[-1] are tested apart.
    """
    e4m3 = torch.float8_e4m3fn

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    def tensor(x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_fp8_tensor.reference(x, amax_tensor.reference(x), e4m3, False)

    def row(x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_fp8_row.reference(x, e4m3, True)

    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_fp8_block.reference(x, e4m3, True)

    def square(x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_fp8_square.reference(x, e4m3, True)

    cases: list[tuple[Any, ...]] = []
    for T, N, K in ((40, 32, 256), (53, 21, 203)):
        ends = torch.tensor([0, T // 3, T // 3, T - 1, T], device=device, dtype=torch.int32)
        x, w, dy = randn(T, K), randn(5, N, K), randn(T, N)
        for of_x, of_w in ((tensor, tensor), (row, row), (block, square), (block, block)):
            cases.append((*of_x(x), *of_w(w), ends, torch.bfloat16, of_x is not block))
            cases.append((*of_x(dy), *of_w(w.mT), ends, torch.bfloat16, False))
            cases.append((*of_x(w), *of_w(randn(5, 40, K)), None, torch.bfloat16, False))
        for quantize in (_by_row, _by_tensor, _by_block):
            (a, a_scale, padded), (b, b_scale, _) = quantize(dy, ends), quantize(x, ends)
            cases.append((a, a_scale, b, b_scale, padded, torch.float32, False))
    bad = x.clone()
    bad[5, 7] = torch.inf
    cases.append((*row(bad), *row(w), ends, torch.bfloat16, False))
    small = block_scaled_grouped.samples(device)
    plain = [*((*args, None, None) for args in cases[15:30:4]), *small[11:20:2]]  # of odd sizes
    added = [(*args, randn(*outputs(*args).shape).to(args[5])) for args in plain]
    return [*cases, *small, *added]


def _by_row(x: Tensor, offs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    amax = amax_column_grouped.reference(x, offs)
    return quantize_fp8_grouped_t.reference(x, amax, offs, torch.float8_e4m3fn, True)


def _by_tensor(x: Tensor, offs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    amax = amax_tensor_grouped.reference(x, offs)
    return quantize_fp8_grouped_t.reference(x, amax, offs, torch.float8_e4m3fn, False)


def _by_block(x: Tensor, offs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_fp8_block_grouped_t.reference(x, offs, torch.float8_e4m3fn, True)
