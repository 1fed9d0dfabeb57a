"""The GEMM of MXFP8 and NVFP4 operands: a[M, K], b[N, K] -> [M, N]; what ``scaled_mm`` does there.

On capability 10 torch's block-scaled GEMM, with swizzled scales and, for NVFP4, the scales of both
tensors on its fp32 accumulator: assembled from NVIDIA's documentation, never run on a Blackwell.
Elsewhere the operands are dequantized, which is exact in bf16, and ``wide_mm`` multiplies them;
in a graph ``passes/emulate.py`` does the same with nodes, which fuse. Dequantizing inside the GEMM
(``tl.dot_scaled``) reached a quarter of its rate.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from lpcompile.ops import (
    amax_tensor,
    blocks,
    dequantize,
    fp4,
    hadamard,
    quantize_mxfp8,
    quantize_mxfp8_square_t,
    quantize_mxfp8_t,
    quantize_nvfp4,
    quantize_nvfp4_square,
    quantize_nvfp4_square_t,
    swizzle,
    wide_mm,
)
from lpcompile.ops.define import ALIGN, round_up

SCALES = (torch.uint8, torch.float8_e4m3fn)  # e8m0 of MXFP8, e4m3 of NVFP4


class Side(NamedTuple):
    """One operand of the GEMM."""

    values: Tensor
    scales: Tensor
    amax: Tensor | None


def exact(a: Side, b: Side) -> Tensor:
    """The product of the dequantized operands in fp64."""
    return decoded(a, torch.float64) @ decoded(b, torch.float64).t()


def decoded(side: Side, dtype: torch.dtype) -> Tensor:
    """What an operand stands for: values * scales * amax / 2688, in ``dtype``."""
    x = dequantize.wide(side.values, side.scales).to(dtype)
    if side.amax is None:
        return x
    amax = side.amax.to(dtype)
    return x * amax / torch.full_like(amax, fp4.TENSOR_MAX)


def reference(a: Side, b: Side, out_dtype: torch.dtype) -> Tensor:
    x, w = (dequantize.wide(s.values, s.scales) for s in (a, b))
    return wide_mm.reference(x, w, out_dtype, a.amax, b.amax)


def launch(a: Side, b: Side, out_dtype: torch.dtype) -> Tensor:
    if blocks.runs_native(a.values):
        made = torch._scaled_mm_v2(**arguments(a, b, out_dtype))
        return made[:, : b.values.shape[0]]
    x, w = (dequantize.op(s.values, s.scales) for s in (a, b))
    return wide_mm.launch(x, w, out_dtype, a.amax, b.amax)


def arguments(a: Side, b: Side, out_dtype: torch.dtype) -> dict[str, Any]:
    """What ``torch._scaled_mm_v2`` is called with: e8m0 and e2m1 in their own types, b[K, N].

    N is padded with zeros to 16; swizzled scales reach to a multiple of 128 rows anyway.
    """
    N = b.values.shape[0]
    values = torch.nn.functional.pad(
        b.values.view(torch.uint8), (0, 0, 0, round_up(N, ALIGN) - N)
    ).view(b.values.dtype)
    scale_a, recipe, swizzles = _scaling(a)
    scale_b, _, _ = _scaling(b)
    return {
        "self": typed(a.values),
        "mat2": typed(values).t(),
        "scale_a": scale_a,
        "recipe_a": recipe,
        "swizzle_a": swizzles,
        "scale_b": scale_b,
        "recipe_b": recipe,
        "swizzle_b": swizzles,
        "bias": None,
        "out_dtype": out_dtype,
    }


def typed(values: Tensor) -> Tensor:
    """Values in the type that torch knows them by: bytes of two codes as float4_e2m1fn_x2."""
    return values.view(torch.float4_e2m1fn_x2) if dequantize.is_fp4(values) else values


def _scaling(side: Side) -> tuple[list[Tensor], list[int], list[int]]:
    """The scales of an operand, their kinds, and how they lie in memory."""
    scales = side.scales if side.scales.dim() == 1 else swizzle.op(side.scales)
    if side.amax is None:
        scales = scales.view(torch.float8_e8m0fnu)
        return [scales], [ScalingType.BlockWise1x32.value], [SwizzleType.SWIZZLE_32_4_4.value]
    return (
        [scales, fp4.tensor_decode(side.amax)],
        [ScalingType.BlockWise1x16.value, ScalingType.TensorWise.value],
        [SwizzleType.SWIZZLE_32_4_4.value, SwizzleType.NO_SWIZZLE.value],
    )


def samples(device: str) -> list[tuple[Any, ...]]:
    """Arguments of ``scaled_mm`` in both formats, scales plain and swizzled."""

    def randn(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)

    def mx(op: Any, x: Tensor) -> Side:
        values, scales = op.reference(x, torch.float8_e4m3fn, False)
        return Side(values, scales, None)

    def nv(op: Any, x: Tensor, seed: Tensor | None = None) -> Side:
        amax = amax_tensor.reference(x)
        values, scales = op.reference(x, amax, seed, 1)
        return Side(values, scales, amax)

    x, w, dy, odd = randn(48, 256), randn(64, 256), randn(48, 64), randn(37, 203)
    bad = x.clone()
    bad[5, 7] = torch.inf
    seed = torch.tensor([7], device=device)
    y, g = (hadamard.reference(t, hadamard.SIGNS) for t in (odd, randn(37, 21)))
    pairs = [
        (mx(quantize_mxfp8, x), mx(quantize_mxfp8, w)),
        (mx(quantize_mxfp8, dy), mx(quantize_mxfp8_square_t, w)),
        (mx(quantize_mxfp8_t, dy), mx(quantize_mxfp8_t, x)),
        (mx(quantize_mxfp8, bad), mx(quantize_mxfp8, w)),
        (mx(quantize_mxfp8, odd), mx(quantize_mxfp8, randn(21, 203))),
        (mx(quantize_mxfp8, x[:0]), mx(quantize_mxfp8, w)),
        (nv(quantize_nvfp4, x), nv(quantize_nvfp4_square, w)),
        (nv(quantize_nvfp4, dy, seed), nv(quantize_nvfp4_square_t, w)),
        (nv(quantize_nvfp4, g, seed), nv(quantize_nvfp4, y)),
        (nv(quantize_nvfp4, bad), nv(quantize_nvfp4, w)),
        (nv(quantize_nvfp4, x[:1] * 1e-20), nv(quantize_nvfp4, w * 1e10)),
        (nv(quantize_nvfp4, x[:, :0]), nv(quantize_nvfp4, w[:, :0])),
    ]
    tiled = [tuple(s._replace(scales=swizzle.reference(s.scales)) for s in p) for p in pairs]
    bf16 = [
        (a.values, a.scales, b.values, b.scales, torch.bfloat16, False, a.amax, b.amax)
        for a, b in (*pairs, *tiled)
    ]
    return [*bf16, *((*args[:4], torch.float32, *args[5:]) for args in (bf16[0], bf16[6]))]
