"""Quantize to NVFP4 with a scale per 16x16: x[R, C] -> values[R, Cp / 2], scales[R, Cp / 16].

For weights, so that W and W.T quantize alike. The scale is repeated over its 16 rows, as the GEMM
reads it. Cp is C rounded up to 32, and the padding is zero. Kernel: ``quantize_nvfp4``.
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
    return quantize_nvfp4.outputs(x, amax, seed, draw)


def reference(x: Tensor, amax: Tensor, seed: Tensor | None, draw: int) -> tuple[Tensor, Tensor]:
    return quantize_nvfp4.by_blocks(x, amax, words(seed, draw, x.shape), BLOCK)


def launch(x: Tensor, amax: Tensor, seed: Tensor | None, draw: int) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, amax, seed, draw)
    made = outputs(x, amax, seed, draw)
    return quantize_nvfp4.fill(x, amax, seed, draw, made, rows=BLOCK)


op = define(
    "quantize_nvfp4_square(Tensor x, Tensor amax, Tensor? seed, int draw) -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
