"""Quantize x.T to FP8 under one given amax: x[M, C] bf16 -> values[C, Mp] e4m3 or e5m2, scale[1].

The twin of ``quantize_fp8_tensor`` for wgrad's operands and for dgrad's W. Mp is M rounded up to
16, and the padding is zero. Kernel: ``quantize_fp8_tensor``, on the transposed strides.
"""

import torch
from torch import Tensor

from lpcompile.ops import fp8, quantize_fp8_tensor
from lpcompile.ops.define import define, same_bits

kernel = quantize_fp8_tensor.kernel
samples = quantize_fp8_tensor.samples
agrees = same_bits


def outputs(x: Tensor, amax: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    return quantize_fp8_tensor.outputs(x.mT, amax, element, pow2)


def reference(x: Tensor, amax: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    return quantize_fp8_tensor.reference(x.mT, amax, element, pow2)


def launch(x: Tensor, amax: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, amax, element, pow2)
    made = outputs(x, amax, element, pow2)
    return quantize_fp8_tensor.fill(x.mT, amax, made, element, pow2)


op = define(
    "quantize_fp8_tensor_t(Tensor x, Tensor amax, ScalarType element, bool pow2)"
    " -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
