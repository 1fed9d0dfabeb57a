"""Quantize x.T to FP8 with a scale per 1x128 of it: x[M, C] -> values[C, Mp], scales[C, M / 128].

What wgrad reads of dY and X: blocks of 128 tokens. Mp is M rounded up to 16, and the padding is
zero. Arithmetic: ``lpcompile.ops.fp8``; kernel: ``quantize_fp8_block``, on the transposed strides.
"""

import torch
from torch import Tensor

from lpcompile.ops import fp8, quantize_fp8_block
from lpcompile.ops.define import define, same_bits

kernel = quantize_fp8_block.kernel
samples = quantize_fp8_block.samples
agrees = same_bits


def outputs(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    return quantize_fp8_block.outputs(x.mT, element, pow2)


def reference(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    return quantize_fp8_block.reference(x.mT, element, pow2)


def launch(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, element, pow2)
    made = outputs(x, element, pow2)
    return quantize_fp8_block.fill(x.mT, made, element, pow2, square=False)


op = define(
    "quantize_fp8_block_t(Tensor x, ScalarType element, bool pow2) -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
