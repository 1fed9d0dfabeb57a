"""Philox4x32-10 (Salmon et al., SC 2011): the random numbers of stochastic rounding.

    word = the first word of Philox(key = seed, counter = (index, index >> 32, draw, 0))

``index`` is the logical element, r * C + c of the operand [R, C] that is quantized (of a stack,
after those of the matrices before), so that a draw depends on no launch grid, no tile and no
device; ``draw`` tells apart the ops that share a seed.
"""

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox(seed: Tensor, counter: tuple[Tensor | int, Tensor | int, int, int]) -> list[Tensor]:
    """The four words, 0 .. 2^32 - 1 as int64, for counters of any shape under a seed[1] int64."""
    c0, c1, c2, c3 = (torch.as_tensor(c, device=seed.device) for c in counter)
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        # The product wraps modulo 2^64, which int64 does too.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & MASK) ^ c1 ^ k0, ((p0 >> 32) & MASK) ^ c3 ^ k1
        c1, c3 = p1 & MASK, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return [c0, c1, c2, c3]


def words(seed: Tensor | None, draw: int, shape: Sequence[int]) -> Tensor | None:
    """The word of every element of an operand of that shape, int64; None without a seed."""
    if seed is None:
        return None
    index = torch.arange(prod(shape), device=seed.device).view(*shape)
    return philox(seed, (index & MASK, index >> 32, draw, 0))[0]


@triton.jit
def product(a, M: tl.constexpr):
    """The halves of uint32 a * M, upper first: one instruction, where ``tl.philox`` has two."""
    wide = a.to(tl.uint64) * M
    return (wide >> 32).to(tl.uint32), wide.to(tl.uint32)


@triton.jit
def halves(wide):
    """uint64 -> its halves, upper first; LLVM, which does not see what this is, keeps them apart.

    It would make one of 64 bits of the exclusive-or with a key and of the product after it.
    """
    return tl.inline_asm_elementwise(
        "mov.b64 {$1, $0}, $2;", "=r,=r,l", [wide],
        dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def tile_words(seed, draw, index, k: tl.constexpr = 0):
    """``words`` of a tile: of elements index[...] + k, seed int64, index uint32 or int64 -> uint32.

    What several k share of the first product is computed once: a uint32 index + k does not wrap.
    So is what all elements share, which in the first two rounds is half of the counter.
    """
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    high1, low1 = product(tl.cast(draw, tl.uint32), 0xCD9E8D57)
    c0 = high1 ^ k0
    if index.dtype.primitive_bitwidth == 64:
        c0 ^= ((index + k) >> 32).to(tl.uint32)
        high0, low0 = product((index + k).to(tl.uint32), 0xD2511F53)
    else:
        first = index.to(tl.uint64) * 0xD2511F53 + k * 0xD2511F53
        high0, low0 = halves(first)
    c2 = high0 ^ k1
    c1 = low1
    c3 = low0
    for i in tl.static_range(8):
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
        high0, low0 = product(c0, 0xD2511F53)
        high1, low1 = product(c2, 0xCD9E8D57)
        c0 = high1 ^ (c1 ^ k0)
        c2 = (high0 ^ k1) ^ c3 if i == 0 else high0 ^ (c3 ^ k1)
        c1 = low1
        c3 = low0
    k0 += 0x9E3779B9
    high1, low1 = product(c2, 0xCD9E8D57)
    return high1 ^ c1 ^ k0
