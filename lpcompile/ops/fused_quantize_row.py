"""A pointwise program and the row-wise quantize of its result: inputs [M, C] -> values, scales[M].

One read of the inputs, with whole rows in registers, where Inductor's fused loop reads them twice:
0.73 ms for SiLU*mul of 16384 x 14336 on an H200 (torch 2.11). Made by ``passes/fuse.py``. The bits
are those of ``quantize_fp8_row``, given the program's.

columns: also the largest magnitude of every column, for what the backward narrows across the rows:
amax[C] of ``amax_column``; with offs[E], amax[E, C] of ``amax_column_grouped``; of an input
[E, M, C], the weights of experts, amax[E, C]. A program then walks down some rows, and keeps the
maxima in registers. Beside the quantize alone that takes 14 to 24 us where an amax of its own takes
34 to 103 (64 x 1408 x 2048: 128 us, 146 us with it, 93 us of its own; H200, torch 2.11).
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._inductor.codecache import PyCodeCache

from lpcompile.ops import (
    amax_column,
    amax_column_grouped,
    fp8,
    fused_amax,
    fused_source,
    pointwise,
    quantize_fp8_row,
)
from lpcompile.ops.define import cdiv, define, next_power_of_2, same_bits
from lpcompile.ops.launcher import cached

WIDEST = 32768  # elements of the inputs' rows that the registers of one program hold
WIDEST_WITH_MAXIMA = 16384  # 8192 x 28672: 192 us, 508 us with maxima, 122 us for them alone


def outputs(
    inputs: list[Tensor],
    program: str,
    element: torch.dtype,
    pow2: bool,
    columns: bool = False,
    offs: Tensor | None = None,
) -> list[Tensor]:
    full = fused_amax.full_input(inputs, program)
    made = [*quantize_fp8_row.outputs(full, element, pow2)]
    if columns and offs is None:
        made.append(amax_column.outputs(full))
    elif columns:
        made.append(amax_column_grouped.outputs(full, offs))  # type: ignore[arg-type]
    return made


def reference(
    inputs: list[Tensor],
    program: str,
    element: torch.dtype,
    pow2: bool,
    columns: bool = False,
    offs: Tensor | None = None,
) -> list[Tensor]:
    (x,) = pointwise.run(pointwise.parse(program), inputs)
    made = [*quantize_fp8_row.reference(x, element, pow2)]
    if columns and offs is None:
        made.append(amax_column.reference(x))
    elif columns:
        made.append(amax_column_grouped.reference(x, offs))  # type: ignore[arg-type]
    return made


@cache
def kernel(program: str, element: str, pow2: bool, even: bool) -> Any:
    """The generated kernel."""
    return cached(PyCodeCache.load(fused_source.row_source(program, element, pow2, even)).kernel)


@cache
def walk(program: str, element: str, pow2: bool, grouped: bool, even: bool) -> Any:
    """The generated kernel that takes the maxima of columns too."""
    source = fused_source.walk_source(program, element, pow2, grouped, even)
    return cached(PyCodeCache.load(source).kernel)


def launch(
    inputs: list[Tensor],
    program: str,
    element: torch.dtype,
    pow2: bool,
    columns: bool = False,
    offs: Tensor | None = None,
) -> list[Tensor]:
    full = fused_amax.full_input(inputs, program)
    if not fp8.runs_triton(full) or not full.numel():
        return reference(inputs, program, element, pow2, columns, offs)
    made = outputs(inputs, program, element, pow2, columns, offs)
    if columns:
        return _walk(inputs, program, (fused_source.NAMES[element], pow2), made, offs)
    (M, C), BC = full.shape, next_power_of_2(made[0].shape[1])
    BM = max(1, 1024 // BC)
    even = C == BC and M % BM == 0
    kernel(program, fused_source.NAMES[element], pow2, even)[(cdiv(M, BM),)](
        *pointwise.arguments(pointwise.parse(program), inputs), *made, M, C, BM, BC,
        num_warps=min(16, max(4, BC // 1024)), enable_fp_fusion=False,
    )  # fmt: skip
    return made


def _walk(
    inputs: list[Tensor],
    program: str,
    scaling: tuple[str, bool],
    made: list[Tensor],
    offs: Tensor | None,
) -> list[Tensor]:
    """Fill values, scales and maxima: of one matrix, of each of a stack, or of ragged groups.

    Programs that walk far meet in few atomics, and need enough others beside them: as many rows as
    leave two programs for each of 132 multiprocessors, up to 128. A warp holds a row of 2048: wider
    ones wait for each other at every row, with more of them in flight.
    """
    values, scales, amax = made
    *E, M, C = fused_amax.full_input(inputs, program).shape
    BC = next_power_of_2(values.shape[-1])
    BM, warps, stages = max(1, 1024 // BC), max(1, BC // 2048), 5 if BC == 4096 else 3
    ROWS = min(128, max(32, next_power_of_2(scales.numel() // 256)))
    tile, grid = [stages, ROWS, BM, BC], (cdiv(M, ROWS), *E)
    sizes: list[Any] = [M, C]
    if offs is not None:
        groups = offs.shape[0]
        grid, sizes = (grid[0] + groups + 1,), [offs, M, C, groups]
        tile.append(next_power_of_2(groups))
    walk(program, *scaling, offs is not None, C == BC)[grid](
        *pointwise.arguments(pointwise.parse(program), inputs),
        values, scales, amax.zero_().view(torch.int32), *sizes, *tile,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return made


op = define(
    "fused_quantize_row(Tensor[] inputs, str program, ScalarType element, bool pow2,"
    " bool columns=False, Tensor? offs=None) -> Tensor[]",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    """One of each kind first, since the first few are checked for more."""
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    one = [
        (inputs, program.replace("; v3 v5", "; v3"))
        for inputs, program in fused_amax.programs(device)
    ]
    wide = [torch.randn(70, C, device=device, dtype=torch.bfloat16) for C in (2500, 5008, 20000)]
    kinds: list[list[tuple[Any, ...]]] = [
        [
            (inputs, program, element, pow2)
            for inputs, program in one
            for element, pow2 in ((e4m3, False), (e5m2, False), (e4m3, True))
        ],
        [
            (inputs, program, e4m3, True, True)
            for inputs, program in (*one, *(([x], pointwise.IDENTITY) for x in wide))
        ],
        [
            (inputs, program.replace("; v1+v2 v0", "; v0"), e4m3, False, True, offs)
            for inputs, program, offs in fused_amax.grouped(device)
        ],
        [
            ([x], pointwise.IDENTITY, e5m2, False, True)
            for (x,) in amax_column.samples(device)
            if x.dim() == 3
        ],
    ]
    return [kind.pop(0) for kind in kinds] + [case for kind in kinds for case in kind]
