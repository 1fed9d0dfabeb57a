"""The grouped GEMM of MXFP8 and NVFP4 operands: what ``scaled_grouped_mm`` does of those.

On capability 10 torch's block-scaled grouped GEMM, with the scales of each group in tiles and, for
NVFP4, those of the tensors on its fp32 accumulator: assembled from torch's source, never run on a
Blackwell. Elsewhere the operands are dequantized, which is exact in bf16, and ``wide_grouped_mm``
multiplies them.

Scales are brought into tiles here, on a device that reads them so, and not by a node of the graph
as for ``scaled_mm``: what dequantizes would have to find every group's tiles again, for nothing.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from lpcompile.ops import (
    amax_group,
    amax_tensor,
    amax_tensor_grouped,
    blocks,
    dequantize,
    fp4,
    hadamard,
    quantize_mxfp8,
    quantize_mxfp8_grouped_t,
    quantize_mxfp8_square_t,
    quantize_nvfp4,
    quantize_nvfp4_grouped_t,
    quantize_nvfp4_square,
    quantize_nvfp4_square_t,
    swizzle_experts,
    swizzle_grouped,
    swizzle_grouped_t,
    wide_grouped_mm,
)
from lpcompile.ops.block_scaled import Side, typed
from lpcompile.ops.define import ALIGN, round_up


def launch(a: Side, b: Side, offs: Tensor, made: Tensor, addend: Tensor | None = None) -> Tensor:
    """The product of a with b[E, N, K], or along the columns of both, into ``made`` or its like."""
    if blocks.runs_native(a.values):
        native = torch._scaled_grouped_mm_v2(**arguments(a, b, offs))
        native = native[..., : b.values.shape[-2]].to(made.dtype)
        return native.contiguous() if addend is None else native + addend
    x, w = (dequantize.op(s.values, s.scales) for s in (a, b))
    return wide_grouped_mm.launch(x, w, offs, made.dtype, a.amax, b.amax, addend)


def arguments(a: Side, b: Side, offs: Tensor) -> dict[str, Any]:
    """What ``torch._scaled_grouped_mm_v2`` is called with: e8m0 and e2m1 in their own types.

    b's rows, which become the result's columns, are padded with zeros to 16. The result is bf16,
    the only one that it writes (torch 2.11 to 2.13).
    """
    rows = b.values.shape[-2]
    padded = torch.nn.functional.pad(
        b.values.view(torch.uint8), (0, 0, 0, round_up(rows, ALIGN) - rows)
    )
    scale_a, recipe, swizzles = _scaling(a, offs, along_k=b.values.dim() == 2)
    scale_b, _, _ = _scaling(b, offs, along_k=b.values.dim() == 2)
    return {
        "self": typed(a.values),
        "mat2": typed(padded.view(b.values.dtype)).mT,
        "scale_a": scale_a,
        "recipe_a": recipe,
        "swizzle_a": swizzles,
        "scale_b": scale_b,
        "recipe_b": recipe,
        "swizzle_b": swizzles,
        "offs": offs,
        "bias": None,
        "out_dtype": torch.bfloat16,
        "contraction_dim": [],
        "use_fast_accum": False,
    }


def _scaling(side: Side, offs: Tensor, along_k: bool) -> tuple[list[Tensor], list[int], list[int]]:
    """The scales of an operand, of blocks and of tensors, their kinds, and how they lie."""
    if side.values.dim() == 3:
        scales = swizzle_experts.op(side.scales)
    elif along_k:
        block = dequantize.contraction(side.values) // side.scales.shape[1]
        scales = swizzle_grouped_t.op(side.scales, offs // block)
    else:
        scales = swizzle_grouped.op(side.scales, offs)
    tiles = SwizzleType.SWIZZLE_32_4_4.value
    if side.amax is None:
        return [scales.view(torch.float8_e8m0fnu)], [ScalingType.BlockWise1x32.value], [tiles]
    return (
        [scales, fp4.tensor_decode(side.amax).expand(offs.shape).contiguous()],
        [ScalingType.BlockWise1x16.value, ScalingType.TensorWise.value],
        [tiles, SwizzleType.NO_SWIZZLE.value],
    )


def samples(device: str) -> list[tuple[Any, ...]]:
    """Arguments of ``scaled_grouped_mm`` in both formats and every shape of product."""
    e4m3, seed = torch.float8_e4m3fn, torch.tensor([7], device=device)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    def mx(op: Any, x: Tensor) -> Side:
        made = op.reference(x, e4m3, False)
        return Side(made[0], made[1], None)

    def nv(op: Any, x: Tensor, given: Tensor | None = None, ends: Tensor | None = None) -> Side:
        amax = amax_tensor.reference(x) if ends is None else amax_tensor_grouped.reference(x, ends)
        made = op.reference(x, amax, given, 1)
        return Side(made[0], made[1], amax)

    def mx_t(x: Tensor, ends: Tensor) -> tuple[Side, Tensor]:
        values, scales, padded = quantize_mxfp8_grouped_t.reference(x, ends, e4m3, False)
        return Side(values, scales, None), padded

    def nv_t(
        x: Tensor, ends: Tensor, signs: int | None = None, given: Tensor | None = None
    ) -> tuple[Side, Tensor]:
        amax = amax_group.reference(x, ends, signs)
        made = quantize_nvfp4_grouped_t.reference(x, amax, ends, signs, given, 1)
        return Side(made[0], made[1], amax), made[2]

    cases: list[tuple[Side, Side, Tensor | None]] = []
    for T, N, K in ((40, 32, 256), (53, 21, 203)):
        ends = torch.tensor([0, T // 3, T // 3, T - 1, T], device=device, dtype=torch.int32)
        x, w, dy, each = randn(T, K), randn(5, N, K), randn(T, N), randn(5, 40, K)
        w[1] *= 100  # so that every expert's own scale shows
        cases += [
            (mx(quantize_mxfp8, x), mx(quantize_mxfp8, w), ends),
            (mx(quantize_mxfp8, dy), mx(quantize_mxfp8_square_t, w), ends),
            (mx(quantize_mxfp8, w), mx(quantize_mxfp8, each), None),
            (nv(quantize_nvfp4, x, ends=ends), nv(quantize_nvfp4_square, w), ends),
            (nv(quantize_nvfp4, dy, seed, ends), nv(quantize_nvfp4_square_t, w), ends),
            (nv(quantize_nvfp4, w), nv(quantize_nvfp4, each), None),
        ]
        for along in (mx_t, nv_t, partial(nv_t, signs=hadamard.SIGNS, given=seed)):
            (a, padded), (b, _) = along(dy * 100, ends), along(x, ends)
            cases.append((a, b, padded))
    bad = x.clone()
    bad[5, 7] = torch.inf
    cases.append((mx(quantize_mxfp8, bad), mx(quantize_mxfp8, w), ends))
    bf16 = [
        (a.values, a.scales, b.values, b.scales, offs, torch.bfloat16, False, a.amax, b.amax)
        for a, b, offs in cases
    ]
    return [*bf16, *((*args[:5], torch.float32, *args[6:]) for args in bf16[3:9:5])]
