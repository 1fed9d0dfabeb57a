"""Quantize to FP8 with a scale per 128x128: x[R, C] bf16 -> values[R, Cp], scales[R/128, C/128].

For weights, so that W and W.T quantize alike. Cp is C rounded up to 16, and the padding is zero;
last blocks may be short. Arithmetic: ``lpcompile.ops.fp8``; kernel: ``quantize_fp8_block``.
"""

import torch
from torch import Tensor

from lpcompile.ops import fp8, quantize_fp8_block
from lpcompile.ops.define import ALIGN, define, round_up, same_bits
from lpcompile.ops.quantize_fp8_block import BLOCK

kernel = quantize_fp8_block.kernel
samples = quantize_fp8_block.samples
agrees = same_bits


def outputs(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    R, C = x.shape
    values = x.new_empty((R, round_up(C, ALIGN)), dtype=element)
    blocks = (round_up(R, BLOCK) // BLOCK, round_up(C, BLOCK) // BLOCK)
    return values, x.new_empty(blocks, dtype=torch.float32)


def reference(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    return quantize_fp8_block.by_blocks(x, BLOCK, element, pow2)


def launch(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, element, pow2)
    made = outputs(x, element, pow2)
    return quantize_fp8_block.fill(x, made, element, pow2, square=True)


op = define(
    "quantize_fp8_square(Tensor x, ScalarType element, bool pow2) -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
