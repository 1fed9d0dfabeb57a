"""Quantize x.T to FP8 with a scale per 128x128: x[R, C] -> values[C, Rp], scales[C/128, R/128].

The transpose of what ``quantize_fp8_square`` makes of x, value by value: what dgrad reads of W.
Rp is R rounded up to 16, and the padding is zero.
"""

import torch
from torch import Tensor

from lpcompile.ops import fp8, quantize_fp8_block, quantize_fp8_square
from lpcompile.ops.define import define, same_bits

kernel = quantize_fp8_block.kernel
samples = quantize_fp8_block.samples
agrees = same_bits


def outputs(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    return quantize_fp8_square.outputs(x.mT, element, pow2)


def reference(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    return quantize_fp8_square.reference(x.mT, element, pow2)


def launch(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, element, pow2)
    made = outputs(x, element, pow2)
    return quantize_fp8_block.fill(x.mT, made, element, pow2, square=True)


op = define(
    "quantize_fp8_square_t(Tensor x, ScalarType element, bool pow2) -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
