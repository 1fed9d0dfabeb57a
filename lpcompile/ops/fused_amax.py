"""Every amax of a pointwise program's results: inputs [M, C] -> row [M], column [C], tensor [1].

    wants: "row0" "column0" "tensor1" = a maximum a row and a column of result 0, one of result 1
    with offs[E], of ragged groups of rows: "group0" [E, C] = a column of each, "tokens0" [1] = all

The first of two reads of what ``fused_cast`` quantizes in the second. Reading k inputs twice moves
fewer bytes than writing r results in bf16 and reading them twice, 2k against k + 3r, and a graph
that needs an amax elsewhere too has it. NaN counts above Inf and Inf above all numbers; rows past
offs[-1] count in their own row alone.

Kernels are generated (``fused_source``), and compiled without fused multiply-add, so that products
and sums round as torch's do; exp, sigmoid and division may differ in their last place.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._inductor.codecache import PyCodeCache

from lpcompile.ops import (
    amax_column,
    amax_column_grouped,
    amax_tensor,
    amax_tensor_grouped,
    fp8,
    fused_source,
    pointwise,
)
from lpcompile.ops.define import cdiv, define, next_power_of_2, same_bits
from lpcompile.ops.fused_source import along, is_grouped
from lpcompile.ops.launcher import cached

BM, BC, ROWS, WARPS, STAGES = 16, 64, 256, 2, 4  # a tile, rows a program goes down


def outputs(
    inputs: list[Tensor], program: str, wants: list[str], offs: Tensor | None = None
) -> list[Tensor]:
    full, made = full_input(inputs, program), []
    M, C = full.shape
    for want in wants:
        kind, columns = along(want), C * num_parts(program, result_of(want))
        shape: tuple[int, ...] = {"row": (M,), "column": (columns,)}.get(kind, (1,))
        if kind == "group":
            shape = (offs.shape[0], columns)  # type: ignore[union-attr]
        made.append(full.new_empty(shape, dtype=torch.float32))
    return made


def reference(
    inputs: list[Tensor], program: str, wants: list[str], offs: Tensor | None = None
) -> list[Tensor]:
    results = pointwise.run(pointwise.parse(program), inputs)
    makes: dict[str, Callable[[Tensor], Tensor]] = {
        "row": lambda x: amax_column.reference(x.t()),
        "column": amax_column.reference,
        "tensor": amax_tensor.reference,
    }
    if offs is not None:
        makes["group"] = partial(amax_column_grouped.reference, offs=offs)
        makes["tokens"] = partial(amax_tensor_grouped.reference, offs=offs)
    return [makes[along(want)](results[result_of(want)]) for want in wants]


@cache
def kernel(program: str, wants: tuple[str, ...], even: bool) -> Any:
    """The generated kernel."""
    return cached(PyCodeCache.load(fused_source.amax_source(program, wants, even)).kernel)


def launch(
    inputs: list[Tensor], program: str, wants: list[str], offs: Tensor | None = None
) -> list[Tensor]:
    full = full_input(inputs, program)
    if not fp8.runs_triton(full) or not full.numel() or not wants:
        return reference(inputs, program, wants, offs)
    M, C = full.shape
    made = outputs(inputs, program, wants, offs)  # not one buffer: no aliases
    torch._foreach_zero_(made)
    bits = [a.view(torch.int32) for a in made]
    sizes: list[Any] = [M, C]
    tile, tiles = [STAGES, ROWS, BM, BC], cdiv(M, ROWS)
    if offs is not None and is_grouped(wants):
        E = offs.shape[0]
        sizes, tile, tiles = [offs, M, C, E], [*tile, next_power_of_2(E)], tiles + E + 1
    kernel(program, tuple(wants), C % BC == 0)[(cdiv(C, BC), tiles)](
        *pointwise.arguments(pointwise.parse(program), inputs), *bits, *sizes, *tile,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return made


def full_input(inputs: list[Tensor], program: str) -> Tensor:
    """An input of the results' shape [M, C]."""
    return inputs[pointwise.parse(program).large]


@cache
def result_of(want: str) -> int:
    """The index of the result that an amax is of."""
    return int(want.removeprefix(along(want)))


def num_parts(program: str, result: int) -> int:
    """How many lie side by side in a result, each of C columns."""
    return len(pointwise.parse(program).parts[result])


op = define(
    "fused_amax(Tensor[] inputs, str program, str[] wants, Tensor? offs=None) -> Tensor[]",
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
    shapes = (512, 512), (200, 328), (37, 203), (1, 24), (24, 1), (0, 64)
    alone = [([x], pointwise.IDENTITY) for x in (*(randn(*s) for s in shapes), bad, bad * 0)]
    return alone + [
        ([randn(M, C), randn(M, C), randn(M, 1).float().abs(), randn(C)], producer)
        for M, C in ((512, 256), (130, 203), (300, 128))
    ]


def grouped(device: str) -> list[tuple[list[Tensor], str, Tensor]]:
    """Inputs, a program and the ends of ragged groups: also halves of one tensor, side by side."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    made = [
        ([x.contiguous()], pointwise.IDENTITY, offs)
        for x, offs, *rows in amax_column_grouped.samples(device)
        if not rows
    ]
    ends = torch.tensor([0, 70, 70, 210, 230], device=device, dtype=torch.int32)
    for C in (96, 128):
        wide, full, row = randn(250, 2 * C), randn(250, C), randn(250, 1)
        full[230:] = torch.nan
        program = "wide wide full row; bf16 v0 = mul(i0, i3); bf16 v1 = add(v0, i1);"
        program += " bf16 v2 = mul(i1, i2); v1+v2 v0"
        made.append(([*wide.split(C, 1), full, row], program, ends))
    return made


def samples(device: str) -> list[tuple[Any, ...]]:
    wants = ["row0", "column0", "tensor0", "column1", "tensor1"]
    of_groups = ["row0", "group0", "tokens0", "group1", "row1", "column1"]

    def of(program: str, wants: list[str]) -> list[str]:
        results = len(pointwise.parse(program).results)
        return [w for w in wants if result_of(w) < results]

    made: list[tuple[Any, ...]] = [
        (inputs, program, of(program, wants)) for inputs, program in programs(device)
    ]
    for inputs, program, offs in grouped(device):
        made.append((inputs, program, of(program, of_groups), offs))
        made.append((inputs, program, ["group0"], offs))
    return made
