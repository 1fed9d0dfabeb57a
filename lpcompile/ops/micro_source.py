"""The Triton source of ``fused_amax_micro`` and ``fused_cast_micro``, for one program.

Generated: the producer, and which forms are made of its results. What narrows a tile is
``lpcompile.ops.micro_tile``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from string import ascii_lowercase

import torch

from lpcompile.ops import fp8, hadamard, mx, pointwise, tile_source

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Form:
    """One narrow copy of one result.

    way: "n" of x, "t" of x.T, "h" of x.T after the Hadamard transform; "g" and "gh" are the
        last two group by group, which ``fused_wide_micro`` alone makes.
    rows: that share a scale, with 32 (MXFP8) or 16 (NVFP4) columns.
    how: "rceil" or "floor" (MXFP8), "nearest" or "draw3", the number of its random draw (NVFP4).
    swizzled: scales in the tiles of tensor cores.
    """

    result: int
    way: str
    rows: int
    how: str
    swizzled: bool

    @property
    def text(self) -> str:
        """The form as the schema carries it."""
        layout = "swizzled" if self.swizzled else "plain"
        return f"{self.result} {self.way} {self.rows} {self.how} {layout}"

    @property
    def size(self) -> int:
        """Elements of a block along the contraction."""
        return 32 if self.how in ("rceil", "floor") else 16

    @property
    def amax(self) -> str:
        """The name of the tensor's amax that it reads, or of groups stands for; empty for MXFP8."""
        if self.size == 32:
            return ""
        return f"{'hadamard' if self.way == 'h' else 'tensor'}{self.result}"

    @property
    def draw(self) -> int | None:
        """Of stochastic rounding, None of nearest."""
        return int(self.how.removeprefix("draw")) if self.how.startswith("draw") else None


@cache
def parse_form(text: str) -> Form:
    """A Form from its text."""
    result, way, rows, how, layout = text.split(" ")
    return Form(int(result), way, int(rows), how, layout == "swizzled")


def cast_source(program: str, forms: tuple[str, ...], even: bool, index: str) -> str:
    """A module with a ``kernel`` of forms that are all of x, or all of x.T in blocks of one size.

    even: M and C are multiples of every tile, so that nothing is masked or padded.
    index: the Triton integer that holds the index of every element.
    """
    named, parsed = pointwise.parse(program), [parse_form(f) for f in forms]
    pointers = tile_source.pointers(named)
    for i, form in enumerate(parsed):
        pointers += [f"q{i}_ptr", f"s{i}_ptr"] + [f"a{i}_ptr"] * bool(form.amax)
    if any(form.draw is not None for form in parsed):
        pointers.append("seed_ptr")
    body = ["c = tl.program_id(0) * BC + tl.arange(0, BC)"]
    if parsed[0].way == "n":
        body += [
            "m = tl.program_id(1) * BM + tl.arange(0, BM)",
            "first = tl.program_id(0) * BC",
            f"x = {_produce(named, 'm')}",
        ]
        body += [_store(i, form, f"x[{form.result}]", index) for i, form in enumerate(parsed)]
    else:
        size = parsed[0].size
        body.append(f"first = tl.program_id(1) * (BM * {size})")
        body.append(f"run = first + tl.arange(0, BM) * {size}")
        body += _rows(named, {f.amax or f"tensor{f.result}" for f in parsed}, size)
        for i, form in enumerate(parsed):
            tile = f"turned.turned({form.amax or f'tensor{form.result}'})"
            tile = f"pointwise.rounded({tile})" if form.way == "h" else tile
            body.append(_store(i, form, tile, index))
    return _module(program, forms, named, [*pointers, "M", "C"], body, even)


def amax_source(program: str, wants: tuple[str, ...], even: bool) -> str:
    """A module with the ``kernel`` of ``fused_amax_micro``: tiles of BM runs, ROWS rows down."""
    named = pointwise.parse(program)
    loop = [
        "run = tl.program_id(1) * ROWS + i + tl.arange(0, BM) * 16",
        *_rows(named, set(wants), 16),
        *(f"best_{want} = micro_tile.largest({want}, best_{want})" for want in wants),
    ]
    body = [
        "c = tl.program_id(0) * BC + tl.arange(0, BC)",
        *(f"best_{want} = tl.zeros([BM, BC], tl.float32)" for want in wants),
        "for i in range(0, ROWS, BM * 16):",
        *(f"    {line}" for line in loop),
    ]
    for want in wants:
        body += [
            f"{want} = fp8.bits_of_amax(fp8.amax(fp8.amax(best_{want}, 1), 0))",
            f'tl.atomic_max({want}_ptr, {want}, sem="relaxed")',
        ]
    pointers = [*tile_source.pointers(named), *(f"{want}_ptr" for want in wants)]
    return _module(program, wants, named, [*pointers, "M", "C", "ROWS: tl.constexpr"], body, even)


def _rows(program: pointwise.Program, wants: set[str], size: int) -> list[str]:
    """Lines that make, under the names wanted, runs of x.T: as they are, or transformed."""
    lines = [f"{want} = ()" for want in sorted(wants)]
    lines += [f"for k in tl.static_range({size}):", f"    x = {_produce(program, 'run + k')}"]
    for want in sorted(wants):
        lines.append(f"    {want} = {want} + (x[{want.lstrip(ascii_lowercase)}],)")
    for want in sorted(w for w in wants if w.startswith("hadamard")):
        lines.append(f"{want} = hadamard.transformed({want}, {hadamard.SIGNS})")
    return lines


def _produce(program: pointwise.Program, m: str) -> str:
    return f"produce({', '.join(tile_source.pointers(program))}, {m}, {m} < M, c, C)"


def _store(i: int, form: Form, tile: str, index: str) -> str:
    """A call that narrows a tile, with the size of the operand that it is in."""
    # Runs past the last row are of zeros, but those of the transform are of what it makes of them.
    size = {
        "n": "m, m < M, first, C",
        "t": "c, c < C, first, M",
        "h": "c, c < C, first, (M + 15) // 16 * 16",
    }
    common = f"{tile}, {size[form.way]}, q{i}_ptr, s{i}_ptr"
    last = f"{form.rows}, {form.swizzled}, NATIVE, EVEN"
    if form.size == 32:
        limit, exponent = fp8.MAX[E4M3], mx.EXPONENT[E4M3]
        how = f"{limit}, {exponent}, tl.float8e4nv, {form.how == 'floor'}"
        return f"micro_tile.store_mx({common}, {how}, {last})"
    seed = "None, 0, False" if form.draw is None else f"seed_ptr, {form.draw}, True"
    return f"micro_tile.store_nv({common}, a{i}_ptr, {seed}, {index}, {last})"


def _result(name: str, even: bool) -> str:
    """A result's tile in bf16, with zeros outside [M, C]: an input has them."""
    return name if name[0] == "i" else f"pointwise.narrowed({tile_source.live(f'f_{name}', even)})"


def _module(
    program: str,
    wanted: Sequence[str],
    named: pointwise.Program,
    parameters: Sequence[str],
    body: list[str],
    even: bool,
    masked: bool = True,
) -> str:
    """masked: results are made zero outside [M, C], where inputs are."""
    doc = '"""' + program + "\n\n" + "\n".join(wanted) + '\n"""'
    imports = "import triton\nimport triton.language as tl\n\n"
    imports += "from lpcompile.ops import fp8, groups, hadamard, micro_tile, pointwise"
    imports += ", turned, wide_tile"
    tile = tile_source.tile(named, even, rounded=False, rows="here")
    results = (_result(r, even or not masked) for r in named.results)
    tile.append(f"return ({''.join(f'{r}, ' for r in results)})")
    head = ["@triton.jit", f"def produce({', '.join(tile_source.pointers(named))}, m, here, c, C):"]
    producer = "\n".join([*head, *(f"    {line}" for line in tile)])
    sizes = ["BM: tl.constexpr", "BC: tl.constexpr", "NATIVE: tl.constexpr", "EVEN: tl.constexpr"]
    kernel = tile_source.function([*parameters, *sizes], body)
    return "\n\n\n".join([f"{doc}\n\n{imports}", producer, kernel]) + "\n"
