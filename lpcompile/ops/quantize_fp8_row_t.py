"""Quantize x.T to FP8 with a scale per row of it: x[M, C] bf16 -> values[C, Mp] e4m3, scales[C].

What wgrad needs of dY and X, and dgrad of W. Of x[E, M, C], an expert weight, values[E, C, Mp] and
scales[E, C]. The amax of each column comes from ``amax_column``.
Mp is M rounded up to 16, and the padding is zero. Arithmetic: ``lpcompile.ops.fp8``; kernel:
``quantize_fp8_tensor``, on the transposed strides.
"""

from typing import Any

import torch
from torch import Tensor

from lpcompile.ops import amax_column, fp8, quantize_fp8_tensor
from lpcompile.ops.define import ALIGN, define, round_up, same_bits

kernel = quantize_fp8_tensor.kernel
agrees = same_bits


def outputs(x: Tensor, amax: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    rows = round_up(x.shape[-2], ALIGN)
    values = x.new_empty((*x.shape[:-2], x.shape[-1], rows), dtype=element)
    return values, x.new_empty((*x.shape[:-2], x.shape[-1]), dtype=torch.float32)


def reference(x: Tensor, amax: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    scale = fp8.encode_scale(amax, element, pow2)
    values = fp8.cast(x, scale[..., None, :], element).mT
    return fp8.pad_columns(values, round_up(x.shape[-2], ALIGN)), fp8.decode_scale(scale)


def launch(x: Tensor, amax: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, amax, element, pow2)
    made = outputs(x, amax, element, pow2)
    return quantize_fp8_tensor.fill(x.mT, amax, made, element, pow2)


op = define(
    "quantize_fp8_row_t(Tensor x, Tensor amax, ScalarType element, bool pow2) -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)


def samples(device: str) -> list[tuple[Any, ...]]:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    return [
        (x, amax, element, pow2)
        for (x,) in amax_column.samples(device)
        for amax in [amax_column.reference(x)]
        for element, pow2 in ((e4m3, False), (e5m2, False), (e4m3, True))
    ]
