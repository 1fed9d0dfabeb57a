"""Multiply two quantized operands: a[M, K], b[N, K] -> [M, N], fp32 accumulation, one rounding.

Both have the contraction last (NT), with the decode scales that their quantizers made; the shape
of the scales says over what they reach: [1] the tensor, [R] a row, [R, K / 128] or
[R / 128, K / 128] blocks. Scales multiply the fp32 accumulator; a tensor scale applied to a bf16
result would be wrong. MXFP8 and NVFP4 operands, told by the dtype of their scales, and NVFP4's
tensor amax, go to ``lpcompile.ops.block_scaled``.
"""

from typing import Any

import torch
from torch import Tensor

from lpcompile.ops import (
    amax_column,
    amax_tensor,
    block_scaled,
    device,
    grouped_gemm,
    quantize_fp8_block,
    quantize_fp8_row,
    quantize_fp8_row_t,
    quantize_fp8_square,
    quantize_fp8_tensor,
)
from lpcompile.ops.block_scaled import Side
from lpcompile.ops.define import ALIGN, define, per_column, round_up

BLOCK = quantize_fp8_block.BLOCK
# FLOP from which a GEMM of two tensor scales that accumulates fast takes less time with both spread
# over rows, by the row-wise kernels: 1340 against 1449 us for 16384 x 14336 x 4096, 1459 / 1526 for
# 16384 x 4096 x 14336, 410 / 458 for 16384 x 4096 x 4096, 113 / 114 for 16384 x 1024 x 4096, and
# two launches more. Precise ones take 1 to 5% longer so. (H200, torch 2.11, CUDA 13.0)
ROWS_PAY = 2**38

# Where a row-wise GEMM that accumulates precisely contracts this many elements at most and writes
# as many as this at least, ``wgmma``, which stores one tile while it multiplies the next, takes
# less time than CUTLASS: 1015 against 941 TFLOP/s for 16384 x 4096 x 1024, 1131 against 1115 with
# 2048, but 1315 against 1332 with 4096.
SHORT, LARGE = 2048, 2**25


def outputs(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    a_amax: Tensor | None = None,
    b_amax: Tensor | None = None,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """values[R, K] times their decode scales, in ``dtype``."""
    wide, scales = values.to(dtype), scales.to(dtype)
    if scales.dim() == 1:
        return wide * scales[:, None]  # [1] broadcasts
    rows = BLOCK if _is_square(values, scales) else 1
    spread = scales.repeat_interleave(BLOCK, 1).repeat_interleave(rows, 0)
    return wide * spread[: values.shape[0], : values.shape[1]]


def exact(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    a_amax: Tensor | None = None,
    b_amax: Tensor | None = None,
) -> Tensor:
    """The product of the dequantized operands in fp64, which every implementation must meet."""
    if a_scale.dtype in block_scaled.SCALES:
        return block_scaled.exact(Side(a, a_scale, a_amax), Side(b, b_scale, b_amax))
    return dequantize(a, a_scale, torch.float64) @ dequantize(b, b_scale, torch.float64).t()


def reference(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    a_amax: Tensor | None = None,
    b_amax: Tensor | None = None,
) -> Tensor:
    if a_scale.dtype in block_scaled.SCALES:
        sides = Side(a, a_scale, a_amax), Side(b, b_scale, b_amax)
        return block_scaled.reference(*sides, out_dtype)
    if a_scale.dim() == 2:
        wide = dequantize(a, a_scale, torch.float32) @ dequantize(b, b_scale, torch.float32).t()
    else:
        wide = (a.float() @ b.float().t()) * a_scale[:, None] * b_scale
    return wide.to(out_dtype)


def launch(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    a_amax: Tensor | None = None,
    b_amax: Tensor | None = None,
) -> Tensor:
    if not (a.shape[0] and b.shape[0] and a.shape[1]):
        return a.new_zeros((a.shape[0], b.shape[0]), dtype=out_dtype)
    if a_scale.dtype in block_scaled.SCALES:
        sides = Side(a, a_scale, a_amax), Side(b, b_scale, b_amax)
        return block_scaled.launch(*sides, out_dtype)
    if device.capability(a) < (8, 9):
        return reference(a, a_scale, b, b_scale, out_dtype, fast_accum)
    if _suits_wgmma(a, a_scale, b, b_scale, fast_accum):
        from lpcompile.ops import wgmma  # which not every Triton can import

        made = outputs(a, a_scale, b, b_scale, out_dtype, fast_accum)
        wgmma.fill(a, a_scale, b, b_scale, None, made, fast_accum)
        return made
    if a_scale.dim() == 2 and not _suits_cublas(a, a_scale, b, b_scale):
        return _multiply_blocks(a, a_scale, b, b_scale, out_dtype)
    N = b.shape[0]
    if N % ALIGN:
        b, b_scale = _pad_rows(b, b_scale)
    by_row = fast_accum and out_dtype is torch.bfloat16 and 2 * a.numel() * N >= ROWS_PAY
    if a_scale.numel() == 1 and a.shape[0] != 1 and not by_row:
        made = _scaled_mm(a, a_scale, b, b_scale, out_dtype, fast_accum)
    elif a_scale.dim() == 1:
        a_scale, b_scale = _by_row(a_scale, a).unsqueeze(1), _by_row(b_scale, b).unsqueeze(0)
        made = _scaled_mm(a, a_scale, b, b_scale, torch.bfloat16, fast_accum)
    else:
        made = _scaled_mm(a, a_scale, b, b_scale.t(), torch.bfloat16, fast_accum)
    if made.shape[1] != N:
        made = made[:, :N].contiguous()
    return made if made.dtype is out_dtype else made.to(out_dtype)


def _by_row(scale: Tensor, values: Tensor) -> Tensor:
    """A scale for each row; cuBLASLt takes none that are spread by a stride of 0."""
    rows = values.shape[0]
    return scale if scale.shape[0] == rows else scale.expand(rows).contiguous()


def _suits_wgmma(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, fast_accum: bool) -> bool:
    """Whether our own kernel is the fastest: of short rows, or under 1x128 in both operands.

    Of those it is 2% to 5% faster than cuBLASLt: 1096 against 1067 TFLOP/s for 14336 x 4096 x
    16384, 999 against 978 for 1024 x 4096 x 16384. Under 128x128 in one it is 3% to 10% slower.
    """
    if a_scale.dim() == 2:
        pays = not (_is_square(a, a_scale) or _is_square(b, b_scale))
    else:
        by_row = a_scale.numel() > 1 and b_scale.numel() > 1 and not fast_accum
        pays = by_row and a.shape[1] <= SHORT and a.shape[0] * b.shape[0] >= LARGE
    return pays and grouped_gemm.suits_warpgroups(a, a_scale, b, b_scale)


def _suits_cublas(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> bool:
    """Whether cuBLASLt multiplies operands in blocks.

    On Hopper, where it takes whole blocks, of 128x128 in one operand at most, rows of scales that
    start at multiples of 16 bytes, and (for 128x128, torch 2.11) no stride between them but their
    number: K of 768 or 2816 is refused.
    """
    whole = a.shape[1] % (4 * BLOCK) == 0 and a.shape[0] % 4 == 0 and b.shape[0] % ALIGN == 0
    whole = whole and not (_is_square(a, a_scale) and _is_square(b, b_scale))
    return device.capability(a)[0] == 9 and whole


def _multiply_blocks(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """The product of operands in blocks by our own kernels, as of one group."""
    if _is_square(a, a_scale):  # of the first they take 1x128
        a_scale = a_scale.repeat_interleave(BLOCK, 0)[: a.shape[0]]
    made = outputs(a, a_scale, b, b_scale, out_dtype, False)
    offs = torch.full((1,), a.shape[0], device=a.device, dtype=torch.int32)
    grouped_gemm.fill(a, a_scale, b[None], b_scale[None], offs, made, fast_accum=False)
    return made


def _scaled_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    # Row-wise CUTLASS and block-wise cuBLASLt write bf16 only (torch 2.11, sm_90).
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)  # or it would be allocated twice
    return torch._scaled_mm(
        a, b.t(), a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast, out=out
    )


def _pad_rows(b: Tensor, b_scale: Tensor) -> tuple[Tensor, Tensor]:
    """b[N, K] with zero rows up to a multiple of 16, and scales for them where they go by row."""
    extra = round_up(b.shape[0], ALIGN) - b.shape[0]
    padded = torch.nn.functional.pad(b.view(torch.uint8), (0, 0, 0, extra)).view(b.dtype)
    if b_scale.numel() == 1:
        return padded, b_scale
    rows = round_up(padded.shape[0], BLOCK) // BLOCK if _is_square(b, b_scale) else padded.shape[0]
    more = torch.nn.functional.pad(b_scale.t(), (0, rows - b_scale.shape[0]), value=1.0).t()
    return padded, b_scale if rows == b_scale.shape[0] else more


def _is_square(values: Tensor, scales: Tensor) -> bool:
    """Whether scales are of 128x128, not of 1x128 or rows; where both fit they are the same."""
    return scales.dim() == 2 and scales.shape[0] != values.shape[0]


def flops(a: Any, a_scale: Any, b: Any, b_scale: Any, *args: Any, **kwargs: Any) -> int:
    """From the shapes: with a tensor amax, a byte of a is two elements."""
    is_fp4 = len(args) > 2 and args[2] is not None
    return 2 * a[0] * a[1] * (2 if is_fp4 else 1) * b[0]


op = define(
    "scaled_mm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, ScalarType out_dtype,"
    " bool fast_accum, Tensor? a_amax=None, Tensor? b_amax=None) -> Tensor",
    outputs=outputs,
    reference=reference,
    launch=launch,
    flops=flops,
)
kernel = None  # cuBLASLt and CUTLASS, through aten, and those of ``wgmma`` and ``grouped_gemm``
agrees = per_column(0.01)


def samples(device: str) -> list[tuple[Any, ...]]:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2

    def randn(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)

    def tensor(x: Tensor, element: torch.dtype) -> tuple[Tensor, Tensor]:
        return quantize_fp8_tensor.reference(x, amax_tensor.reference(x), element, False)

    x, w, dy, odd = randn(48, 256), randn(64, 256), randn(48, 64), randn(37, 203)
    row = quantize_fp8_row.reference
    block, square = quantize_fp8_block.reference, quantize_fp8_square.reference
    bad = x.clone()
    bad[5, 7] = torch.inf
    columns = quantize_fp8_row_t.reference(dy, amax_column.reference(dy), e4m3, True)
    pairs = [
        (tensor(x, e4m3), tensor(w, e4m3)),
        (tensor(dy, e5m2), tensor(w.t(), e4m3)),
        (row(x, e4m3, True), row(w, e4m3, True)),
        # One row of positives: a column is one element, which must not cancel.
        (row(x[:1].abs(), e4m3, False), row(w.abs(), e4m3, False)),
        (row(bad, e4m3, True), row(w, e4m3, True)),
        (row(odd, e4m3, True), row(randn(21, 203), e4m3, True)),
        (columns, row(x.t(), e4m3, True)),
        (row(x[:0], e4m3, True), row(w, e4m3, True)),
        (row(x[:, :0], e4m3, True), row(w[:, :0], e4m3, True)),
        (block(x, e4m3, True), square(w, e4m3, True)),
        (block(x, e4m3, True), block(w, e4m3, True)),
        (block(odd, e4m3, True), square(randn(21, 203), e4m3, True)),
        (square(randn(300, 384), e4m3, True), block(randn(272, 384), e4m3, True)),
        (square(odd, e4m3, True), square(randn(21, 203), e4m3, True)),
        (block(randn(300, 384), e4m3, True), square(randn(260, 384), e4m3, True)),
        (block(randn(300, 1024), e4m3, True), square(randn(272, 1024), e4m3, True)),
        (block(randn(300, 1024), e4m3, True), block(randn(272, 1024), e4m3, True)),
        (square(randn(300, 1024), e4m3, True), block(randn(272, 1024), e4m3, True)),
        (square(randn(300, 1024), e4m3, True), square(randn(272, 1024), e4m3, True)),
    ]
    bf16 = [(*a, *b, torch.bfloat16, False) for a, b in pairs]
    return [
        *bf16,
        *block_scaled.samples(device),
        (*pairs[0][0], *pairs[0][1], torch.float32, True),
        (*bf16[2][:4], torch.float32, True),
    ]
