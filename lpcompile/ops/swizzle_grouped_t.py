"""``swizzle`` of groups of columns: scales[R, S], offs[E] -> [Rp, Sp], bytes.

What a grouped GEMM reads of both operands of wgrad, whose contraction runs along tokens; offs[E]
are the groups' ends in columns of scales. Each group's columns are padded with zeros to a multiple
of 4 and tiled on their own, one group's tiles, all rows, after the last's. Sp is S rounded up to 4,
plus 4 for each group; the tail is zero. Columns past offs[-1] reach nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import groups, swizzle, swizzle_grouped
from lpcompile.ops.define import cdiv, define, next_power_of_2, round_up, same_bits
from lpcompile.ops.launcher import cached
from lpcompile.ops.swizzle import COLUMNS, ROWS

agrees = same_bits


def outputs(scales: Tensor, offs: Tensor) -> Tensor:
    R, S = scales.shape
    columns = groups.padded_length(S, offs.shape[0], COLUMNS)
    return scales.new_empty((round_up(R, ROWS), columns))


def reference(scales: Tensor, offs: Tensor) -> Tensor:
    flat = torch.zeros_like(outputs(scales, offs), dtype=torch.uint8)
    at = 0
    for columns in groups.slices(offs):
        tiles = swizzle.tiles(scales[:, columns].view(torch.uint8)).flatten()
        flat.view(-1)[at : at + tiles.numel()] = tiles
        at += tiles.numel()
    return flat.view(scales.dtype)


@cached
@triton.jit
def kernel(
    scales_ptr, offs_ptr, flat_ptr, E, R, SP, stride_r, stride_s,
    BS: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    starts, ends = groups.load(offs_ptr, E, EP)
    strip = tl.program_id(1)
    group, first, last, index, padded = groups.locate(tl.program_id(0), starts, ends, BS, 4, EP)
    r = strip * 128 + tl.arange(0, 128)
    s = first + index * BS + tl.arange(0, BS)
    at = r[:, None].to(tl.int64) * stride_r + s[None, :].to(tl.int64) * stride_s
    scales = tl.load(scales_ptr + at, mask=(r < R)[:, None] & (s < last)[None, :], other=0)
    # Past the last group the tiles up to SP are one group more.
    across = tl.where(group < E, tl.cdiv(last - first, 4), SP // 4 - padded // 4)
    before = (padded // 4).to(tl.int64) * tl.cdiv(R, 128) + strip * across
    byte = index * (BS * 128) + tl.arange(0, BS * 128)
    tl.store(flat_ptr + before * 512 + byte, swizzle.tiles_of(scales), mask=byte < across * 512)


def launch(scales: Tensor, offs: Tensor) -> Tensor:
    flat = outputs(scales, offs)
    if flat.numel():
        (RP, SP), E, BS = flat.shape, offs.shape[0], 32
        kernel[(cdiv(SP, BS) + E, RP // ROWS)](
            scales.view(torch.uint8), offs, flat.view(torch.uint8), E, scales.shape[0], SP,
            *scales.stride(), BS, next_power_of_2(E), num_warps=4,
        )  # fmt: skip
    return flat


op = define(
    "swizzle_grouped_t(Tensor scales, Tensor offs) -> Tensor",
    outputs=outputs,
    reference=reference,
    launch=launch,
)


def samples(device: str) -> list[tuple[Tensor, Tensor]]:
    return [(scales.t(), offs) for scales, offs in swizzle_grouped.samples(device)]
