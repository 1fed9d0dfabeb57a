"""The custom ops, one module each: outputs, reference, kernel, launch, op, samples, agrees."""

from lpcompile.ops import (
    amax_column,
    amax_tensor,
    fused_quantize,
    quantize_fp8_block,
    quantize_fp8_block_t,
    quantize_fp8_row,
    quantize_fp8_row_t,
    quantize_fp8_square,
    quantize_fp8_square_t,
    quantize_fp8_tensor,
    quantize_fp8_tensor_t,
    scaled_mm,
)

ALL = (
    amax_column,
    amax_tensor,
    fused_quantize,
    quantize_fp8_block,
    quantize_fp8_block_t,
    quantize_fp8_row,
    quantize_fp8_row_t,
    quantize_fp8_square,
    quantize_fp8_square_t,
    quantize_fp8_tensor,
    quantize_fp8_tensor_t,
    scaled_mm,
)
