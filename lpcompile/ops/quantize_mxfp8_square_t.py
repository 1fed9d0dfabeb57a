"""Quantize x.T to MXFP8 with a scale per 32x32: x[R, C] -> values[C, Rp], scales[C, Rp / 32].

The transpose of what ``quantize_mxfp8_square`` makes of x, value by value: what dgrad reads of W.
Rp is R rounded up to 32, and the padding is zero.
"""

import torch
from torch import Tensor

from lpcompile.ops import fp8, quantize_mxfp8
from lpcompile.ops.define import define, same_bits
from lpcompile.ops.mx import BLOCK

kernel = quantize_mxfp8.kernel
samples = quantize_mxfp8.samples
agrees = same_bits


def outputs(x: Tensor, element: torch.dtype, floor: bool) -> tuple[Tensor, Tensor]:
    return quantize_mxfp8.outputs(x.mT, element, floor)


def reference(x: Tensor, element: torch.dtype, floor: bool) -> tuple[Tensor, Tensor]:
    return quantize_mxfp8.by_blocks(x.mT, BLOCK, element, floor)


def launch(x: Tensor, element: torch.dtype, floor: bool) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, element, floor)
    return quantize_mxfp8.fill(x.mT, outputs(x, element, floor), element, floor, rows=BLOCK)


op = define(
    "quantize_mxfp8_square_t(Tensor x, ScalarType element, bool floor) -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
