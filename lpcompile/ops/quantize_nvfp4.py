"""Quantize to NVFP4: x[R, C] bf16, amax[1] -> values[R, Cp / 2] uint8, scales[R, Cp / 16] e4m3.

One scale per 1x16 under that of the tensor, whose amax comes from ``amax_tensor``. Cp is C rounded
up to 32, and the padding is zero. With a seed[1] int64 rounding is stochastic, and ``draw`` tells
apart the ops that share the seed; without one it is to nearest. Of x[E, R, C], a stack, and
amax[E], every matrix alone. Arithmetic: ``lpcompile.ops.fp4``. The kernel serves the four NVFP4
quantizers: strides say what is transposed, ROWS what shares.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import amax_column, amax_tensor, blocks, fp4, fp8, micro_tile, turned
from lpcompile.ops.define import cdiv, define, round_up, same_bits
from lpcompile.ops.fp4 import ALIGN, BLOCK
from lpcompile.ops.launcher import cached
from lpcompile.ops.philox import words


def outputs(x: Tensor, amax: Tensor, seed: Tensor | None, draw: int) -> tuple[Tensor, Tensor]:
    *rows, C = x.shape
    CP = round_up(C, ALIGN)
    scales = x.new_empty((*rows, CP // BLOCK), dtype=torch.float8_e4m3fn)
    return x.new_empty((*rows, CP // 2), dtype=torch.uint8), scales


def reference(x: Tensor, amax: Tensor, seed: Tensor | None, draw: int) -> tuple[Tensor, Tensor]:
    return by_blocks(x, amax, words(seed, draw, x.shape), 1)


def by_blocks(x: Tensor, amax: Tensor, word: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """x[R, C] with a scale per (rows, 16), repeated over the rows.

    word: the random one of every element, where rounding is stochastic.
    """
    if x.dim() == 3:
        each = zip(x, amax, [None] * len(x) if word is None else word, strict=True)
        return blocks.stacked([by_blocks(one, a, w, rows) for one, a, w in each])
    C = x.shape[1]
    whole = blocks.padded(x, round_up(C, ALIGN))
    tensor = fp4.tensor_scale(amax)
    s = fp4.block_scale(blocks.shared_amax(whole, rows, BLOCK), tensor)
    v = whole.float() * blocks.spread(fp4.encode_scale(s, tensor), BLOCK)
    v[:, C:] = 0  # under a NaN scale too
    codes = fp4.nearest(v)
    if word is not None:
        codes[:, :C] = fp4.stochastic(v[:, :C], word)
    return fp4.pack(codes).contiguous(), s.contiguous()


@cached
@triton.jit
def kernel(
    x_ptr,
    amax_ptr,
    seed_ptr,
    values_ptr,
    scales_ptr,
    R: tl.int32,
    C: tl.int32,
    stride_e,
    stride_r,
    stride_c,
    draw,
    STOCHASTIC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    NATIVE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    RUN: tl.constexpr,
    EVEN: tl.constexpr,
):
    e = tl.program_id(2).to(INDEX)
    x_ptr += e.to(tl.int64) * stride_e
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    first = tl.program_id(1) * BC
    if RUN == 1:
        x = turned.load(x_ptr, r, first, R, C, stride_r, stride_c, BC, RUN, EVEN)
        micro_tile.store_nv(
            x, e * R + r, r < R, first, C, values_ptr, scales_ptr, amax_ptr + e, seed_ptr, draw,
            STOCHASTIC, INDEX, ROWS, False, NATIVE, EVEN,
        )  # fmt: skip
    else:
        c = first + tl.arange(0, BC // RUN) * RUN
        rows = turned.rows(x_ptr, r, c, R, C, stride_r, stride_c, RUN, EVEN)
        micro_tile.store_nv_runs(
            rows, e * R + r, r < R, first, C, values_ptr, scales_ptr, amax_ptr + e, seed_ptr, draw,
            STOCHASTIC, INDEX, ROWS, False, NATIVE, EVEN,
        )  # fmt: skip


# (transposed, shared by rows, stochastic) -> tile (BR, BC), RUN, warps
TILES = {
    (False, False, False): (4, 1024, 1, 4),
    (False, True, False): (16, 512, 1, 4),
    (True, False, False): (64, 128, 16, 4),
    (True, True, False): (64, 128, 16, 4),
    (False, False, True): (4, 512, 1, 4),
    (True, False, True): (64, 64, 16, 4),
}
TILES[False, True, True] = TILES[False, True, False]
TILES[True, True, True] = TILES[True, True, False]


def fill(
    x: Tensor,
    amax: Tensor,
    seed: Tensor | None,
    draw: int,
    made: tuple[Tensor, Tensor],
    rows: int,
) -> tuple[Tensor, Tensor]:
    """Run the kernel on x[..., R, C], whatever its strides, into ``made``."""
    values, scales = made
    x = fp8.stack(x)
    E, R, C = x.shape
    BR, BC, run, warps = TILES[blocks.is_turned(x), rows > 1, seed is not None]
    index = tl.uint32 if x.numel() <= 2**32 else tl.int64
    # No multiply-add fusion: x * enc is rounded before what is subtracted from it.
    kernel[(cdiv(R, BR), cdiv(C, BC), E)](
        x, amax, seed, values, scales, R, C, *x.stride(), draw,
        seed is not None, index, rows, blocks.runs_native(x), BR, BC, run,
        R % BR == 0 and C % BC == 0, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return made


def launch(x: Tensor, amax: Tensor, seed: Tensor | None, draw: int) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, amax, seed, draw)
    return fill(x, amax, seed, draw, outputs(x, amax, seed, draw), rows=1)


op = define(
    "quantize_nvfp4(Tensor x, Tensor amax, Tensor? seed, int draw) -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    seed = torch.tensor([0x0123456789ABCDEF], device=device)
    large = torch.randn(160, 288, device=device, dtype=torch.bfloat16)
    powers = torch.arange(-133, 128, device=device)[:, None]
    spread = torch.randn(261, 48, device=device, dtype=torch.bfloat16).clamp(-1.9, 1.9)
    spread = torch.ldexp(spread.double(), powers).to(torch.bfloat16)
    ties = (torch.arange(-48, 48, device=device) / 8).to(torch.bfloat16).expand(16, 96)
    experts = torch.randn(3, 41, 83, device=device, dtype=torch.bfloat16)
    inputs = [large, large.t(), spread, spread.t(), ties, large * 1e-38, large * 1e36]
    inputs += [experts, experts.mT]
    cases = [
        (x, amax_tensor.reference(x), s, draw)
        for x in (*inputs, *amax_column.matrices(device))
        for s, draw in ((None, 0), (seed, 0), (seed, 7))
    ]
    bad = next(x for x, *_ in cases if not x.isfinite().all())
    amax = torch.tensor([0.25], device=device)  # smaller than the tensor's
    return [*cases, (large, amax, None, 0), (bad, amax, None, 0), (bad, amax, seed, 3)]
