"""Every amax of a pointwise program's results: inputs [M, C] -> row [M], column [C], tensor [1].

    wants: "row0" "column0" "tensor1" = a maximum a row and a column of result 0, one of result 1

The first of two reads of what ``fused_cast`` quantizes in the second. Reading k inputs twice moves
fewer bytes than writing r results in bf16 and reading them twice, 2k against k + 3r, and a graph
that needs an amax elsewhere too has it. NaN counts above Inf and Inf above all numbers.

Kernels are generated (``fused_source``), and compiled without fused multiply-add, so that products
and sums round as torch's do; exp, sigmoid and division may differ in their last place.
"""

from functools import cache
from string import ascii_lowercase
from typing import Any

import torch
import triton
from torch import Tensor
from torch._inductor.codecache import PyCodeCache

from lpcompile.ops import amax_column, amax_tensor, fp8, fused_source, pointwise
from lpcompile.ops.define import define, same_bits

BM, BC, ROWS, WARPS = 8, 128, 256, 2  # a tile, rows a program goes down, warps


def outputs(inputs: list[Tensor], program: str, wants: list[str]) -> list[Tensor]:
    full = full_input(inputs, program)
    sizes = {"row": full.shape[0], "column": full.shape[1], "tensor": 1}
    return [full.new_empty((sizes[_along(w)],), dtype=torch.float32) for w in wants]


def reference(inputs: list[Tensor], program: str, wants: list[str]) -> list[Tensor]:
    results = pointwise.run(pointwise.parse(program), inputs)
    along = {
        "row": lambda x: amax_column.reference(x.t()),
        "column": amax_column.reference,
        "tensor": amax_tensor.reference,
    }
    return [along[_along(w)](results[int(w.strip(ascii_lowercase))]) for w in wants]


@cache
def kernel(program: str, wants: tuple[str, ...], even: bool) -> Any:
    """The generated kernel."""
    return PyCodeCache.load(fused_source.amax_source(program, wants, even)).kernel


def launch(inputs: list[Tensor], program: str, wants: list[str]) -> list[Tensor]:
    full = full_input(inputs, program)
    if not fp8.runs_triton(full) or not full.numel():
        return reference(inputs, program, wants)
    M, C = full.shape
    made = [a.zero_() for a in outputs(inputs, program, wants)]  # not one buffer: no aliases
    bits = [a.view(torch.int32) for a in made]
    grid = (triton.cdiv(C, BC), triton.cdiv(M, ROWS))
    kernel(program, tuple(wants), M % ROWS == 0 and C % BC == 0)[grid](
        *(x.contiguous() for x in inputs), *bits, M, C, ROWS, BM, BC,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return made


def full_input(inputs: list[Tensor], program: str) -> Tensor:
    """An input of the results' shape [M, C]."""
    return inputs[pointwise.parse(program).kinds.index("full")]


def _along(want: str) -> str:
    return want.rstrip("0123456789")


op = define(
    "fused_amax(Tensor[] inputs, str program, str[] wants) -> Tensor[]",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def programs(device: str) -> list[tuple[list[Tensor], str]]:
    """Inputs and a program: identities, and a producer that every device rounds alike."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    producer = (
        "full full row column; float v0 = i0; float v1 = mul(v0, i2); bf16 v2 = mul(v1, i3);"
        " bf16 v3 = add(v2, i1); bool v4 = gt(i1, 0.5); bf16 v5 = where(v4, i0, 0.0); v3 v5"
    )
    bad = randn(48, 96)
    bad[3, 5], bad[40, 7] = torch.inf, torch.nan
    shapes = (512, 512), (200, 328), (37, 203), (0, 64)
    alone = [([x], pointwise.IDENTITY) for x in (*(randn(*s) for s in shapes), bad, bad * 0)]
    return alone + [
        ([randn(M, C), randn(M, C), randn(M, 1).float().abs(), randn(C)], producer)
        for M, C in ((512, 256), (130, 203), (300, 128))
    ]


def samples(device: str) -> list[tuple[Any, ...]]:
    wants = ["row0", "column0", "tensor0", "column1", "tensor1"]
    return [
        (inputs, program, [w for w in wants if int(w[-1]) < len(pointwise.parse(program).results)])
        for inputs, program in programs(device)
    ]
