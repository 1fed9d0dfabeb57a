"""Quantize each group of x.T to FP8 in 1x128: x[T, C], offs[E] -> values[C, Tp], scales...

    -> values[C, Tp] e4m3 or e5m2, scales[C, Tp / 128], offs_padded[E]

Blocks of 128 tokens inside each group, for wgrad. Groups begin at multiples of 128, as in
``quantize_fp8_grouped_t``: a step of the GEMM is one block, and the same offsets serve values and
scales. Padding is zero. Arithmetic: ``lpcompile.ops.fp8``; layout: ``lpcompile.ops.groups``. With
``rows``, of x[rows].
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import amax_column_grouped, fp8, groups, quantize_fp8_block
from lpcompile.ops.define import cdiv, define, next_power_of_2, same_bits
from lpcompile.ops.launcher import cached
from lpcompile.ops.quantize_fp8_block import BLOCK

Made = tuple[Tensor, Tensor, Tensor]


def outputs(
    x: Tensor, offs: Tensor, element: torch.dtype, pow2: bool, rows: Tensor | None = None
) -> Made:
    num_tokens = groups.num_tokens(x, rows)
    C, columns = x.shape[1], groups.padded_length(num_tokens, offs.shape[0], BLOCK)
    return (
        x.new_empty((C, columns), dtype=element),
        x.new_empty((columns // BLOCK, C), dtype=torch.float32).t(),
        torch.empty_like(offs),
    )


def reference(
    x: Tensor, offs: Tensor, element: torch.dtype, pow2: bool, rows: Tensor | None = None
) -> Made:
    x = groups.tokens(x, offs, rows)
    C, columns = x.shape[1], groups.padded_length(x.shape[0], offs.shape[0], BLOCK)
    values = x.new_zeros((C, columns), dtype=element)
    zeros = x.new_zeros((columns // BLOCK, C), dtype=torch.float32).t()
    scales = fp8.decode_scale(fp8.encode_scale(zeros, element, pow2))
    padded = groups.padded_ends(offs, BLOCK)
    for group, to in zip(groups.slices(offs), groups.slices(padded), strict=True):
        made, over = quantize_fp8_block.by_blocks(x[group].t(), 1, element, pow2)
        values[:, to.start : to.start + made.shape[1]] = made
        scales[:, to.start // BLOCK : to.start // BLOCK + over.shape[1]] = over
    return values, scales, padded


@cached
@triton.jit
def kernel(
    x_ptr,
    offs_ptr,
    rows_ptr,
    values_ptr,
    scales_ptr,
    padded_ptr,
    E,
    T,
    C,
    TP,
    stride_t,
    stride_c,
    LIMIT: tl.constexpr,
    POW2: tl.constexpr,
    ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    BC: tl.constexpr,
    RUN: tl.constexpr,
    EP: tl.constexpr,
    EVEN: tl.constexpr,
):
    tile = tl.program_id(1)
    starts, ends = groups.load(offs_ptr, E, EP)
    group, first, last, index, begin = groups.locate(tile, starts, ends, BLOCK, BLOCK, EP)
    if (tile == 0) & (tl.program_id(0) == 0):
        groups.store_padded_ends(padded_ptr, starts, ends, E, BLOCK, EP)
    t = first + index * BLOCK + tl.arange(0, BLOCK)
    run = first + index * BLOCK + tl.arange(0, BLOCK // RUN) * RUN
    pointers = groups.row_pointers(x_ptr, rows_ptr, run, last, T, stride_t, RUN)
    block = begin // BLOCK + index
    if block * BLOCK < TP:  # tiles past the last group are the padding up to TP
        to = block * BLOCK + tl.arange(0, BLOCK)
        c = tl.program_id(0) * BC + tl.arange(0, BC)
        x = groups.load_turned(pointers, c, tl.where(T > 0, C, 0), stride_c, EVEN)  # [BC, BLOCK]
        scale = fp8.encode(tl.where(group < E, fp8.amax(x, 1), 0.0), LIMIT, POW2)
        scaled = tl.where((t < last)[None, :], x.to(tl.float32) * scale[:, None], 0.0)
        out = c[:, None].to(tl.int64) * TP + to[None, :]
        tl.store(values_ptr + out, fp8.narrow(scaled, ELEMENT), mask=(c < C)[:, None])
        at = block.to(tl.int64) * C + c
        tl.store(scales_ptr + at, fp8.decode(scale, POW2), mask=c < C)


def launch(
    x: Tensor, offs: Tensor, element: torch.dtype, pow2: bool, rows: Tensor | None = None
) -> Made:
    if not fp8.runs_triton(x) or not x.shape[1]:
        return reference(x, offs, element, pow2, rows)
    values, scales, padded = outputs(x, offs, element, pow2, rows)
    (T, C), TP, E = x.shape, values.shape[1], offs.shape[0]
    BC, run = 64, 16
    grid = (cdiv(C, BC), TP // BLOCK + E)
    kernel[grid](
        x, offs, rows, values, scales, padded, E, T, C, TP, *x.stride(),
        fp8.MAX[element], pow2, fp8.TRITON[element],
        BLOCK, BC, run, next_power_of_2(E), C % BC == 0 and T > 0, num_warps=4,
    )  # fmt: skip
    return values, scales, padded


op = define(
    "quantize_fp8_block_grouped_t(Tensor x, Tensor offs, ScalarType element, bool pow2,"
    " Tensor? rows=None) -> (Tensor, Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    return [
        (x, offs, element, pow2, *rows)
        for x, offs, *rows in amax_column_grouped.samples(device)
        for element, pow2 in ((e4m3, False), (e5m2, False), (e4m3, True))
    ]
