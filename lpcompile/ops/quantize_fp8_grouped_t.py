"""Quantize each group's x.T to FP8, scales along its rows: x[T, C], amax, offs[E] -> values[C, Tp].

    -> values[C, Tp] e4m3 or e5m2, scales, offs_padded[E]

What wgrad of a grouped GEMM reads of dY and X. Every group begins at a multiple of 128, a step
of the grouped GEMM, and the padding, made here, is zero (layout: ``lpcompile.ops.groups``).

    amax[E, C] of ``amax_column_grouped`` -> scales[E * C], group after group: row scales
    amax[1] of ``amax_tensor_grouped``    -> scales[1]: one for all tokens

With ``rows``, of x[rows]. Arithmetic: ``lpcompile.ops.fp8``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import amax_column_grouped, amax_tensor_grouped, fp8, groups
from lpcompile.ops.define import cdiv, define, next_power_of_2, same_bits
from lpcompile.ops.groups import ALIGN
from lpcompile.ops.launcher import cached

Made = tuple[Tensor, Tensor, Tensor]


def outputs(
    x: Tensor,
    amax: Tensor,
    offs: Tensor,
    element: torch.dtype,
    pow2: bool,
    rows: Tensor | None = None,
) -> Made:
    columns = groups.padded_length(groups.num_tokens(x, rows), offs.shape[0], ALIGN)
    return (
        x.new_empty((x.shape[1], columns), dtype=element),
        x.new_empty((amax.numel(),), dtype=torch.float32),
        torch.empty_like(offs),
    )


def reference(
    x: Tensor,
    amax: Tensor,
    offs: Tensor,
    element: torch.dtype,
    pow2: bool,
    rows: Tensor | None = None,
) -> Made:
    x = groups.tokens(x, offs, rows)
    scale = fp8.encode_scale(amax, element, pow2)
    columns = groups.padded_length(x.shape[0], offs.shape[0], ALIGN)
    values = x.new_zeros((x.shape[1], columns), dtype=element)
    padded = groups.padded_ends(offs, ALIGN)
    ranges = zip(groups.slices(offs), groups.slices(padded), strict=True)
    for e, (group, to) in enumerate(ranges):
        made = fp8.cast(x[group], scale if amax.dim() == 1 else scale[e], element)
        values[:, to.start : to.start + made.shape[0]] = made.t()
    return values, fp8.decode_scale(scale).flatten(), padded


@cached
@triton.jit
def kernel(
    x_ptr,
    amax_ptr,
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
    ONE: tl.constexpr,  # one amax for all groups and columns
    ALIGN: tl.constexpr,
    LIMIT: tl.constexpr,
    POW2: tl.constexpr,
    ELEMENT: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    RUN: tl.constexpr,
    EP: tl.constexpr,
    EVEN: tl.constexpr,
):
    tile = tl.program_id(1)
    starts, ends = groups.load(offs_ptr, E, EP)
    group, first, last, index, begin = groups.locate(tile, starts, ends, BT, ALIGN, EP)
    if (tile == 0) & (tl.program_id(0) == 0):
        groups.store_padded_ends(padded_ptr, starts, ends, E, ALIGN, EP)
    t = first + index * BT + tl.arange(0, BT)
    run = first + index * BT + tl.arange(0, BT // RUN) * RUN
    pointers = groups.row_pointers(x_ptr, rows_ptr, run, last, T, stride_t, RUN)
    # In units of ALIGN, to show the compiler that whole vectors are stored.
    to = (begin // ALIGN + index * (BT // ALIGN)) * ALIGN + tl.arange(0, BT)
    # Tiles past the last group write the zeros between it and TP.
    stop = tl.where(group < E, begin // ALIGN + tl.cdiv(last - first, ALIGN), TP // ALIGN) * ALIGN
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    x = groups.load_turned(pointers, c, tl.where(T > 0, C, 0), stride_c, EVEN)  # [BC, BT]
    if ONE:
        scaled = x.to(tl.float32) * fp8.encode(tl.load(amax_ptr), LIMIT, POW2)
    else:
        at = group.to(tl.int64) * C + c
        amax = tl.load(amax_ptr + at, mask=(c < C) & (group < E), other=0.0)
        scaled = x.to(tl.float32) * fp8.encode(amax, LIMIT, POW2)[:, None]
    scaled = tl.where((t < last)[None, :], scaled, 0.0)
    out = c[:, None].to(tl.int64) * TP + to[None, :]
    live = (c < C)[:, None] & (to < stop)[None, :]
    tl.store(values_ptr + out, fp8.narrow(scaled, ELEMENT), mask=live)
    if ONE:
        if (tile == 0) & (tl.program_id(0) == 0):
            tl.store(scales_ptr, fp8.decode(fp8.encode(tl.load(amax_ptr), LIMIT, POW2), POW2))
    elif tile < E:  # tile e writes the scales of group e, empty or not
        at = tile.to(tl.int64) * C + c
        amax = tl.load(amax_ptr + at, mask=c < C, other=0.0)
        tl.store(scales_ptr + at, fp8.decode(fp8.encode(amax, LIMIT, POW2), POW2), mask=c < C)


def launch(
    x: Tensor,
    amax: Tensor,
    offs: Tensor,
    element: torch.dtype,
    pow2: bool,
    rows: Tensor | None = None,
) -> Made:
    if not fp8.runs_triton(x) or not x.shape[1]:
        return reference(x, amax, offs, element, pow2, rows)
    values, scales, padded = outputs(x, amax, offs, element, pow2, rows)
    (T, C), E = x.shape, offs.shape[0]
    BT, BC, run = 128, 64, 8
    # As many tiles as cut any groups, and the rest of values[C, Tp] (see ``groups.locate``).
    grid = (cdiv(C, BC), cdiv(values.shape[1], BT) + E)
    kernel[grid](
        x, amax, offs, rows, values, scales, padded, E, T, C, values.shape[1], *x.stride(),
        amax.dim() == 1, ALIGN, fp8.MAX[element], pow2, fp8.TRITON[element],
        BT, BC, run, next_power_of_2(E), C % BC == 0 and T > 0, num_warps=4,
    )  # fmt: skip
    return values, scales, padded


op = define(
    "quantize_fp8_grouped_t(Tensor x, Tensor amax, Tensor offs, ScalarType element, bool pow2,"
    " Tensor? rows=None) -> (Tensor, Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    return [
        (x, amaxes.reference(x, offs, *rows), offs, element, pow2, *rows)
        for x, offs, *rows in amax_column_grouped.samples(device)
        for amaxes in (amax_column_grouped, amax_tensor_grouped)
        for element, pow2 in ((e4m3, False), (e5m2, False), (e4m3, True))
    ]
