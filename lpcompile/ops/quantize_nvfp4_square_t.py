"""Quantize x.T to NVFP4 with a scale per 16x16: x[R, C] -> values[C, Rp / 2], scales[C, Rp / 16].

The transpose of what ``quantize_nvfp4_square`` makes of x, value by value: what dgrad reads of W.
Rp is R rounded up to 32, and the padding is zero.
"""

from torch import Tensor

from lpcompile.ops import fp8, quantize_nvfp4
from lpcompile.ops.define import define, same_bits
from lpcompile.ops.fp4 import BLOCK
from lpcompile.ops.philox import words

kernel = quantize_nvfp4.kernel
samples = quantize_nvfp4.samples
agrees = same_bits


def outputs(x: Tensor, amax: Tensor, seed: Tensor | None, draw: int) -> tuple[Tensor, Tensor]:
    return quantize_nvfp4.outputs(x.mT, amax, seed, draw)


def reference(x: Tensor, amax: Tensor, seed: Tensor | None, draw: int) -> tuple[Tensor, Tensor]:
    return quantize_nvfp4.by_blocks(x.mT, amax, words(seed, draw, x.mT.shape), BLOCK)


def launch(x: Tensor, amax: Tensor, seed: Tensor | None, draw: int) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, amax, seed, draw)
    made = outputs(x, amax, seed, draw)
    return quantize_nvfp4.fill(x.mT, amax, seed, draw, made, rows=BLOCK)


op = define(
    "quantize_nvfp4_square_t(Tensor x, Tensor amax, Tensor? seed, int draw) -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
