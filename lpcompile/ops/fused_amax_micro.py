"""Tensor amaxes of a pointwise program's results, as NVFP4 reads them: inputs [M, C] -> [1] each.

    wants: "tensor0" "hadamard0" = of result 0, and of its transpose after the Hadamard transform

One read of the inputs instead of a transform that is written and read again. NaN counts above Inf
and Inf above all numbers. Kernels are generated (``micro_source``).
"""

from functools import cache
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor
from torch._inductor.codecache import PyCodeCache

from lpcompile.ops import amax_tensor, fp8, fused_amax, hadamard, micro_source, pointwise
from lpcompile.ops.define import cdiv, define, same_bits
from lpcompile.ops.launcher import cached

BM, BC, ROWS, WARPS = 1, 256, 256, 4  # runs and columns of a tile, rows a program goes down, warps


def outputs(inputs: list[Tensor], program: str, wants: list[str]) -> list[Tensor]:
    return [inputs[0].new_empty((1,), dtype=torch.float32) for _ in wants]


def reference(inputs: list[Tensor], program: str, wants: list[str]) -> list[Tensor]:
    results = pointwise.run(pointwise.parse(program), inputs)
    made = []
    for want in wants:
        x = results[int(want.lstrip(ascii_lowercase))]
        is_plain = want.startswith("tensor")
        made.append(amax_tensor.reference(x if is_plain else hadamard.reference(x, hadamard.SIGNS)))
    return made


@cache
def kernel(program: str, wants: tuple[str, ...], even: bool) -> Any:
    """The generated kernel."""
    return cached(PyCodeCache.load(micro_source.amax_source(program, wants, even)).kernel)


def launch(inputs: list[Tensor], program: str, wants: list[str]) -> list[Tensor]:
    full = fused_amax.full_input(inputs, program)
    if not fp8.runs_triton(full) or not full.numel():
        return reference(inputs, program, wants)
    (M, C), whole = full.shape, pointwise.arguments(pointwise.parse(program), inputs)
    made = [a.zero_() for a in outputs(inputs, program, wants)]
    even = M % ROWS == 0 and C % BC == 0
    kernel(program, tuple(wants), even)[(cdiv(C, BC), cdiv(M, ROWS))](
        *whole, *(a.view(torch.int32) for a in made),
        M, C, ROWS, BM, BC, False, even, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return made


op = define(
    "fused_amax_micro(Tensor[] inputs, str program, str[] wants) -> Tensor[]",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    wants = ["tensor0", "hadamard0", "hadamard1"]
    return [
        (inputs, program, [w for w in wants if int(w[-1]) < len(pointwise.parse(program).results)])
        for inputs, program in fused_amax.programs(device)
    ]
