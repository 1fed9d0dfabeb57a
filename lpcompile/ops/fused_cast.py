"""Every quantized copy of a pointwise program's results: inputs [M, C] -> values, scales a form.

    forms: "0 row e4m3 pow2 t" = of result 0: row-wise, transposed, e4m3, power-of-two scales
    amaxes: one for each form that is not of blocks, in order; blocks have theirs in the tile

What min-cut leaves in one graph, one read can serve: dY row-wise and column-wise; both gradients of
SwiGLU, both ways, and its output for wgrad, from (gate, up, dh). Made by ``passes/fuse.py`` after
partitioning. The bits are those of the chain that it replaces, given the program's.
"""

from functools import cache
from typing import Any, NamedTuple

import triton
from torch import Tensor
from torch._inductor.codecache import PyCodeCache

from lpcompile.ops import (
    fp8,
    fused_amax,
    fused_source,
    pointwise,
    quantize_fp8_block,
    quantize_fp8_block_t,
    quantize_fp8_row_t,
    quantize_fp8_square,
    quantize_fp8_square_t,
    quantize_fp8_tensor,
    quantize_fp8_tensor_t,
)
from lpcompile.ops.define import define, same_bits
from lpcompile.ops.fused_source import BLOCKS, ELEMENTS, Form, parse_form


class Tile(NamedTuple):
    """What one program casts, and by how many warps."""

    BM: int
    BC: int
    warps: int


SCALED, SQUARE = Tile(64, 32, 4), Tile(128, 128, 8)
ROWS, COLUMNS = Tile(32, 128, 4), Tile(128, 32, 4)

_BLOCK_OPS: dict[tuple[str, bool], Any] = {
    ("block", False): quantize_fp8_block,
    ("block", True): quantize_fp8_block_t,
    ("square", False): quantize_fp8_square,
    ("square", True): quantize_fp8_square_t,
}


def outputs(
    inputs: list[Tensor], amaxes: list[Tensor], program: str, forms: list[str]
) -> list[Tensor]:
    full = fused_amax.full_input(inputs, program)
    made: list[Tensor] = []
    for form in map(parse_form, forms):
        how = (ELEMENTS[form.element], form.pow2)
        if form.kind in BLOCKS:
            made += _BLOCK_OPS[form.kind, form.transposed].outputs(full, *how)
        else:
            x = full.t() if form.kind == "row" and not form.transposed else full
            of_rows = quantize_fp8_tensor_t if form.transposed else quantize_fp8_tensor
            op = quantize_fp8_row_t if form.kind == "row" else of_rows
            made += op.outputs(x, x, *how)
    return made


def reference(
    inputs: list[Tensor], amaxes: list[Tensor], program: str, forms: list[str]
) -> list[Tensor]:
    results = pointwise.run(pointwise.parse(program), inputs)
    given = iter(amaxes)
    made: list[Tensor] = []
    for form in map(parse_form, forms):
        x, how = results[form.result], (ELEMENTS[form.element], form.pow2)
        if form.kind in BLOCKS:
            made += _BLOCK_OPS[form.kind, form.transposed].reference(x, *how)
        elif form.kind == "row":
            x = x if form.transposed else x.t()
            made += quantize_fp8_row_t.reference(x, next(given), *how)
        else:
            op = quantize_fp8_tensor_t if form.transposed else quantize_fp8_tensor
            made += op.reference(x, next(given), *how)
    return made


@cache
def kernel(program: str, forms: tuple[str, ...], even: bool) -> Any:
    """The generated kernel."""
    return PyCodeCache.load(fused_source.cast_source(program, forms, even)).kernel


def launch(
    inputs: list[Tensor], amaxes: list[Tensor], program: str, forms: list[str]
) -> list[Tensor]:
    full = fused_amax.full_input(inputs, program)
    if not fp8.runs_triton(full) or not full.numel():
        return reference(inputs, amaxes, program, forms)
    (M, C), made = full.shape, outputs(inputs, amaxes, program, forms)
    given = iter(amaxes)
    parsed = [parse_form(f) for f in forms]
    amax_of = [None if form.kind in BLOCKS else next(given) for form in parsed]
    whole = [x.contiguous() for x in inputs]
    for tile in (SCALED, ROWS, COLUMNS, SQUARE):
        mine = [i for i, form in enumerate(parsed) if _tile(form) is tile]
        if not mine:
            continue
        BM, BC, warps = tile
        text, even = tuple(forms[i] for i in mine), M % BM == 0 and C % BC == 0
        read = [a.contiguous() for i in mine if (a := amax_of[i]) is not None]
        written = [t for i in mine for t in made[2 * i : 2 * i + 2]]
        grid = (triton.cdiv(C, BC), triton.cdiv(M, BM))
        kernel(program, text, even)[grid](
            *whole, *read, *written, M, C, BM, BC, num_warps=warps, enable_fp_fusion=False
        )
    return made


def _tile(form: Form) -> Tile:
    """The tile of a form. Blocks of both ways would share one of 128x128, which spills: 1.9 ms for
    SwiGLU's five copies of 16384 x 14336 on an H200, where two reads take less (triton 3.6)."""
    if form.kind not in BLOCKS:
        return SCALED
    if form.kind == "square":
        return SQUARE
    return COLUMNS if form.transposed else ROWS


op = define(
    "fused_cast(Tensor[] inputs, Tensor[] amaxes, str program, str[] forms) -> Tensor[]",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    every = (
        ["0 row e4m3 pow2 n", "0 row e4m3 pow2 t", "1 row e5m2 fp32 t"],
        ["0 tensor e4m3 fp32 n", "0 tensor e4m3 fp32 t", "1 tensor e5m2 fp32 n"],
        ["0 block e4m3 pow2 n", "0 block e4m3 pow2 t", "1 square e4m3 pow2 t"],
    )
    made = []
    for inputs, program in fused_amax.programs(device):
        results = len(pointwise.parse(program).results)
        for wanted in every:
            forms = [f for f in wanted if parse_form(f).result < results]
            names = [parse_form(f).amax for f in forms]
            amaxes = fused_amax.reference(inputs, program, [n for n in names if n])
            made.append((inputs, amaxes, program, forms))
    return made
