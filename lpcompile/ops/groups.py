"""Ragged groups of rows: group e of x[T, C] is x[offs[e - 1] : offs[e]], found on the device.

offs[E] int32 are cumulative ends; they never come to the host. Rows past offs[-1] are in no group.

Tokens may be rows picked from a smaller tensor: token t is x[rows[t]], and the kernels that take
``rows`` gather as they read, so that what is gathered never lies in memory.

An operand that is contracted along tokens lies with each group's rows, as columns, at a multiple of
``align``, zeros after them: values[C, Tp]. Where the groups lie there is ``offs_padded[E]``. Tp is
round_up(T, align) + E * align, enough for any groups of T rows, so that no shape depends on data.

ALIGN is a step of the GEMM in FP8, two in bf16, and what the tiles of scales of MXFP8 and NVFP4
span: no step needs a mask, and it reads whole lines of memory. From multiples of 16, the least that
CUTLASS takes, its own grouped wgrad reaches 611 TFLOP/s where from multiples of 128 it reaches 876
(H200, 64 groups of 98304 rows in all, 1408 x 2048). On average it costs 64 columns a group.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.errors import ShapeError
from lpcompile.ops import turned
from lpcompile.ops.define import round_up

ALIGN = 128


def padded_length(num_tokens: Any, num_groups: int, align: int) -> Any:
    """Tp: the columns that hold ``num_groups`` groups of ``num_tokens`` rows, each aligned."""
    return round_up(num_tokens, align) + num_groups * align


def padded_ends(offs: Tensor, align: int) -> Tensor:
    """offs[E] of groups whose sizes are rounded up to ``align``; without a synchronisation."""
    sizes = offs.diff(prepend=offs.new_zeros(1))
    return round_up(sizes, align).cumsum(0, dtype=torch.int32)


def slices(offs: Tensor) -> list[slice]:
    """Every group's rows. For references: it waits for the device."""
    return [slice(start, end) for start, end in itertools.pairwise([0, *offs.tolist()])]


def num_tokens(x: Tensor, rows: Tensor | None) -> Any:
    """How many tokens x[T, C] is, or x[rows]."""
    return (x if rows is None else rows).shape[0]


def tokens(x: Tensor, offs: Tensor, rows: Tensor | None = None) -> Tensor:
    """x[T, C], or x[rows], in which groups end at ``offs``. For references.

    A kernel that is given the ends of another tensor's groups reads past this one's.
    """
    made = x if rows is None else x[rows]
    if len(offs) and offs[-1] > len(made):
        raise ShapeError(
            f"groups that end at row {int(offs[-1])} in a tensor of {len(made)}: got the offs of "
            "another one; give those that end inside it"
        )
    return made


@triton.jit
def source(rows_ptr, t, live, T):
    """The rows of x[T, C] that tokens t are: they themselves where ``rows_ptr`` is None."""
    t = t.to(tl.int64)
    if rows_ptr is not None:
        t = tl.load(rows_ptr + t, mask=live, other=0).to(tl.int64)
        t = tl.where(t < 0, t + T, t)  # counted from the end
    return t


@triton.jit
def row_pointers(x_ptr, rows_ptr, t, last, T, stride_t, RUN: tl.constexpr):
    """Where token t[BN] + k begins, for each k < RUN: pointers [BN, 1].

    From ``last`` on the token before it, which changes no maximum of a tile that has one.
    """
    out = ()
    for k in tl.static_range(RUN):
        real = tl.maximum(tl.minimum(t + k, last - 1), 0)
        row = source(rows_ptr, real, real < last, T)
        out = out + (x_ptr + row[:, None] * stride_t,)  # type: ignore[assignment]
    return out


@triton.jit
def load_turned(pointers, c, C, stride_c, EVEN: tl.constexpr):
    """Channels c[BC] of the tokens of ``row_pointers`` -> [BC, BN * RUN]. EVEN: all c < C."""
    rows = ()
    for k in tl.static_range(len(pointers)):
        at = pointers[k] + c[None, :].to(tl.int64) * stride_c
        rows = rows + (turned.read(at, (c < C)[None, :], EVEN),)  # type: ignore[assignment]
    return turned.turned(rows)


@triton.jit
def load(offs_ptr, E, EP: tl.constexpr):
    """The first row of every group and the row after its last, [EP] each; 0 past E."""
    e = tl.arange(0, EP)
    starts = tl.load(offs_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    return starts, tl.load(offs_ptr + e, mask=e < E, other=0)


@triton.jit
def locate(tile, starts, ends, TILE: tl.constexpr, ALIGN: tl.constexpr, EP: tl.constexpr):
    """Where tile ``tile`` lies, of the tiles of TILE rows (a multiple of ALIGN) that cut groups.

    -> its group, the group's first row, the row after its last, the tile's index in the group, and
    the group's first row in the padded layout. Past the last tile: group EP, no rows, the index
    counted from there, the end of the padded layout.
    """
    sizes = ends - starts
    sizes = tl.where(sizes > 0, sizes, 0)  # past E
    tiles = tl.cdiv(sizes, TILE)
    group = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    e = tl.arange(0, EP)
    first = tl.sum(tl.where(e == group, starts, 0), 0)
    last = tl.sum(tl.where(e == group, ends, 0), 0)
    index = tile - tl.sum(tl.where(e < group, tiles, 0), 0)
    padded = tl.sum(tl.where(e < group, tl.cdiv(sizes, ALIGN) * ALIGN, 0), 0)
    return group, first, last, index, padded


@triton.jit
def rest(group, first, last, ends, E, T):
    """A tile's ``first`` and ``last``, with the rows past offs[-1] as the group after the last."""
    past = tl.max(ends, 0)
    return tl.where(group < E, first, past), tl.where(group < E, last, T)


@triton.jit
def store_padded_ends(padded_ptr, starts, ends, E, ALIGN: tl.constexpr, EP: tl.constexpr):
    """``padded_ends``, in a kernel."""
    e = tl.arange(0, EP)
    sizes = tl.where(e < E, ends - starts, 0)
    tl.store(padded_ptr + e, tl.cumsum(tl.cdiv(sizes, ALIGN) * ALIGN, 0), mask=e < E)
