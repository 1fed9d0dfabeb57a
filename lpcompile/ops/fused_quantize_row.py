"""A pointwise program and the row-wise quantize of its result: inputs [M, C] -> values, scales[M].

One read of the inputs, with whole rows in registers, where Inductor's fused loop reads them twice:
0.73 ms for SiLU*mul of 16384 x 14336 on an H200 (torch 2.11). Made by ``passes/fuse.py``. The bits
are those of ``quantize_fp8_row``, given the program's.
"""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch._inductor.codecache import PyCodeCache

from lpcompile.ops import fp8, fused_amax, fused_source, pointwise, quantize_fp8_row
from lpcompile.ops.define import define, same_bits

WIDEST = 32768  # elements of the inputs' rows that the registers of one program hold
_NAMES = {element: name for name, element in fused_source.ELEMENTS.items()}


def outputs(
    inputs: list[Tensor], program: str, element: torch.dtype, pow2: bool
) -> tuple[Tensor, Tensor]:
    return quantize_fp8_row.outputs(fused_amax.full_input(inputs, program), element, pow2)


def reference(
    inputs: list[Tensor], program: str, element: torch.dtype, pow2: bool
) -> tuple[Tensor, Tensor]:
    (x,) = pointwise.run(pointwise.parse(program), inputs)
    return quantize_fp8_row.reference(x, element, pow2)


@cache
def kernel(program: str, element: str, pow2: bool, even: bool) -> Any:
    """The generated kernel."""
    return PyCodeCache.load(fused_source.row_source(program, element, pow2, even)).kernel


def launch(
    inputs: list[Tensor], program: str, element: torch.dtype, pow2: bool
) -> tuple[Tensor, Tensor]:
    full = fused_amax.full_input(inputs, program)
    if not fp8.runs_triton(full) or not full.numel():
        return reference(inputs, program, element, pow2)
    (M, C), made = full.shape, outputs(inputs, program, element, pow2)
    BC = triton.next_power_of_2(made[0].shape[1])
    BM = max(1, 1024 // BC)
    even = C == BC and M % BM == 0
    kernel(program, _NAMES[element], pow2, even)[(triton.cdiv(M, BM),)](
        *pointwise.arguments(pointwise.parse(program), inputs), *made, M, C, BM, BC,
        num_warps=min(16, max(4, BC // 1024)), enable_fp_fusion=False,
    )  # fmt: skip
    return made


op = define(
    "fused_quantize_row(Tensor[] inputs, str program, ScalarType element, bool pow2)"
    " -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    return [
        (inputs, program.replace("; v3 v5", "; v3"), element, pow2)
        for inputs, program in fused_amax.programs(device)
        for element, pow2 in ((e4m3, False), (e5m2, False), (e4m3, True))
    ]
