"""Blocks that share a scale, in torch and in a Triton tile: their amax, and a scale spread again.

A block is ``rows`` x ``size`` elements, ``size`` of them along the contraction. Square blocks
repeat their scale over their rows, which is how a GEMM reads it, so that scales are always
[R, C / size]. Padding counts as zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import device, fp8
from lpcompile.ops.define import round_up


def padded(x: Tensor, columns: int) -> Tensor:
    """x[R, C] with zero columns up to ``columns``."""
    return torch.nn.functional.pad(x, (0, columns - x.shape[1]))


def shared_amax(x: Tensor, rows: int, size: int) -> Tensor:
    """x[R, C], C a multiple of ``size`` -> amax[R, C / size] fp32; NaN above Inf above all."""
    R, C = x.shape
    if not x.numel():
        return x.new_zeros((R, C // size), dtype=torch.float32)
    whole = torch.nn.functional.pad(x, (0, 0, 0, round_up(R, rows) - R))
    cut = whole.abs().unflatten(1, (-1, size)).unflatten(0, (-1, rows))
    return cut.amax((1, 3)).float().repeat_interleave(rows, 0)[:R]


def spread(scale: Tensor, size: int) -> Tensor:
    """scale[R, n] -> [R, n * size], each for the ``size`` elements of its block."""
    return scale.repeat_interleave(size, 1)


def stacked(made: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The values and the scales of several matrices, each stacked."""
    values, scales = zip(*made, strict=True)
    return torch.stack(values), torch.stack(scales)


def is_turned(x: Tensor) -> bool:
    """Whether the rows of x[..., R, C] are adjacent in memory, and its columns are not."""
    return x.stride(-2) == 1 and x.stride(-1) != 1


def runs_native(x: Tensor) -> bool:
    """Whether x is on a Blackwell of the data center (10.x), whose conversions kernels use."""
    return device.capability(x)[0] == 10


def compares_pairs(x: Tensor) -> bool:
    """Whether the device of x compares 16-bit integers two at a time: capability 9.0 and up."""
    return device.capability(x) >= (9, 0)


@triton.jit
def tile_amax(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """``shared_amax`` of a bf16 tile x[BR, BC], BR a multiple of ROWS."""
    BR: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1] // SIZE
    amax = fp8.amax(tl.reshape(x, (BR, N, SIZE)), 2)
    if ROWS > 1:
        best = fp8.amax(tl.reshape(amax, (BR // ROWS, ROWS, N)), 1)
        best = tl.broadcast_to(tl.expand_dims(best, 1), (BR // ROWS, ROWS, N))
        amax = tl.reshape(best, (BR, N))
    return amax


@triton.jit
def tile_scaled(x, scale):
    """x[BR, BC] fp32 times a scale[BR, n], one for each BC / n elements of a row."""
    BR: tl.constexpr = x.shape[0]
    BC: tl.constexpr = x.shape[1]
    N: tl.constexpr = scale.shape[1]
    cut = tl.reshape(x, (BR, N, BC // N)) * tl.expand_dims(scale, 2)
    return tl.reshape(cut, (BR, BC))
