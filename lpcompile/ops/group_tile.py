"""Tiles of ragged groups: where they lie, and runs of their tokens in registers.

The rows of a tile are a tuple, as in ``turned``: rows[k][BN, BC] holds token k of BN runs, in BC
channels that lie side by side in x. A run is what one scale is for, or one Hadamard transform, so
that no maximum and no sum crosses threads; only what has been narrowed is exchanged.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import fp8, groups
from lpcompile.ops.define import next_power_of_2
from lpcompile.ops.launcher import cached


@triton.jit
def load(x_ptr, first, last, c, C, stride_t, stride_c, SIZE: tl.constexpr, whole):
    """Runs of SIZE tokens that begin at rows first[BN], channels c[BC] -> their rows, bf16.

    Rows from ``last`` on are zeros. whole: there are none, and no channel from C on; masks would
    be a third of what the kernel of a tile issues.
    """
    at = x_ptr + (first[:, None].to(tl.int64) * stride_t + c[None, :].to(tl.int64) * stride_c)
    if whole:
        rows = ()
        for _ in tl.static_range(SIZE):
            rows = rows + (tl.load(at),)  # type: ignore[assignment]
            at += stride_t
    else:
        rows = ()
        for k in tl.static_range(SIZE):
            live = (first + k < last)[:, None] & (c < C)[None, :]
            rows = rows + (tl.load(at, mask=live, other=0.0),)  # type: ignore[assignment]
            at += stride_t
    return rows


@triton.jit
def amax(rows):
    """The largest magnitude of each run [BN, BC], as its elements are in bf16; NaN above all.

    Rounding keeps order, so it comes after the maximum.
    """
    best = tl.abs(rows[0])
    for k in tl.static_range(1, len(rows)):
        best = fp8.larger(best, tl.abs(rows[k]))
    return best.to(tl.bfloat16).to(tl.float32)


def located(offs: Tensor, M: int, num_tiles: int, padded: Tensor) -> Tensor:
    """Where tiles of ``groups.ALIGN`` of M rows lie: [num_tiles, 8] int32, and ``padded`` ends.

    group, its first row here, the row after its last, the tile's index in it, and where the group
    begins in the padded layout; the rows past offs[-1] are a group after the last. A kernel whose
    programs have a tile each would take as long to search as to round.
    """
    made = offs.new_empty((num_tiles, 8), dtype=torch.int32)
    E = offs.shape[0]
    locate[(num_tiles,)](offs, made, padded, M, E, groups.ALIGN, next_power_of_2(E), num_warps=1)
    return made


@cached
@triton.jit
def locate(offs_ptr, made_ptr, padded_ptr, M: tl.int32, E, ALIGN: tl.constexpr, EP: tl.constexpr):
    tile = tl.program_id(0)
    starts, ends = groups.load(offs_ptr, E, EP)
    group, first, last, index, begin = groups.locate(tile, starts, ends, ALIGN, ALIGN, EP)
    first, last = groups.rest(group, first, last, ends, E, M)
    if tile == 0:
        groups.store_padded_ends(padded_ptr, starts, ends, E, ALIGN, EP)
    made_ptr += tile * 8
    tl.store(made_ptr, group)
    tl.store(made_ptr + 1, first)
    tl.store(made_ptr + 2, last)
    tl.store(made_ptr + 3, index)
    tl.store(made_ptr + 4, begin)
