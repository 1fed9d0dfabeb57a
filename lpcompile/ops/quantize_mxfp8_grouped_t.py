"""Quantize each group of x.T to MXFP8: x[T, C] bf16, offs[E] -> values[C, Tp], scales...

    -> values[C, Tp] e4m3, scales[C, Tp / 32] e8m0 as uint8, offs_padded[E]

One scale per 32 tokens of a group: what wgrad of a grouped GEMM reads of dY and X. Every group
begins at a multiple of ``groups.ALIGN``, and the padding, made here, is zero.
Arithmetic: ``lpcompile.ops.mx``; layout: ``lpcompile.ops.groups``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import (
    amax_column_grouped,
    blocks,
    fp8,
    group_tile,
    groups,
    mx,
    quantize_mxfp8,
    turned,
)
from lpcompile.ops.define import cdiv, define, next_power_of_2, same_bits
from lpcompile.ops.groups import ALIGN
from lpcompile.ops.launcher import cached
from lpcompile.ops.mx import BLOCK

Made = tuple[Tensor, Tensor, Tensor]


def outputs(x: Tensor, offs: Tensor, element: torch.dtype, floor: bool) -> Made:
    C, columns = x.shape[1], groups.padded_length(x.shape[0], offs.shape[0], ALIGN)
    return (
        x.new_empty((C, columns), dtype=element),
        x.new_empty((C, columns // BLOCK), dtype=torch.uint8),
        torch.empty_like(offs),
    )


def reference(x: Tensor, offs: Tensor, element: torch.dtype, floor: bool) -> Made:
    values, scales, _ = outputs(x, offs, element, floor)
    values.view(torch.uint8).zero_(), scales.zero_()
    padded, x = groups.padded_ends(offs, ALIGN), groups.tokens(x, offs)
    for rows, to in zip(groups.slices(offs), groups.slices(padded), strict=True):
        made, over = quantize_mxfp8.by_blocks(x[rows].t(), 1, element, floor)
        values[:, to][:, : made.shape[1]] = made
        scales[:, to.start // BLOCK :][:, : over.shape[1]] = over
    return values, scales, padded


@triton.jit
def store(
    x_ptr, values_ptr, scales_ptr, run, last, c, C, block, stop, TP, stride_t, stride_c,
    LIMIT: tl.constexpr, EXPONENT: tl.constexpr, ELEMENT: tl.constexpr, FLOOR: tl.constexpr,
    NATIVE: tl.constexpr, ALIGN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Runs of 32 tokens from run[BN] on, before ``last``, channels c[BC]: a tile.

    It lies at ``block`` of the blocks of a row, before ``stop`` in ALIGN tokens. WHOLE: it has BC
    channels and as many tokens as it could.
    """
    BN: tl.constexpr = run.shape[0]
    rows = group_tile.load(x_ptr, run, last, c, C, stride_t, stride_c, 32, WHOLE)
    byte = mx.encode(turned.amax(rows), LIMIT, EXPONENT, FLOOR, NATIVE)
    enc = mx.encoding(byte)
    words = ()
    for k in tl.static_range(8):
        word = fp8.narrow4(
            turned.widened(rows[4 * k]) * enc,
            turned.widened(rows[4 * k + 1]) * enc,
            turned.widened(rows[4 * k + 2]) * enc,
            turned.widened(rows[4 * k + 3]) * enc,
            ELEMENT,
        )
        if not WHOLE:  # zero where there is no token, under a NaN scale too
            word &= fp8.first_bytes(last - run - 4 * k)[:, None]
        words = words + (word,)  # type: ignore[assignment]
    to = block * 8 + tl.arange(0, BN * 8)
    out = values_ptr.to(tl.pointer_type(tl.int32)) + c[:, None].to(tl.int64) * (TP // 4)
    live = (c < C)[:, None] & (to < stop * (ALIGN // 4))[None, :]
    turned.write(out + to[None, :], turned.turned(words), live, WHOLE)
    to = block + tl.arange(0, BN)
    out = scales_ptr + c[:, None].to(tl.int64) * (TP // 32) + to[None, :]
    live = (c < C)[:, None] & (to < stop * (ALIGN // 32))[None, :]
    turned.write(out, tl.trans(byte).to(tl.uint8), live, WHOLE)


@cached
@triton.jit
def kernel(
    x_ptr,
    offs_ptr,
    values_ptr,
    scales_ptr,
    padded_ptr,
    E,
    C,
    TP,
    stride_t,
    stride_c,
    LIMIT: tl.constexpr,
    EXPONENT: tl.constexpr,
    ELEMENT: tl.constexpr,
    FLOOR: tl.constexpr,
    NATIVE: tl.constexpr,
    ALIGN: tl.constexpr,  # of groups: the tokens of a tile
    BN: tl.constexpr,  # blocks along tokens
    BC: tl.constexpr,
    EP: tl.constexpr,
):
    tile = tl.program_id(1)
    starts, ends = groups.load(offs_ptr, E, EP)
    group, first, last, index, begin = groups.locate(tile, starts, ends, BN * 32, ALIGN, EP)
    if (tile == 0) & (tl.program_id(0) == 0):
        groups.store_padded_ends(padded_ptr, starts, ends, E, ALIGN, EP)
    # Tiles past the last group write the zeros between it and TP.
    stop = tl.where(group < E, begin // ALIGN + tl.cdiv(last - first, ALIGN), TP // ALIGN)
    block = begin // ALIGN * (ALIGN // 32) + index * BN
    run = first + (index * BN + tl.arange(0, BN)) * 32
    left = tl.program_id(0) * BC
    c = left + tl.arange(0, BC)
    if (first + (index + 1) * (BN * 32) <= last) & (left + BC <= C):
        store(
            x_ptr, values_ptr, scales_ptr, run, last, c, C, block, stop, TP, stride_t, stride_c,
            LIMIT, EXPONENT, ELEMENT, FLOOR, NATIVE, ALIGN, True,
        )  # fmt: skip
    else:
        store(
            x_ptr, values_ptr, scales_ptr, run, last, c, C, block, stop, TP, stride_t, stride_c,
            LIMIT, EXPONENT, ELEMENT, FLOOR, NATIVE, ALIGN, False,
        )  # fmt: skip


NAMES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def launch(x: Tensor, offs: Tensor, element: torch.dtype, floor: bool) -> Made:
    if not fp8.runs_triton(x) or not x.shape[1]:
        return reference(x, offs, element, floor)
    values, scales, padded = outputs(x, offs, element, floor)
    C, TP, E = x.shape[1], values.shape[1], offs.shape[0]
    BN, BC = ALIGN // BLOCK, 64
    grid = (cdiv(C, BC), TP // ALIGN)
    kernel[grid](
        x, offs, values, scales, padded, E, C, TP, *x.stride(),
        fp8.MAX[element], mx.EXPONENT[element], NAMES[element], floor, blocks.runs_native(x),
        ALIGN, BN, BC, next_power_of_2(E), num_warps=4,
    )  # fmt: skip
    return values, scales, padded


op = define(
    "quantize_mxfp8_grouped_t(Tensor x, Tensor offs, ScalarType element, bool floor)"
    " -> (Tensor, Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    return [
        (x, offs, element, floor)
        for x, offs, *picked in amax_column_grouped.samples(device)
        if not picked
        for element, floor in ((e4m3, False), (e4m3, True), (e5m2, False))
    ]
