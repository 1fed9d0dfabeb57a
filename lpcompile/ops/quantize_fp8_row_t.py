"""Quantize x.T to FP8 with a scale per row of it: x[M, C] bf16 -> values[C, Mp] e4m3, scales[C].

What wgrad needs of dY and X, and dgrad of W. Of x[E, M, C], an expert weight, values[E, C, Mp] and
scales[E, C]. The amax of each column comes from ``amax_column``.
Mp is M rounded up to 16, and the padding is zero. Arithmetic: ``lpcompile.ops.fp8``.

M is not specialized: for M = 1, which Triton makes a constant, rows of padding were not zero in the
second column tile (triton 3.6, sm_90; the generated code converts four constants at once).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import amax_column, fp8
from lpcompile.ops.define import ALIGN, define, round_up, same_bits


def outputs(x: Tensor, amax: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    rows = round_up(x.shape[-2], ALIGN)
    values = x.new_empty((*x.shape[:-2], x.shape[-1], rows), dtype=element)
    return values, x.new_empty((*x.shape[:-2], x.shape[-1]), dtype=torch.float32)


def reference(x: Tensor, amax: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    scale = fp8.encode_scale(amax, element, pow2)
    values = fp8.cast(x, scale[..., None, :], element).mT
    return fp8.pad_columns(values, round_up(x.shape[-2], ALIGN)), fp8.decode_scale(scale)


@triton.jit(do_not_specialize=["M"])
def kernel(
    x_ptr,
    amax_ptr,
    values_ptr,
    scales_ptr,
    M,
    C,
    MP,
    stride_e,
    stride_m,
    stride_c,
    AMAX_STRIDE: tl.constexpr,  # 0: one amax for all columns
    LIMIT: tl.constexpr,
    POW2: tl.constexpr,
    ELEMENT: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    e = tl.program_id(2).to(tl.int64)
    x_ptr += e * stride_e
    values_ptr += e * C * MP
    amax_ptr += e * (C if AMAX_STRIDE else 1)
    scales_ptr += e * (C if AMAX_STRIDE else 1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    amax = tl.load(amax_ptr + c * AMAX_STRIDE, mask=c < C, other=0.0)
    scale = fp8.encode(amax, LIMIT, POW2)
    at = m[:, None].to(tl.int64) * stride_m + c[None, :].to(tl.int64) * stride_c
    live = (m < M)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    scaled = tl.where(live, x * scale[None, :], 0.0)
    values = tl.trans(fp8.narrow(scaled, ELEMENT))  # [BC, BM]
    out = c[:, None].to(tl.int64) * MP + m[None, :]
    tl.store(values_ptr + out, values, mask=(c < C)[:, None] & (m < MP)[None, :])
    if tl.program_id(1) == 0:
        tl.store(scales_ptr + c * AMAX_STRIDE, fp8.decode(scale), mask=c < C)


def fill(
    x: Tensor, amax: Tensor, made: tuple[Tensor, Tensor], element: torch.dtype, pow2: bool
) -> tuple[Tensor, Tensor]:
    """Run the kernel into ``made``, whose scales say whether there is one amax or one a column."""
    values, scales = made
    x = fp8.stack(x)
    (E, M, C), MP = x.shape, values.shape[-1]
    BM, BC = 128, 64
    kernel[(triton.cdiv(C, BC), triton.cdiv(MP, BM), E)](
        x, amax, values, scales, M, C, MP, *x.stride(), int(scales.numel() == E * C),
        fp8.MAX[element], pow2, fp8.TRITON[element], BM, BC, num_warps=4,
    )  # fmt: skip
    return made


def launch(x: Tensor, amax: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, amax, element, pow2)
    return fill(x, amax, outputs(x, amax, element, pow2), element, pow2)


op = define(
    "quantize_fp8_row_t(Tensor x, Tensor amax, ScalarType element, bool pow2) -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    return [
        (x, amax, element, pow2)
        for (x,) in amax_column.samples(device)
        for amax in [amax_column.reference(x)]
        for element, pow2 in ((e4m3, False), (e5m2, False), (e4m3, True))
    ]
