"""What MXFP8 and NVFP4 copies of a pointwise program's results stand for, in bf16.

    inputs [M, C] or stacks [E, M, C] -> of every form the operand [R, K] bf16, without a tensor's
    scale; with offs[E], after them where padded groups end

    forms: as ``fused_cast_micro`` has them, plain; also "g", of x.T with each group's columns
    padded, and "gh", after the Hadamard transform of each group
    amaxes: one for each NVFP4 form, in order; seed[1] int64 if one is stochastic

What ``dequantize`` makes of what a quantize op makes, where nobody needs it narrow: a GPU without
block-scaled tensor cores multiplies that. MXFP8's copies are made from one read of x, NVFP4's each
from its own. Copies of x.T lie in memory as x does, for a GEMM takes either. Made by
``passes/fuse_micro.py``.
"""

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor.codecache import PyCodeCache

from lpcompile.ops import (
    amax_group,
    amax_tensor,
    blocks,
    dequantize,
    fp8,
    fused_amax,
    fused_amax_micro,
    group_tile,
    groups,
    hadamard,
    pointwise,
    quantize_mxfp8,
    quantize_mxfp8_grouped_t,
    quantize_nvfp4,
    quantize_nvfp4_grouped_t,
    wide_source,
)
from lpcompile.ops.define import cdiv, define, round_up, same_bits
from lpcompile.ops.launcher import cached
from lpcompile.ops.micro_source import E4M3, Form, parse_form
from lpcompile.ops.philox import words

COLUMNS = 32  # what an operand's contraction is padded to


class Tile(NamedTuple):
    """What a program makes at a time, by how many warps, going ``columns`` to the right.

    stages: tiles that it reads ahead. registers: of a thread, at most.
    """

    BM: int  # a multiple of 32 that divides groups.ALIGN
    BC: int
    warps: int
    columns: int
    stages: int = 1
    registers: int | None = None


# MXFP8: along rows; along columns too, of a tensor in memory, of a producer, of either in groups.
ROWS, STORED = Tile(32, 128, 4, 128), Tile(32, 64, 2, 64)
MADE, MADE_IN_GROUPS = Tile(32, 64, 2, 256, 2), Tile(32, 64, 2, 256, 3)
# NVFP4: random words take so much code that few elements to a thread, again and again, are fastest.
NEAREST, DRAWN = Tile(32, 128, 4, 128), Tile(32, 64, 8, 512)
SQUARES = Tile(32, 128, 4, 128, 1, 64)  # else 95, and 134 us of 8 x 2048 x 7168 where 117 will do
# After the transform a thread holds whole runs.
RUNS = Tile(32, 64, 2, 64)
STORED_IN_GROUPS, NEAREST_IN_GROUPS = Tile(32, 64, 1, 64), Tile(32, 64, 1, 256, 2)
DRAWN_IN_GROUPS = Tile(32, 64, 2, 256)


def outputs(
    inputs: list[Tensor],
    amaxes: list[Tensor],
    seed: Tensor | None,
    program: str,
    forms: list[str],
    offs: Tensor | None = None,
) -> list[Tensor]:
    x = fused_amax.full_input(inputs, program)
    parsed = [parse_form(f) for f in forms]
    made = [_empty(x, form, offs) for form in parsed]
    return [*made, torch.empty_like(offs)] if offs is not None else made


def _empty(x: Tensor, form: Form, offs: Tensor | None) -> Tensor:
    *stack, M, C = x.shape
    if form.way == "n":
        return x.new_empty((*stack, M, round_up(C, COLUMNS)))
    rows = round_up(M, COLUMNS)
    if form.way in wide_source.GROUPED and offs is not None:
        rows = groups.padded_length(M, offs.shape[0], groups.ALIGN)
    return x.new_empty((*stack, rows, C)).mT


def reference(
    inputs: list[Tensor],
    amaxes: list[Tensor],
    seed: Tensor | None,
    program: str,
    forms: list[str],
    offs: Tensor | None = None,
) -> list[Tensor]:
    results = pointwise.run(pointwise.parse(program), inputs)
    given = iter(amaxes)
    made: list[Tensor] = []
    for form in map(parse_form, forms):
        x, amax = results[form.result], next(given) if form.amax else None
        if offs is not None and form.way in wide_source.GROUPED:
            values, scales = _of_groups(form, x, amax, seed, offs)
        else:
            values, scales = _of_whole(form, x, amax, seed)
        flat = dequantize.reference(values.flatten(0, -2), scales.flatten(0, -2))
        made.append(_empty(x, form, offs).copy_(flat.unflatten(0, values.shape[:-1])))
    return [*made, groups.padded_ends(offs, groups.ALIGN)] if offs is not None else made


def _of_whole(form: Form, x: Tensor, amax: Any, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    if form.way != "n":
        x = hadamard.reference(x, hadamard.SIGNS) if form.way == "h" else x.mT
    if form.size == 32:
        return quantize_mxfp8.by_blocks(x, form.rows, E4M3, form.how == "floor")
    word = None if form.draw is None else words(seed, form.draw, x.shape)
    return quantize_nvfp4.by_blocks(x, amax, word, form.rows)


def _of_groups(
    form: Form, x: Tensor, amax: Any, seed: Tensor | None, offs: Tensor
) -> tuple[Tensor, Tensor]:
    if form.size == 32:
        return quantize_mxfp8_grouped_t.reference(x, offs, E4M3, form.how == "floor")[:2]
    signs = hadamard.SIGNS if form.way == "gh" else None
    drawn = (None, 0) if form.draw is None else (seed, form.draw)
    return quantize_nvfp4_grouped_t.reference(x, amax, offs, signs, *drawn)[:2]


@cache
def kernel(program: str, forms: tuple[str, ...], even: bool, index: str = "tl.uint32") -> Any:
    """The generated kernel."""
    return cached(PyCodeCache.load(wide_source.source(program, forms, even, index)).kernel)


def _kernels(forms: list[Form]) -> list[list[int]]:
    """The forms that one kernel makes: MXFP8's all, NVFP4's each, which computing bounds."""
    mx = [i for i, form in enumerate(forms) if form.size == 32]
    return [mx] * bool(mx) + [[i] for i, form in enumerate(forms) if form.size == 16]


def _any_draw(form: Form) -> str:
    return form.how if form.draw is None else "draw0"


def _tile(forms: list[Form], program: str) -> Tile:
    """The measured tile of what one kernel makes."""
    way, drawn = forms[0].way, forms[0].draw is not None
    if forms[0].size == 16:
        # All of 32 rows, that a tile in groups be padding throughout or nowhere.
        if way == "gh":
            nearest = STORED_IN_GROUPS if program == pointwise.IDENTITY else NEAREST_IN_GROUPS
            return DRAWN_IN_GROUPS if drawn else nearest
        return RUNS if way == "h" else DRAWN if drawn else SQUARES if forms[0].rows > 1 else NEAREST
    if all(form.way == "n" for form in forms):
        return ROWS
    if wide_source.is_grouped(forms):
        return MADE_IN_GROUPS
    return STORED if program == pointwise.IDENTITY else MADE


def launch(
    inputs: list[Tensor],
    amaxes: list[Tensor],
    seed: Tensor | None,
    program: str,
    forms: list[str],
    offs: Tensor | None = None,
) -> list[Tensor]:
    full = fused_amax.full_input(inputs, program)
    if not fp8.runs_triton(full) or not full.numel():
        return reference(inputs, amaxes, seed, program, forms, offs)
    made, parsed = outputs(inputs, amaxes, seed, program, forms, offs), list(map(parse_form, forms))
    E, M, C = fp8.stack(full).shape
    TP, num_tiles, of_groups = 0, 0, list[Any]()
    if offs is not None:
        num_groups, TP = offs.shape[0], groups.padded_length(M, offs.shape[0], groups.ALIGN)
        # As many tiles as cut any groups, and the rest (see ``groups.locate``).
        num_tiles = TP // groups.ALIGN + num_groups + 1
        of_groups = [group_tile.located(offs, M, num_tiles, made[-1]), num_groups, TP]
    given = iter(amaxes)
    amax_of = [next(given).contiguous() if form.amax else None for form in parsed]
    index = "tl.uint32" if max(t.numel() for t in made) <= 2**32 else "tl.int64"
    for mine in _kernels(parsed):
        tensors: list[Any] = []
        for i in mine:
            wide = made[i] if parsed[i].way == "n" else made[i].mT
            tensors += [wide.view(torch.int16)] + [amax_of[i]] * bool(parsed[i].amax)
            tensors += [parsed[i].draw] * (parsed[i].draw is not None)
        if any(parsed[i].draw is not None for i in mine):
            tensors.append(seed)
        BM, BC, warps, columns, stages, registers = _tile([parsed[i] for i in mine], program)
        # In groups the last columns alone need a mask, and rows that are read.
        whole = C % BC == 0
        even, rows, sizes = whole and M % BM == 0, round_up(M, COLUMNS), list[Any]()
        if wide_source.is_grouped([parsed[i] for i in mine]):
            even, rows, sizes = False, num_tiles * groups.ALIGN, of_groups
        text = tuple(replace(parsed[i], how=_any_draw(parsed[i])).text for i in mine)
        run = kernel(program, text, even, index)
        # No multiply-add fusion: x * enc is rounded before anything is added to it.
        run[(cdiv(C, columns), cdiv(rows, BM), E)](
            *pointwise.arguments(pointwise.parse(program), inputs), *tensors, *sizes,
            M, C, columns, stages, BM, BC, blocks.compares_pairs(full), whole if sizes else even,
            num_warps=warps, maxnreg=registers, enable_fp_fusion=False,
        )  # fmt: skip
    return made


op = define(
    "fused_wide_micro(Tensor[] inputs, Tensor[] amaxes, Tensor? seed, str program, str[] forms,"
    " Tensor? offs=None) -> Tensor[]",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    seed = torch.tensor([0x0123456789ABCDEF], device=device)
    whole = (
        ["0 n 1 rceil plain", "0 t 1 rceil plain", "1 t 1 floor plain", "1 n 32 floor plain"],
        ["0 n 1 nearest plain", "0 h 1 nearest plain", "1 t 1 nearest plain"],
        ["0 n 1 draw2 plain", "0 h 1 draw3 plain", "1 t 1 draw5 plain"],
        ["0 n 16 nearest plain", "0 t 16 nearest plain", "0 t 32 rceil plain"],
    )
    in_groups = (
        ["0 n 1 rceil plain", "0 g 1 rceil plain", "1 g 1 floor plain"],
        ["0 n 1 draw2 plain", "0 gh 1 draw3 plain", "0 g 1 nearest plain", "1 gh 1 nearest plain"],
    )
    made: list[tuple[Any, ...]] = []
    for inputs, program in (*fused_amax.programs(device), *biased(device)):
        results = pointwise.run(pointwise.parse(program), inputs)
        M = len(results[0])
        offs = torch.tensor([0, M // 3, M // 3, M - M // 5], device=device, dtype=torch.int32)
        for wanted in (*whole, *in_groups):
            forms = [f for f in wanted if parse_form(f).result < len(results)]
            ends = offs if wanted in in_groups else None
            amaxes = [
                _amax(results[form.result], form, ends)
                for form in map(parse_form, forms)
                if form.amax
            ]
            made.append((inputs, amaxes, seed, program, forms, ends))
    experts = torch.randn(3, 41, 83, device=device, dtype=torch.bfloat16)
    amax = amax_tensor.reference(experts)
    every = torch.arange(2**16, device=device).to(torch.int16).view(torch.bfloat16).view(-1, 64)
    forms = [f"0 {way} 1 {how} plain" for way in "nt" for how in ("rceil", "floor")]
    made.append(([every], [], None, pointwise.IDENTITY, forms, None))
    forms = [f"0 {way} 1 {how} plain" for way in "nt" for how in ("nearest", "draw1")]
    known = [torch.tensor([2688.0], device=device)] * 4  # under which block scales are amax / 6
    made.append(([every], known, seed, pointwise.IDENTITY, forms, None))
    for form in ("0 n 1 rceil plain", "0 t 32 floor plain", "0 t 16 nearest plain"):
        given = [amax] if parse_form(form).amax else []
        made.append(([experts], given, None, pointwise.IDENTITY, [form], None))
    return made


def biased(device: str) -> list[tuple[list[Tensor], str]]:
    """Inputs and programs whose results past the last row, or column, are not zero."""
    x, row, column = (
        torch.randn(*shape, device=device, dtype=torch.bfloat16)
        for shape in ((41, 70), (41, 1), (70,))
    )
    return [
        ([x, column], "full column; bf16 v0 = add(i0, i1); v0"),
        ([x, row], "full row; bf16 v0 = sub(i0, i1); v0"),
    ]


def _amax(x: Tensor, form: Form, offs: Tensor | None) -> Tensor:
    if offs is not None and form.way in wide_source.GROUPED:
        return amax_group.reference(x, offs, hadamard.SIGNS if form.way == "gh" else None)
    return fused_amax_micro.reference([x], pointwise.IDENTITY, [form.amax[:-1] + "0"])[0]
