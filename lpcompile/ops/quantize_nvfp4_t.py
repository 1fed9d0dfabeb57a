"""Quantize x.T to NVFP4: x[M, C] bf16, amax[1] -> values[C, Mp / 2], scales[C, Mp / 16] e4m3.

One scale per 16 tokens of a column: what wgrad reads where no Hadamard transform comes first. Mp
is M rounded up to 32, and the padding is zero. Kernel: ``quantize_nvfp4``.
"""

from torch import Tensor

from lpcompile.ops import fp8, quantize_nvfp4
from lpcompile.ops.define import define, same_bits
from lpcompile.ops.philox import words

kernel = quantize_nvfp4.kernel
samples = quantize_nvfp4.samples
agrees = same_bits


def outputs(x: Tensor, amax: Tensor, seed: Tensor | None, draw: int) -> tuple[Tensor, Tensor]:
    return quantize_nvfp4.outputs(x.mT, amax, seed, draw)


def reference(x: Tensor, amax: Tensor, seed: Tensor | None, draw: int) -> tuple[Tensor, Tensor]:
    return quantize_nvfp4.by_blocks(x.mT, amax, words(seed, draw, x.mT.shape), 1)


def launch(x: Tensor, amax: Tensor, seed: Tensor | None, draw: int) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, amax, seed, draw)
    made = outputs(x, amax, seed, draw)
    return quantize_nvfp4.fill(x.mT, amax, seed, draw, made, rows=1)


op = define(
    "quantize_nvfp4_t(Tensor x, Tensor amax, Tensor? seed, int draw) -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
