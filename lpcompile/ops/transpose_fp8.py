"""Codes of x.T from those of x, under one scale: values[M, Kp], scale[1] -> values[K, Mp], scale.

With offs[E] of ragged groups of rows: -> values[K, Tp], scale[1], offs_padded[E].

The bits are those of ``quantize_fp8_tensor_t``, or of ``quantize_fp8_grouped_t``, of the x that
``quantize_fp8_tensor`` narrowed to ``values``: an element under the same scale has the same code.
One byte is read of an element where those read two, or all that x is computed of. ``columns`` is K,
up to which Kp is padding. Four rows become words of four bytes, as in ``fused_cast``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import (
    amax_column_grouped,
    amax_tensor_grouped,
    fp8,
    groups,
    quantize_fp8_tensor,
    turned,
)
from lpcompile.ops.define import ALIGN, cdiv, define, next_power_of_2, round_up, same_bits
from lpcompile.ops.launcher import cached


def outputs(
    values: Tensor, scale: Tensor, columns: int, offs: Tensor | None = None
) -> list[Tensor]:
    M = values.shape[0]
    if offs is None:
        return [values.new_empty((columns, round_up(M, ALIGN))), torch.empty_like(scale)]
    size = groups.padded_length(M, offs.shape[0], groups.ALIGN)
    return [values.new_empty((columns, size)), torch.empty_like(scale), torch.empty_like(offs)]


def reference(
    values: Tensor, scale: Tensor, columns: int, offs: Tensor | None = None
) -> list[Tensor]:
    made = [t.zero_() for t in outputs(values, scale, columns, offs)]
    turned_values = values[:, :columns].t()
    made[1].copy_(scale)
    if offs is None:
        made[0][:, : values.shape[0]] = turned_values
        return made
    made[2].copy_(groups.padded_ends(offs, groups.ALIGN))
    groups.tokens(values, offs)
    for group, to in zip(groups.slices(offs), groups.slices(made[2]), strict=True):
        size = group.stop - group.start
        made[0][:, to.start : to.start + size] = turned_values[:, group]
    return made


@triton.jit
def column_words(a, b, c, d):
    """Words of four columns of rows a, b, c, d -> for each of the columns a word of four rows."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, low2, high2;
        prmt.b32 low, $4, $5, 0x5140;
        prmt.b32 high, $4, $5, 0x7362;
        prmt.b32 low2, $6, $7, 0x5140;
        prmt.b32 high2, $6, $7, 0x7362;
        prmt.b32 $0, low, low2, 0x5410;
        prmt.b32 $1, low, low2, 0x7632;
        prmt.b32 $2, high, high2, 0x5410;
        prmt.b32 $3, high, high2, 0x7632;
        }""",
        "=r,=r,=r,=r,r,r,r,r",
        [a, b, c, d],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@cached
@triton.jit
def kernel(
    values_ptr,
    scale_ptr,
    offs_ptr,
    made_ptr,
    made_scale_ptr,
    padded_ptr,
    E,
    M: tl.int32,
    K: tl.int32,
    KP,
    MP,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    EP: tl.constexpr,
    EVEN: tl.constexpr,
):
    tile = tl.program_id(1)
    is_first = (tile == 0) & (tl.program_id(0) == 0)
    if offs_ptr is None:
        first, last, index, begin, stop, exists = 0, M, tile, 0, MP, M
    else:
        starts, ends = groups.load(offs_ptr, E, EP)
        group, first, last, index, begin = groups.locate(tile, starts, ends, BM, ALIGN, EP)
        # Tiles past the last group write the zeros between it and MP.
        stop = tl.where(group < E, begin + tl.cdiv(last - first, ALIGN) * ALIGN, MP)
        exists = tl.where(group < E, last, 0)
        if is_first:
            groups.store_padded_ends(padded_ptr, starts, ends, E, ALIGN, EP)
    if is_first:
        tl.store(made_scale_ptr, tl.load(scale_ptr))
    m = first + index * BM + 4 * tl.arange(0, BM // 4)
    keep = fp8.first_bytes(exists - m)[:, None]  # of four rows, those that exist
    # Divided and multiplied, to show the compiler that whole vectors are read and stored.
    words, made_words = KP // 16 * 4, MP // 16 * 4
    to = (begin // 16 + index * (BM // 16)) * 4 + tl.arange(0, BM // 4)
    live = (to < stop // 16 * 4)[None, :]
    values_ptr = values_ptr.to(tl.pointer_type(tl.int32))
    made_ptr = made_ptr.to(tl.pointer_type(tl.int32))
    w = tl.program_id(0) * (BK // 4) + tl.arange(0, BK // 4)
    rows = ()
    for k in tl.static_range(4):
        row = tl.maximum(tl.minimum(m + k, last - 1), 0).to(tl.int64)
        word = turned.read(
            values_ptr + row[:, None] * words + w[None, :], (w < words)[None, :], EVEN
        )
        rows = rows + (word,)  # type: ignore[assignment]
    a, b, c, d = column_words(*rows)
    joined = tl.join(tl.join(a & keep, c & keep), tl.join(b & keep, d & keep))
    joined = tl.reshape(joined, (BM // 4, BK // 4, 4))
    word = tl.reshape(tl.permute(joined, (1, 2, 0)), (BK, BM // 4))
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    out = made_ptr + k[:, None].to(tl.int64) * made_words + to[None, :]
    tl.store(out, word, mask=live if EVEN else live & (k < K)[:, None])


def launch(values: Tensor, scale: Tensor, columns: int, offs: Tensor | None = None) -> list[Tensor]:
    made, (M, KP) = outputs(values, scale, columns, offs), values.shape
    if not fp8.runs_triton(values) or not columns or not M:
        return reference(values, scale, columns, offs)
    BM, BK = 128, 128
    tiles, align, padded, E = cdiv(M, BM), ALIGN, None, 1
    if offs is not None:
        padded, align, E = made[2], groups.ALIGN, offs.shape[0]
        # As many tiles as cut any groups, and the rest of values[K, Tp] (see ``groups.locate``).
        tiles = cdiv(made[0].shape[1], BM) + E
    kernel[(cdiv(KP, BK), tiles)](
        values, scale, offs, made[0], made[1], padded, E, M, columns, KP, made[0].shape[1],
        align, BM, BK, next_power_of_2(E), columns == KP and KP % BK == 0, num_warps=4,
    )  # fmt: skip
    return made


op = define(
    "transpose_fp8(Tensor values, Tensor scale, int columns, Tensor? offs=None) -> Tensor[]",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    made: list[tuple[Any, ...]] = []
    for x, offs, *rows in amax_column_grouped.samples(device):
        if not rows:
            amax = amax_tensor_grouped.reference(x, offs)
            narrow = quantize_fp8_tensor.reference(x, amax, torch.float8_e4m3fn, False)
            made += [(*narrow, x.shape[1], offs)]
    for x, amax, element, pow2 in quantize_fp8_tensor.samples(device):
        if x.dim() == 2 and not pow2:
            narrow = quantize_fp8_tensor.reference(x, amax, element, pow2)
            made.append((*narrow, x.shape[1]))
    return made
