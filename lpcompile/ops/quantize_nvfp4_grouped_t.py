"""Quantize each group of x.T to NVFP4: x[T, C] bf16, amax[E], offs[E] -> values[C, Tp / 2], ...

    -> values[C, Tp / 2] uint8, scales[C, Tp / 16] e4m3, offs_padded[E] in elements

One scale per 16 tokens of a group, under the group's own, whose amax comes from ``amax_group``:
what wgrad of a grouped GEMM reads of dY and X. Every group begins at a multiple of
``groups.ALIGN``, and the padding, made here, is zero. With ``signs``, after the Hadamard transform
of each group's rows, padded to 16. With a seed[1] int64 rounding is stochastic; the logical
element is that of values. Arithmetic: ``lpcompile.ops.fp4``; layout: ``groups``.

An op of its own for the transform would write x in bf16 once more, in a layout of groups that this
op would have to take as well: x would be read or written 4.3 times, where it is 2.3 times.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import (
    amax_column_grouped,
    amax_group,
    blocks,
    fp4,
    fp4_codes,
    fp8,
    group_tile,
    groups,
    hadamard,
    quantize_nvfp4,
    turned,
)
from lpcompile.ops.define import cdiv, define, next_power_of_2, same_bits
from lpcompile.ops.fp4 import BLOCK
from lpcompile.ops.groups import ALIGN
from lpcompile.ops.launcher import cached
from lpcompile.ops.philox import words

Made = tuple[Tensor, Tensor, Tensor]


def outputs(
    x: Tensor, amax: Tensor, offs: Tensor, signs: int | None, seed: Tensor | None, draw: int
) -> Made:
    C, columns = x.shape[1], groups.padded_length(x.shape[0], offs.shape[0], ALIGN)
    return (
        x.new_empty((C, columns // 2), dtype=torch.uint8),
        x.new_empty((C, columns // BLOCK), dtype=torch.float8_e4m3fn),
        torch.empty_like(offs),
    )


def reference(
    x: Tensor, amax: Tensor, offs: Tensor, signs: int | None, seed: Tensor | None, draw: int
) -> Made:
    values, scales, _ = outputs(x, amax, offs, signs, seed, draw)
    values.zero_(), scales.view(torch.uint8).zero_()
    padded, x = groups.padded_ends(offs, ALIGN), groups.tokens(x, offs)
    word = words(seed, draw, (x.shape[1], 2 * values.shape[1]))
    ranges = zip(groups.slices(offs), groups.slices(padded), strict=True)
    for e, (rows, to) in enumerate(ranges):
        one = x[rows].t() if signs is None else hadamard.reference(x[rows], signs)
        drawn = None if word is None else word[:, to.start : to.start + one.shape[1]]
        made, over = quantize_nvfp4.by_blocks(one, amax[e : e + 1], drawn, 1)
        values[:, to.start // 2 :][:, : made.shape[1]] = made
        scales[:, to.start // BLOCK :][:, : over.shape[1]] = over
    return values, scales, padded


@triton.jit
def store(
    x_ptr, values_ptr, scales_ptr, tensor, seed, draw, run, first, last, c, C, block, stop, TP,
    stride_t, stride_c,
    SIGNS: tl.constexpr, STOCHASTIC: tl.constexpr, NATIVE: tl.constexpr, ALIGN: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Runs of 16 tokens from run[BN] on, of the group [first, last), channels c[BC]: a tile.

    It lies at ``block`` of the blocks of a row, before ``stop`` in ALIGN tokens. WHOLE: it has BC
    channels and as many tokens as it could.
    """
    BN: tl.constexpr = run.shape[0]
    rows = group_tile.load(x_ptr, run, last, c, C, stride_t, stride_c, 16, WHOLE)
    if SIGNS is not None:
        rows = hadamard.narrowed(hadamard.transformed(rows, SIGNS))
    s = fp4.tile_block_scale(turned.amax(rows), tensor)
    enc = fp4.tile_encode_scale(s, tensor)
    words = ()
    for k in tl.static_range(2):
        # Eight codes to a word; the logical index of its first.
        at = (block + tl.arange(0, BN)) * 16 + 8 * k
        element = c[None, :].to(tl.int64) * TP + at[:, None]
        part = rows[8 * k : 8 * k + 8]
        word = fp4_codes.run_packed(part, enc, element, seed, draw, STOCHASTIC, NATIVE)
        if not WHOLE:
            # Zero where there is no token, under a NaN scale too; the transform spreads those of a
            # run over all of it.
            tokens = last - run if SIGNS is None else tl.where(run < last, 16, 0)
            word &= fp4_codes.first_codes(tokens - 8 * k)[:, None]
        words = words + (word,)  # type: ignore[assignment]
    word = block * 2 + tl.arange(0, BN * 2)
    out = values_ptr.to(tl.pointer_type(tl.int32)) + c[:, None].to(tl.int64) * (TP // 8)
    live = (c < C)[:, None] & (word < stop * (ALIGN // 8))[None, :]
    turned.write(out + word[None, :], turned.turned(words), live, WHOLE)
    scales = tl.trans(s).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    if not WHOLE:
        # Past the 32 tokens that share words the padding is zero under a NaN scale too.
        full = run < first + tl.cdiv(last - first, 32) * 32
        scales = tl.where(full[None, :], scales, 0)
    to = block + tl.arange(0, BN)
    out = scales_ptr + c[:, None].to(tl.int64) * (TP // 16) + to[None, :]
    turned.write(out, scales, (c < C)[:, None] & (to < stop * (ALIGN // 16))[None, :], WHOLE)


@cached
@triton.jit
def kernel(
    x_ptr,
    amax_ptr,
    offs_ptr,
    seed_ptr,
    values_ptr,
    scales_ptr,
    padded_ptr,
    E,
    C,
    TP,
    stride_t,
    stride_c,
    draw,
    SIGNS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    NATIVE: tl.constexpr,
    ALIGN: tl.constexpr,  # of groups
    BN: tl.constexpr,  # blocks along tokens, an even number that divides ALIGN / 16
    BC: tl.constexpr,
    EP: tl.constexpr,
):
    tile = tl.program_id(1)
    starts, ends = groups.load(offs_ptr, E, EP)
    SUB: tl.constexpr = ALIGN // (BN * 16)  # tiles to ALIGN tokens, so that they cover its padding
    group, first, last, index, begin = groups.locate(tile // SUB, starts, ends, ALIGN, ALIGN, EP)
    if (tile == 0) & (tl.program_id(0) == 0):
        groups.store_padded_ends(padded_ptr, starts, ends, E, ALIGN, EP)
    # Tiles past the last group write the zeros between it and TP.
    stop = tl.where(group < E, begin // ALIGN + tl.cdiv(last - first, ALIGN), TP // ALIGN)
    index = index * SUB + tile % SUB
    block = begin // ALIGN * (ALIGN // 16) + index * BN
    run = first + (index * BN + tl.arange(0, BN)) * 16
    tensor = fp4.tile_tensor_scale(tl.load(amax_ptr + group, mask=group < E, other=0.0))
    seed = tl.load(seed_ptr) if STOCHASTIC else 0
    left = tl.program_id(0) * BC
    c = left + tl.arange(0, BC)
    if (first + (index + 1) * (BN * 16) <= last) & (left + BC <= C):
        store(
            x_ptr, values_ptr, scales_ptr, tensor, seed, draw, run, first, last, c, C, block,
            stop, TP, stride_t, stride_c, SIGNS, STOCHASTIC, NATIVE, ALIGN, True,
        )  # fmt: skip
    else:
        store(
            x_ptr, values_ptr, scales_ptr, tensor, seed, draw, run, first, last, c, C, block,
            stop, TP, stride_t, stride_c, SIGNS, STOCHASTIC, NATIVE, ALIGN, False,
        )  # fmt: skip


# (transformed, stochastic) -> blocks along tokens, channels, warps, registers. Tiles that are not
# whole take more than 80, and may spill: the others are nearly all.
TILES = {
    (False, False): (8, 64, 4, 80),
    (True, False): (8, 64, 4, 80),
    (False, True): (4, 64, 4, None),
    (True, True): (4, 64, 4, None),
}


def launch(
    x: Tensor, amax: Tensor, offs: Tensor, signs: int | None, seed: Tensor | None, draw: int
) -> Made:
    if not fp8.runs_triton(x) or not x.shape[1]:
        return reference(x, amax, offs, signs, seed, draw)
    values, scales, padded = outputs(x, amax, offs, signs, seed, draw)
    C, TP, E = x.shape[1], 2 * values.shape[1], offs.shape[0]
    BN, BC, warps, registers = TILES[signs is not None, seed is not None]
    grid = (cdiv(C, BC), TP // (BN * BLOCK))
    # No multiply-add fusion: x * enc is rounded before what is subtracted from it.
    kernel[grid](
        x, amax, offs, seed, values, scales.view(torch.uint8), padded, E, C, TP, *x.stride(), draw,
        signs, seed is not None, blocks.runs_native(x),
        ALIGN, BN, BC, next_power_of_2(E), num_warps=warps,
        maxnreg=registers, enable_fp_fusion=False,
    )  # fmt: skip
    return values, scales, padded


op = define(
    "quantize_nvfp4_grouped_t(Tensor x, Tensor amax, Tensor offs, int? signs, Tensor? seed,"
    " int draw) -> (Tensor, Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    seed = torch.tensor([0x0123456789ABCDEF], device=device)
    # Every tie and its neighbours, under a scale of 1, and of 2, past the largest code.
    edges = [6.0, *(m for m, _ in fp4.MIDPOINTS), *(-m for m, _ in fp4.MIDPOINTS), 0.0]
    beside = 1 + torch.arange(-2, 3, device=device) * 2.0**-7
    ties = (torch.tensor(edges, device=device)[:, None] * beside).bfloat16()  # [16, 5]
    ties[0] = 6
    one, end = torch.tensor([2688.0], device=device), torch.tensor([16], device=device).int()
    return [
        *((ties, amax, end, None, None, 0) for amax in (one, one / 2)),
        *(
            (x, amax_group.reference(x, offs, signs), offs, signs, given, draw)
            for x, offs, *picked in amax_column_grouped.samples(device)
            if not picked
            for signs in (None, hadamard.SIGNS)
            for given, draw in ((None, 0), (seed, 7))
        ),
    ]
