"""Quantize x.T to MXFP8: x[M, C] bf16 -> values[C, Mp] e4m3, scales[C, Mp / 32] e8m0 as uint8.

One scale per 32 tokens of a column: what wgrad reads of dY and X. Mp is M rounded up to 32, and
the padding is zero. Of a stack, every matrix alone. Kernel: ``quantize_mxfp8``, on the transposed
strides.
"""

import torch
from torch import Tensor

from lpcompile.ops import fp8, quantize_mxfp8
from lpcompile.ops.define import define, same_bits

kernel = quantize_mxfp8.kernel
samples = quantize_mxfp8.samples
agrees = same_bits


def outputs(x: Tensor, element: torch.dtype, floor: bool) -> tuple[Tensor, Tensor]:
    return quantize_mxfp8.outputs(x.mT, element, floor)


def reference(x: Tensor, element: torch.dtype, floor: bool) -> tuple[Tensor, Tensor]:
    return quantize_mxfp8.by_blocks(x.mT, 1, element, floor)


def launch(x: Tensor, element: torch.dtype, floor: bool) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, element, floor)
    return quantize_mxfp8.fill(x.mT, outputs(x, element, floor), element, floor, rows=1)


op = define(
    "quantize_mxfp8_t(Tensor x, ScalarType element, bool floor) -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
