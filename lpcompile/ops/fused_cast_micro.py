"""MXFP8 and NVFP4 copies of a pointwise program's results: inputs [M, C] -> values, scales a form.

    forms: "0 h 1 draw3 swizzled" = of result 0: transposed and Hadamard transformed, 1x16, rounded
    stochastically in draw 3, the scales in the tiles of tensor cores (``micro_source.Form``)
    amaxes: one for each NVFP4 form, in order; seed[1] int64 if one is stochastic

Bits and layouts are those of the chain that it replaces: the producer, ``hadamard``, a quantize op
and ``swizzle``, given the program's. One kernel makes the forms of x and one those of x.T: a tile
of both would have to be transposed in registers. Made by ``passes/fuse_micro.py``.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._inductor.codecache import PyCodeCache

from lpcompile.ops import (
    blocks,
    fp8,
    fused_amax,
    fused_amax_micro,
    hadamard,
    micro_source,
    pointwise,
    quantize_mxfp8,
    quantize_nvfp4,
    swizzle,
)
from lpcompile.ops.define import cdiv, define, round_up, same_bits
from lpcompile.ops.launcher import cached
from lpcompile.ops.micro_source import E4M3, Form, parse_form
from lpcompile.ops.philox import words

# (blocks of x or of x.T, shared by one row) -> rows or runs, and columns, of a tile; 4 warps.
TILES = {(True, True): (16, 256), (True, False): (32, 256), (False, True): (4, 64)}
TILES[False, False] = TILES[False, True]


def outputs(
    inputs: list[Tensor],
    amaxes: list[Tensor],
    seed: Tensor | None,
    program: str,
    forms: list[str],
) -> list[Tensor]:
    full = fused_amax.full_input(inputs, program)
    made: list[Tensor] = []
    for form in map(parse_form, forms):
        x = full if form.way == "n" else full.t()
        if form.size == 32:
            values, scales = quantize_mxfp8.outputs(x, E4M3, form.how == "floor")
        else:
            values, scales = quantize_nvfp4.outputs(x, x, None, 0)
        made += [values, swizzle.outputs(scales) if form.swizzled else scales]
    return made


def reference(
    inputs: list[Tensor],
    amaxes: list[Tensor],
    seed: Tensor | None,
    program: str,
    forms: list[str],
) -> list[Tensor]:
    results = pointwise.run(pointwise.parse(program), inputs)
    given = iter(amaxes)
    made: list[Tensor] = []
    for form in map(parse_form, forms):
        x = results[form.result]
        x = {"n": lambda x: x, "t": Tensor.t, "h": _transformed}[form.way](x)
        if form.size == 32:
            values, scales = quantize_mxfp8.by_blocks(x, form.rows, E4M3, form.how == "floor")
        else:
            word = None if form.draw is None else words(seed, form.draw, x.shape)
            values, scales = quantize_nvfp4.by_blocks(x, next(given), word, form.rows)
        made += [values, swizzle.reference(scales) if form.swizzled else scales]
    return made


def _transformed(x: Tensor) -> Tensor:
    return hadamard.reference(x, hadamard.SIGNS)


@cache
def kernel(program: str, forms: tuple[str, ...], even: bool, index: str = "tl.uint32") -> Any:
    """The generated kernel."""
    return cached(PyCodeCache.load(micro_source.cast_source(program, forms, even, index)).kernel)


def launch(
    inputs: list[Tensor],
    amaxes: list[Tensor],
    seed: Tensor | None,
    program: str,
    forms: list[str],
) -> list[Tensor]:
    full = fused_amax.full_input(inputs, program)
    if not fp8.runs_triton(full) or not full.numel():
        return reference(inputs, amaxes, seed, program, forms)
    (M, C), made = full.shape, outputs(inputs, amaxes, seed, program, forms)
    parsed, given = [parse_form(f) for f in forms], iter(amaxes)
    amax_of = [next(given).contiguous() if form.amax else None for form in parsed]
    for i, form in enumerate(parsed):
        if form.swizzled and _is_padded(form, M, C):
            made[2 * i + 1].zero_()
    native, whole = blocks.runs_native(full), pointwise.arguments(pointwise.parse(program), inputs)
    for key in dict.fromkeys(map(_kernel_of, parsed)):
        mine = [i for i, form in enumerate(parsed) if _kernel_of(form) == key]
        (BM, BC), form = tile(parsed[mine[0]]), parsed[mine[0]]
        run = 1 if form.way == "n" else form.size
        # In even sizes the operand has no padding either: it is of 32 elements.
        even = M % max(BM * run, 32) == 0 and C % max(BC, 32) == 0
        tensors = [t for i in mine for t in (*made[2 * i : 2 * i + 2], amax_of[i]) if t is not None]
        if any(parsed[i].draw is not None for i in mine):
            tensors.append(seed)  # type: ignore[arg-type]
        grid = (cdiv(C, BC), cdiv(M, BM * run))
        index = "tl.uint32" if full.numel() <= 2**32 else "tl.int64"
        kernel(program, tuple(forms[i] for i in mine), even, index)[grid](
            *whole, *tensors, M, C, BM, BC, native, even, num_warps=4, enable_fp_fusion=False
        )
    return made


def tile(form: Form) -> tuple[int, int]:
    """Rows (of x.T: runs) and columns of a form's tile."""
    return TILES[form.way == "n", form.rows == 1]


def _kernel_of(form: Form) -> tuple[int, ...]:
    """What forms made by one kernel share; that of x.T holds the runs of one result."""
    if form.way == "n":
        return -1, form.size, form.rows
    return form.result, form.size, form.rows


def _is_padded(form: Form, M: int, C: int) -> bool:
    """Whether tiles of scales have padding, which kernels leave as it is."""
    rows, columns = (M, C) if form.way == "n" else (C, M)
    return bool(rows % swizzle.ROWS or round_up(columns, 32) // form.size % swizzle.COLUMNS)


op = define(
    "fused_cast_micro(Tensor[] inputs, Tensor[] amaxes, Tensor? seed, str program, str[] forms)"
    " -> Tensor[]",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    every = (
        ["0 n 1 rceil swizzled", "0 t 1 rceil swizzled", "1 t 1 floor plain", "1 n 32 floor plain"],
        ["0 n 1 nearest plain", "0 h 1 nearest swizzled", "1 t 1 nearest swizzled"],
        ["0 n 1 draw2 swizzled", "0 h 1 draw3 plain", "1 t 1 draw5 plain"],
        ["0 n 16 nearest swizzled", "0 t 16 nearest plain", "0 t 32 rceil swizzled"],
    )
    made = []
    for inputs, program in fused_amax.programs(device):
        seed = torch.tensor([0x0123456789ABCDEF], device=device)
        results = len(pointwise.parse(program).results)
        for wanted in every:
            forms = [f for f in wanted if parse_form(f).result < results]
            names = [name for f in forms if (name := parse_form(f).amax)]
            amaxes = fused_amax_micro.reference(inputs, program, names)
            made.append((inputs, amaxes, seed, program, forms))
    return made
