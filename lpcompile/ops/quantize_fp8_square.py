"""Quantize to FP8 with a scale per 128x128: x[R, C] bf16 -> values[R, Cp], scales[R/128, C/128].

For weights, so that W and W.T quantize alike. Cp is C rounded up to 16, and the padding is zero;
last blocks may be short. Rows of the scales lie multiples of 16 bytes apart, as cuBLASLt reads
them. Of x[E, R, C], every expert alone. Arithmetic: ``lpcompile.ops.fp8``; kernel:
``quantize_fp8_block``.
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
    *experts, R, C = x.shape
    values = x.new_empty((*experts, R, round_up(C, ALIGN)), dtype=element)
    rows, columns = round_up(R, BLOCK) // BLOCK, round_up(C, BLOCK) // BLOCK
    scales = x.new_empty((*experts, rows, round_up(columns, 4)), dtype=torch.float32)
    return values, scales[..., :columns]


def reference(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    values, scales = quantize_fp8_block.by_blocks(x, BLOCK, element, pow2)
    padded = outputs(x, element, pow2)[1]
    return values, padded.copy_(scales)


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
