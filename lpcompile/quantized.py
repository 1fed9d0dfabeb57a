"""Narrow a tensor and widen it again, eager: the same ops that the compiled graphs call.

    quantize(x[R, C], operand) -> Quantized(values[R, Cp], scales, tensor_amax)
    dequantize(quantized)      -> x[R, Cp] fp32

Cp is C padded with zeros to what GEMMs read: 16 elements for FP8, 32 for MXFP8 and NVFP4. NVFP4
values are bytes of two e2m1 codes, the even element in the low half; e8m0 scales are uint8.
"""

import torch
from torch import Tensor

from lpcompile import gemm
from lpcompile.errors import RecipeError, ShapeError
from lpcompile.gemm import Quantized
from lpcompile.ops import block_scaled, scaled_mm
from lpcompile.recipes import Operand


@torch.no_grad()  # the ops have no gradient: what a reference would give is no promise
def quantize(
    x: Tensor,
    operand: Operand,
    *,
    tensor_amax: Tensor | float | None = None,
    seed: Tensor | int | None = None,
) -> Quantized:
    """Narrow x[R, C] bf16 as ``operand`` says, its scales along C.

    tensor_amax: the amax to scale the whole tensor by, for NVFP4; by default that of x, or of its
    Hadamard transform. seed: of stochastic rounding; by default from torch's generator. What comes
    back requires no grad. ShapeError for another dtype or shape, or for an option that the operand
    does not take.
    """
    if not isinstance(operand, Operand):
        raise RecipeError(
            f"quantize takes an Operand, as lpcompile.Operand('fp8', 'row'), got {operand!r}"
        )
    if x.dtype != torch.bfloat16 or x.dim() != 2:
        raise ShapeError(
            f"quantize takes x[R, C] bf16, got {x.dtype}{list(x.shape)}: reshape it to a matrix "
            "and cast it to torch.bfloat16"
        )
    if tensor_amax is not None and not operand.fmt.tensor_scale:
        raise ShapeError(
            f"tensor_amax is for a format with a tensor scale, and {operand.fmt.name!r} has none: "
            "leave it out"
        )
    if seed is not None and operand.rounding != "stochastic":
        raise ShapeError("a seed is for rounding='stochastic', which the operand does not have")
    if tensor_amax is not None:
        tensor_amax = torch.as_tensor(tensor_amax, dtype=torch.float32, device=x.device).view(1)
    if seed is not None:
        seed = torch.as_tensor(seed, dtype=torch.int64, device=x.device).view(1)
    return gemm.quantize(x, operand, tensor_amax=tensor_amax, seed=seed)


def dequantize(quantized: Quantized) -> Tensor:
    """values[R, Cp] times their scales -> fp32 [R, Cp]. A Hadamard transform stays in it."""
    if not isinstance(quantized, Quantized):
        raise RecipeError(
            f"dequantize takes what quantize gives back, got {type(quantized).__name__}: make "
            "lpcompile.Quantized(values, scales, tensor_amax) of its parts"
        )
    values, scales, amax = quantized
    if scales.dtype in block_scaled.SCALES:
        return block_scaled.decoded(block_scaled.Side(values, scales, amax), torch.float32)
    return scaled_mm.dequantize(values, scales, torch.float32)
