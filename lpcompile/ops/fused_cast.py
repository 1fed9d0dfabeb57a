"""Every quantized copy of a pointwise program's results: inputs [M, C] -> values, scales a form.

    forms: "0 row e4m3 pow2 t" = of result 0: row-wise, transposed, e4m3, power-of-two scales;
        "g" for "t": each of the ragged groups that offs[E] says padded, and offs_padded[E] third
    amaxes: one for each form that is not of blocks, in order; blocks have theirs in the tile

What min-cut leaves in one graph, one read can serve: dY row-wise and column-wise; both gradients of
SwiGLU, both ways, and its output for wgrad, from (gate, up, dh). Made by ``passes/fuse.py`` after
partitioning. The bits are those of the chain that it replaces, given the program's.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor.codecache import PyCodeCache

from lpcompile.ops import (
    device,
    fp8,
    fused_amax,
    fused_cast_source,
    groups,
    pointwise,
    quantize_fp8_block,
    quantize_fp8_block_grouped_t,
    quantize_fp8_block_t,
    quantize_fp8_grouped_t,
    quantize_fp8_row_t,
    quantize_fp8_square,
    quantize_fp8_square_t,
    quantize_fp8_tensor,
    quantize_fp8_tensor_t,
)
from lpcompile.ops.define import ALIGN, cdiv, define, next_power_of_2, same_bits
from lpcompile.ops.fused_source import BLOCKS, ELEMENTS, WHOLE, Form, parse_form
from lpcompile.ops.launcher import cached
from lpcompile.ops.quantize_fp8_block import BLOCK

SCALES = 1024  # that one program makes


class Tile(NamedTuple):
    """What one program casts, and by how many warps, going ``columns`` to the right."""

    BM: int
    BC: int
    warps: int
    columns: int
    stages: int = 1
    align: int = groups.ALIGN  # of groups along x.T
    registers: int | None = None  # of a thread, at most


# Of one tensor; of one under one scale, both ways: 131072 x 2048 in 128 groups in 324 us where
# 64 x 64 takes 339; of a program, whose loads run ahead: both gradients of SwiGLU, 98304 x 1408 in
# 64 groups, in 0.42 ms where 64 x 64 without them takes 0.47 (H200, triton 3.6).
SCALED, ALIKE, COMPUTED = Tile(64, 64, 4, 256), Tile(128, 64, 4, 256), Tile(32, 128, 4, 512, 3)
SQUARE = Tile(128, 128, 8, 128)
ROWS = Tile(32, 128, 4, 128)
# Blocks along x.T: of a tensor, or of several results; of a program of one input of x's shape, of
# more. SwiGLU of 16384 x 14336 in 0.31 ms, in the first in 0.39; RMSNorm of 16384 x 4096 65 us, 76.
COLUMNS = (Tile(128, 32, 4, 128), Tile(128, 64, 4, 128, registers=128), Tile(128, 64, 4, 512, 3))
# Blocks both ways, of one result of several inputs: gradients of SwiGLU's gate and up in 0.56 and
# 0.43 ms, 0.95 and 0.67 in two reads. In groups, 98304 x 1408: 0.42 and 0.36, 0.57 and 0.43.
BOTH = Tile(128, 128, 4, 512, 2)
BOTH_GROUPED = Tile(128, 128, 8, 512, registers=128)

_BLOCK_OPS: dict[tuple[str, str], Any] = {
    ("block", "n"): quantize_fp8_block,
    ("block", "t"): quantize_fp8_block_t,
    ("square", "n"): quantize_fp8_square,
    ("square", "t"): quantize_fp8_square_t,
}


def outputs(
    inputs: list[Tensor],
    amaxes: list[Tensor],
    program: str,
    forms: list[str],
    offs: Tensor | None = None,
) -> list[Tensor]:
    full, given = fused_amax.full_input(inputs, program), iter(amaxes)
    made: list[Tensor] = []
    for form in map(parse_form, forms):
        x, parts = full, fused_amax.num_parts(program, form.result)
        if parts > 1:
            M, C = full.shape
            x = full[:, :1].expand(M, C * parts)  # of the result's shape, and of no memory
        made += _of(form, "outputs", x, None if form.kind in BLOCKS else next(given), offs)
    return made


def reference(
    inputs: list[Tensor],
    amaxes: list[Tensor],
    program: str,
    forms: list[str],
    offs: Tensor | None = None,
) -> list[Tensor]:
    results, given = pointwise.run(pointwise.parse(program), inputs), iter(amaxes)
    made: list[Tensor] = []
    for form in map(parse_form, forms):
        amax = None if form.kind in BLOCKS else next(given)
        made += _of(form, "reference", results[form.result], amax, offs)
    return made


def _of(form: Form, what: str, x: Tensor, amax: Tensor | None, offs: Tensor | None) -> Any:
    """What the op of a form allocates or makes."""
    how = (ELEMENTS[form.element], form.pow2)
    if form.way == "g" and amax is None:
        return getattr(quantize_fp8_block_grouped_t, what)(x, offs, *how)
    if form.way == "g":
        return getattr(quantize_fp8_grouped_t, what)(x, amax, offs, *how)
    if amax is None:
        return getattr(_BLOCK_OPS[form.kind, form.way], what)(x, *how)
    if form.kind == "row":
        return getattr(quantize_fp8_row_t, what)(x.t() if form.way == "n" else x, amax, *how)
    op = quantize_fp8_tensor_t if form.way == "t" else quantize_fp8_tensor
    return getattr(op, what)(x, amax, *how)


@cache
def kernel(program: str, forms: tuple[str, ...], even: bool) -> Any:
    """The generated kernel."""
    return cached(PyCodeCache.load(fused_cast_source.cast_source(program, forms, even)).kernel)


@cache
def scales_kernel(forms: tuple[str, ...]) -> Any:
    """The generated kernel of the scales."""
    return cached(PyCodeCache.load(fused_cast_source.scales_source(forms)).kernel)


def launch(
    inputs: list[Tensor],
    amaxes: list[Tensor],
    program: str,
    forms: list[str],
    offs: Tensor | None = None,
) -> list[Tensor]:
    full = fused_amax.full_input(inputs, program)
    parsed, named = [parse_form(f) for f in forms], pointwise.parse(program)
    if not fp8.runs_triton(full) or not full.numel() or _straddles(parsed, named, full.shape[1]):
        return reference(inputs, amaxes, program, forms, offs)
    made, (M, C) = outputs(inputs, amaxes, program, forms, offs), full.shape
    rest = iter(made)
    made_of = [[next(rest) for _ in range(num_outputs(form))] for form in parsed]
    encode = _scales(forms, amaxes, made_of)
    whole = pointwise.arguments(named, inputs)
    for tile, mine in _kernels(parsed, named):
        BM, BC, warps, columns, _, align, registers = tile
        stages = _stages(tile, named, device.shared_memory(full))
        read = [t for i in mine if (t := encode[i]) is not None]
        written: list[Tensor] = []
        for i in mine:
            values, scales, *padded = made_of[i]
            written += [values, *([scales] if parsed[i].kind != "row" else []), *padded]
        TP = next((made_of[i][0].shape[1] for i in mine if parsed[i].way != "n"), 0)
        sizes: list[Any] = [M, C, TP, align, columns, stages, BM, BC]
        tiles = cdiv(M, BM)
        if offs is not None and any(parsed[i].way == "g" for i in mine):
            E = offs.shape[0]
            sizes = [offs, M, C, E, TP, align, columns, stages, BM, BC, next_power_of_2(E)]
            # As many tiles as cut any groups, and the rest of [C, Tp] (see ``groups.locate``).
            span = max(BM, align)
            tiles = (cdiv(TP, span) + E + 1) * (span // BM)
        text, even = tuple(forms[i] for i in mine), C % BC == 0
        kernel(program, text, even)[(cdiv(C, columns), tiles)](
            *whole,
            *read,
            *written,
            *sizes,
            num_warps=warps,
            enable_fp_fusion=False,
            **({"maxnreg": registers} if registers else {}),
        )
    return made


def _scales(
    forms: list[str], amaxes: list[Tensor], made_of: list[list[Tensor]]
) -> list[Tensor | None]:
    """What a form's kernel reads of its amax: encode scales of rows, whose decode scales are
    written here; of one scale the amax itself; of blocks nothing.
    """
    encode: list[Tensor | None] = [None] * len(forms)
    given, arguments, size, mine = iter(amaxes), [], 0, []
    for i, form in enumerate(map(parse_form, forms)):
        if form.kind in BLOCKS:
            continue
        encode[i] = amax = next(given)
        if form.kind in WHOLE:
            continue
        encode[i] = e = torch.empty_like(made_of[i][1])
        arguments += [amax.contiguous(), e, made_of[i][1], amax.numel()]
        size = max(size, amax.numel())
        mine.append(i)
    if mine:
        grid = (cdiv(size, SCALES), len(mine))
        scales_kernel(tuple(forms[i] for i in mine))[grid](*arguments, SCALES, num_warps=4)
    return encode


def num_outputs(form: Form) -> int:
    """Values, scales, and of padded groups where they end."""
    return 3 if form.way == "g" else 2


def _straddles(forms: list[Form], program: pointwise.Program, columns: int) -> bool:
    """Whether a block, or the padding of a row, lies in two parts of one result."""
    return any(
        len(program.parts[form.result]) > 1
        and columns % (BLOCK if form.kind in BLOCKS else ALIGN) > 0
        for form in forms
    )


def _kernels(forms: list[Form], program: pointwise.Program) -> Iterator[tuple[Tile, list[int]]]:
    """The kernels that make the forms, and which of them each makes; groups in none with x.T whole.

    One read for blocks of both ways holds a tile of 128x128 for each result. That pays for one
    result at a time, of several inputs. One tensor in two reads takes as long, and three results
    of groups less: 0.91 ms of 98304 x 1408 in 64 groups, 1.0 in one kernel a result.
    """
    ragged = any(form.way == "g" for form in forms)
    alike = ALIKE if len(forms) > 1 and all(f.kind in WHOLE for f in forms) else SCALED
    tiles: dict[tuple[Tile, bool, int | None], list[int]] = {}
    for i, form in enumerate(forms):
        tile, result = COMPUTED if program.statements else alike, None
        if form.kind == "square":
            tile = SQUARE
        elif form.kind == "block":
            tile, result = _of_blocks(form, forms, program)
        tiles.setdefault((tile, ragged and form.way == "t", result), []).append(i)
    for (tile, *_), mine in tiles.items():
        yield tile, mine


def _of_blocks(
    form: Form, forms: list[Form], program: pointwise.Program
) -> tuple[Tile, int | None]:
    """The tile of a form of blocks, and the one result that its kernel is for, if it is for one."""
    inputs = min(_num_large(program), 2) if program.statements else 0
    ragged = any(f.way == "g" for f in forms)
    mine = [f for f in forms if f.result == form.result and f.kind == "block"]
    if len(program.parts[form.result]) > 1 or (ragged and len(program.results) > 1):
        inputs = 0
    if inputs == 2 and len({f.way == "n" for f in mine}) == 2:
        return BOTH_GROUPED if ragged else BOTH, form.result
    if form.way == "n":
        return ROWS, None
    return COLUMNS[inputs], form.result if inputs else None


def _num_large(program: pointwise.Program) -> int:
    """How many inputs are of the results' shape."""
    return sum(kind in ("full", "wide") for kind in program.kinds)


def _stages(tile: Tile, program: pointwise.Program, room: int) -> int:
    """How far loads run ahead: ``room`` bytes hold these, beside the copy that is turned."""
    size = tile.BM * tile.BC
    return min(tile.stages, 1 + max(0, room - size) // (2 * size * _num_large(program)))


op = define(
    "fused_cast(Tensor[] inputs, Tensor[] amaxes, str program, str[] forms, Tensor? offs=None)"
    " -> Tensor[]",
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
        ["0 block e4m3 fp32 t", "1 block e5m2 pow2 n", "1 block e5m2 pow2 t"],
    )
    of_groups = (
        ["0 row e4m3 pow2 n", "0 row e4m3 pow2 g", "1 row e5m2 fp32 g", "1 row e4m3 fp32 t"],
        ["0 tokens e4m3 fp32 n", "0 tokens e4m3 fp32 g", "1 tokens e5m2 fp32 g"],
        ["0 block e4m3 pow2 n", "0 block e4m3 pow2 g", "1 block e4m3 fp32 g"],
    )
    cases: list[tuple[Any, ...]] = [
        (every, inputs, program, None) for inputs, program in fused_amax.programs(device)
    ]
    cases += [(of_groups, *case) for case in fused_amax.grouped(device)]
    made = []
    for wanted, inputs, program, offs in cases:
        results = len(pointwise.parse(program).results)
        for forms in ([f for f in some if parse_form(f).result < results] for some in wanted):
            names = [name for f in forms if (name := parse_form(f).amax)]
            amaxes = fused_amax.reference(inputs, program, names, offs)
            made.append((inputs, amaxes, program, forms, offs))
    return made
