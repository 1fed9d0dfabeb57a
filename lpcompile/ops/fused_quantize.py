"""A pointwise producer and every quantize of its results: inputs [M, C] -> (values, scales) a form.

    forms: "0 row e4m3 pow2 t" = of result 0: row-wise, transposed, e4m3, power-of-two scales

What min-cut leaves in one graph and one read can serve: row and column copies of dY; the gradients
of SwiGLU, both of them both ways, and h itself for wgrad, from one read of (gate, up, dh). Formats
whose scale needs an amax over more than a tile read the inputs twice: once for every amax, once to
cast. That moves fewer bytes than writing bf16 results would: with k inputs and r results, 2k
against k + r + 2r. Block-wise formats read once.

Made by ``passes/fuse.py`` after partitioning. It gives the bits of the chain that it replaces, the
producer's last place aside (exp and sigmoid differ between libraries). Generated kernels are
compiled without fused multiply-add, so that products and sums round as torch's do.
"""

from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._inductor.codecache import PyCodeCache

from lpcompile.ops import (
    amax_column,
    amax_tensor,
    fp8,
    fused_source,
    pointwise,
    quantize_fp8_block,
    quantize_fp8_block_t,
    quantize_fp8_row,
    quantize_fp8_row_t,
    quantize_fp8_square,
    quantize_fp8_square_t,
    quantize_fp8_tensor,
    quantize_fp8_tensor_t,
)
from lpcompile.ops.define import define, round_up, same_bits
from lpcompile.ops.fused_source import BLOCKS, ELEMENTS, amax_names, parse_form

_MODULES: dict[tuple[str, bool], Any] = {
    ("row", False): quantize_fp8_row,
    ("row", True): quantize_fp8_row_t,
    ("tensor", False): quantize_fp8_tensor,
    ("tensor", True): quantize_fp8_tensor_t,
    ("block", False): quantize_fp8_block,
    ("block", True): quantize_fp8_block_t,
    ("square", False): quantize_fp8_square,
    ("square", True): quantize_fp8_square_t,
}
_AMAX = {("row", True): amax_column, ("tensor", False): amax_tensor, ("tensor", True): amax_tensor}


def outputs(inputs: list[Tensor], program: str, forms: list[str]) -> list[Tensor]:
    full = inputs[pointwise.parse(program).kinds.index("full")]
    made: list[Tensor] = []
    for form in map(parse_form, forms):
        amax = [full] if (form.kind, form.transposed) in _AMAX else []
        how = (ELEMENTS[form.element], form.pow2)
        made += _MODULES[form.kind, form.transposed].outputs(full, *amax, *how)
    return made


def reference(inputs: list[Tensor], program: str, forms: list[str]) -> list[Tensor]:
    results = pointwise.run(pointwise.parse(program), inputs)
    made: list[Tensor] = []
    for form in map(parse_form, forms):
        x = results[form.result]
        source = _AMAX.get((form.kind, form.transposed))
        amax = [source.reference(x)] if source else []
        how = (ELEMENTS[form.element], form.pow2)
        made += _MODULES[form.kind, form.transposed].reference(x, *amax, *how)
    return made


@cache
def kernel(program: str, forms: tuple[str, ...], even: bool) -> Any:
    """The module with the generated ``amax_kernel`` and ``cast_kernel`` of a program."""
    return PyCodeCache.load(fused_source.source(program, forms, even))


class Tiles(NamedTuple):
    """How the kernels cut [M, C]: amax tiles down ``rows`` rows, and cast tiles."""

    amax: tuple[int, int]
    rows: int
    cast: tuple[int, int]
    warps: int


SCALED = Tiles(amax=(16, 256), rows=512, cast=(64, 64), warps=8)
BLOCKED = Tiles(amax=(16, 256), rows=512, cast=(128, 128), warps=16)


def launch(inputs: list[Tensor], program: str, forms: list[str]) -> list[Tensor]:
    kinds = pointwise.parse(program).kinds
    full = inputs[kinds.index("full")]
    if not fp8.runs_triton(full) or not full.numel():
        return reference(inputs, program, forms)
    made = outputs(inputs, program, forms)
    M, C = full.shape
    parsed = [parse_form(f) for f in forms]
    inputs = [x.contiguous() for x in inputs]
    sizes = {name: _amax_size(name, M, C) for name in amax_names(parsed)}
    amaxes = _zeros(sizes, full.device)
    tiles = BLOCKED if any(form.kind in BLOCKS for form in parsed) else SCALED
    (BM, BC), rows = tiles.amax, tiles.rows
    even = not (M % rows or C % BC or M % tiles.cast[0] or C % tiles.cast[1])
    module = kernel(program, tuple(forms), even)
    if amaxes:
        grid = (triton.cdiv(C, BC), triton.cdiv(M, rows))
        bits = [a.view(torch.int32) for a in amaxes.values()]
        module.amax_kernel[grid](
            *inputs, *bits, M, C, rows, BM, BC, num_warps=8, enable_fp_fusion=False
        )
    BM, BC = tiles.cast
    module.cast_kernel[(triton.cdiv(C, BC), triton.cdiv(M, BM))](
        *inputs, *amaxes.values(), *made, M, C, BM, BC,
        num_warps=tiles.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return made


def _amax_size(name: str, M: int, C: int) -> int:
    return {"row": M, "column": C, "tensor": 1}[name.rstrip("0123456789")]


def _zeros(sizes: dict[str, int], device: torch.device) -> dict[str, Tensor]:
    """One zeroed buffer for every amax, cut at multiples of 16 bytes."""
    ends = list(accumulate(round_up(n, 4) for n in sizes.values()))
    buffer = torch.zeros(ends[-1] if ends else 0, dtype=torch.float32, device=device)
    starts = [0, *ends]
    return {name: buffer[at : at + n] for (name, n), at in zip(sizes.items(), starts, strict=False)}


op = define(
    "fused_quantize(Tensor[] inputs, str program, str[] forms) -> Tensor[]",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    square_and_scale = (
        "full full row column; float v0 = i0; float v1 = mul(v0, i2); bf16 v2 = mul(v1, i3);"
        " bf16 v3 = add(v2, i1); bool v4 = gt(i1, 0.5); bf16 v5 = where(v4, i0, 0.0); v3 v5"
    )

    def inputs(M: int, C: int) -> list[Tensor]:
        return [randn(M, C), randn(M, C), randn(M, 1).float().abs(), randn(C)]

    rows = ["0 row e4m3 pow2 n", "0 row e4m3 pow2 t", "1 row e5m2 fp32 t"]
    tensors = ["0 tensor e4m3 fp32 n", "0 tensor e4m3 fp32 t", "1 tensor e5m2 fp32 n"]
    blocks = ["0 block e4m3 pow2 n", "0 block e4m3 pow2 t", "1 square e4m3 pow2 t"]
    bad = randn(48, 96)
    bad[3, 5], bad[40, 7] = torch.inf, torch.nan
    identities = [
        ([x], pointwise.IDENTITY, [f for f in forms if f[0] == "0"])
        for x in (
            randn(512, 512),
            randn(200, 328),
            randn(37, 203),
            bad,
            randn(0, 64),
            randn(64, 96) * 0,
        )
        for forms in (rows, tensors, blocks)
    ]
    return identities + [
        (inputs(M, C), square_and_scale, forms)
        for M, C in ((512, 256), (130, 203), (300, 128))
        for forms in (rows, tensors, blocks)
    ]
