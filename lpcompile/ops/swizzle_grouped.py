"""``swizzle`` of groups of rows: scales[T, C], offs[E] -> [Tp, Cp], bytes.

What a grouped GEMM reads of X in fprop and of dY in dgrad. Each group's rows are padded with zeros
to a multiple of 128 and tiled on their own, one group's tiles after the last's. Tp is T rounded up
to 128, plus 128 for each group; the tail is zero. Rows past offs[-1] reach nothing.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import groups, swizzle
from lpcompile.ops.define import cdiv, define, next_power_of_2, round_up, same_bits
from lpcompile.ops.launcher import cached
from lpcompile.ops.swizzle import COLUMNS, ROWS

agrees = same_bits


def outputs(scales: Tensor, offs: Tensor) -> Tensor:
    T, C = scales.shape
    rows = groups.padded_length(T, offs.shape[0], ROWS)
    return scales.new_empty((rows, round_up(C, COLUMNS)))


def reference(scales: Tensor, offs: Tensor) -> Tensor:
    flat = torch.zeros_like(outputs(scales, offs), dtype=torch.uint8)
    at = 0
    for rows in groups.slices(offs):
        tiles = swizzle.tiles(scales[rows].view(torch.uint8)).flatten()
        flat.view(-1)[at : at + tiles.numel()] = tiles
        at += tiles.numel()
    return flat.view(scales.dtype)


@cached
@triton.jit
def kernel(
    scales_ptr, offs_ptr, flat_ptr, E, C, CP, stride_t, stride_c,
    BC: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    starts, ends = groups.load(offs_ptr, E, EP)
    strip, column = tl.program_id(0), tl.program_id(1) * BC
    _, first, last, index, _ = groups.locate(strip, starts, ends, 128, 128, EP)
    t = first + index * 128 + tl.arange(0, 128)
    c = column + tl.arange(0, BC)
    at = t[:, None].to(tl.int64) * stride_t + c[None, :].to(tl.int64) * stride_c
    scales = tl.load(scales_ptr + at, mask=(t < last)[:, None] & (c < C)[None, :], other=0)
    byte = column * 128 + tl.arange(0, BC * 128)
    to = flat_ptr + strip.to(tl.int64) * CP * 128
    tl.store(to + byte, swizzle.tiles_of(scales), mask=byte < CP * 128)


def launch(scales: Tensor, offs: Tensor) -> Tensor:
    flat = outputs(scales, offs)
    if flat.numel():
        (TP, CP), E, BC = flat.shape, offs.shape[0], 32
        kernel[(TP // ROWS, cdiv(CP, BC))](
            scales.view(torch.uint8), offs, flat.view(torch.uint8), E, scales.shape[1], CP,
            *scales.stride(), BC, next_power_of_2(E), num_warps=4,
        )  # fmt: skip
    return flat


op = define(
    "swizzle_grouped(Tensor scales, Tensor offs) -> Tensor",
    outputs=outputs,
    reference=reference,
    launch=launch,
)


def samples(device: str) -> list[tuple[Any, ...]]:
    def of(*ends: int) -> Tensor:
        return torch.tensor(ends, device=device, dtype=torch.int32)

    x = torch.randint(256, (333, 37), device=device, dtype=torch.uint8)
    return [
        (x, of(0, 1, 17, 150, 150, 333)),
        (x, of(128, 256)),
        (x, of(16, 16, 200)),
        (x.t(), of(10, 37)),
        (x, of(0, 0, 0)),
        (x, of(333)),
        (x[:0], of(0, 0)),
        (x, of(*range(1, 65), 320)),
        (x.view(torch.float8_e4m3fn), of(16, 16, 200)),
    ]
