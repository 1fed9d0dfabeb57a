"""The Triton source of ``fused_quantize``: an amax kernel and a cast kernel for one program.

The tile's producer is ``pointwise.to_triton``; the rest is what ``lpcompile.ops.fp8`` does, written
out for the forms that are wanted. Readable on purpose: it is what a dump of a graph shows.
"""

from dataclasses import dataclass
from functools import cache
from string import ascii_lowercase

import torch

from lpcompile.ops import fp8, pointwise

ELEMENTS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
BLOCKS = ("block", "square")
_TRITON = {"e4m3": "tl.float8e4nv", "e5m2": "tl.float8e5"}


@dataclass(frozen=True)
class Form:
    """One quantized copy of one result."""

    result: int
    kind: str  # "row", "tensor", "block" or "square"
    element: str
    pow2: bool
    transposed: bool

    @property
    def text(self) -> str:
        """The form as the schema carries it."""
        scale = "pow2" if self.pow2 else "fp32"
        return f"{self.result} {self.kind} {self.element} {scale} {'t' if self.transposed else 'n'}"

    @property
    def amax(self) -> str:
        """The name of the amax it reads; empty for blocks, which have theirs in the tile."""
        along = {"row": "column" if self.transposed else "row", "tensor": "tensor"}
        return f"{along[self.kind]}{self.result}" if self.kind in along else ""


@cache
def parse_form(text: str) -> Form:
    """A Form from its text."""
    result, kind, element, scale, way = text.split(" ")
    return Form(int(result), kind, element, scale == "pow2", way == "t")


_LOADS = {
    "full": "tl.load(i{0}_ptr + at, mask=live, other=0.0)",
    "row": "tl.load(i{0}_ptr + m, mask=m < M, other=0.0)[:, None]",
    "column": "tl.load(i{0}_ptr + c, mask=c < C, other=0.0)[None, :]",
    "scalar": "tl.load(i{0}_ptr)",
}


def source(program: str, forms: tuple[str, ...]) -> str:
    """A module with ``amax_kernel`` (where a form needs one) and ``cast_kernel``."""
    parsed = [parse_form(f) for f in forms]
    named = pointwise.parse(program)
    parts = [
        '"""' + f"{program}\n\n" + "\n".join(forms) + '\n"""',
        "import triton\nimport triton.language as tl\n\nfrom lpcompile.ops import fp8",
    ]
    amaxes = list(dict.fromkeys(f.amax for f in parsed if f.amax))
    if amaxes:
        parts.append(_amax_kernel(named, amaxes))
    parts.append(_cast_kernel(named, parsed, amaxes))
    return "\n\n".join(parts) + "\n"


def _tile(program: pointwise.Program) -> list[str]:
    """Lines that load a tile's inputs and compute its results."""
    return [
        "at = m[:, None].to(tl.int64) * C + c[None, :]",
        "live = (m < M)[:, None] & (c < C)[None, :]",
        *(f"i{i} = {_LOADS[kind].format(i)}" for i, kind in enumerate(program.kinds)),
        *pointwise.to_triton(program),
    ]


def _amax_kernel(program: pointwise.Program, amaxes: list[str]) -> str:
    """Every amax by atomic integer maxima, of tiles [BM, BC] down ROWS rows."""
    before, inside, after = [], [], []
    for r in sorted({int(a.strip(ascii_lowercase)) for a in amaxes}):
        inside.append(f"b{r} = tl.where(live, fp8.abs_bits({program.results[r]}), 0)")
        if f"row{r}" in amaxes:
            inside += _atomic(f"row{r}", f"tl.max(b{r}, axis=1)", " + m, ", ", mask=m < M")
        if f"column{r}" in amaxes or f"tensor{r}" in amaxes:
            before.append(f"best{r} = tl.zeros([BM, BC], tl.int32)")
            inside.append(f"best{r} = tl.maximum(best{r}, b{r})")
            after.append(f"c{r} = tl.max(best{r}, axis=0)")
        if f"column{r}" in amaxes:
            after += _atomic(f"column{r}", f"c{r}", " + c, ", ", mask=c < C")
        if f"tensor{r}" in amaxes:
            after += _atomic(f"tensor{r}", f"tl.max(c{r}, axis=0)", ", ", "")
    loop = [
        "m = tl.program_id(1) * ROWS + i + tl.arange(0, BM)",
        *_tile(program),
        *inside,
    ]
    body = [
        "c = tl.program_id(0) * BC + tl.arange(0, BC)",
        *before,
        "for i in range(0, ROWS, BM):",
        *(f"    {line}" for line in loop),
        *after,
    ]
    sizes = ["M", "C", "ROWS", "BM: tl.constexpr", "BC: tl.constexpr"]
    return _function("amax_kernel", [*_pointers(program, amaxes), *sizes], body)


def _pointers(program: pointwise.Program, amaxes: list[str]) -> list[str]:
    return [*(f"i{i}_ptr" for i in range(len(program.kinds))), *(f"{a}_ptr" for a in amaxes)]


def _atomic(name: str, bits: str, at: str, mask: str) -> list[str]:
    return [
        f"{name} = fp8.amax_of_bits({bits}).to(tl.int32, bitcast=True)",
        f'tl.atomic_max({name}_ptr{at}{name}{mask}, sem="relaxed")',
    ]


def _cast_kernel(program: pointwise.Program, forms: list[Form], amaxes: list[str]) -> str:
    """Every quantized copy of a tile [BM, BC], and its scales."""
    pointers = _pointers(program, amaxes)
    pointers += [f"{letter}{i}_ptr" for i in range(len(forms)) for letter in "qs"]
    body = [
        "c = tl.program_id(0) * BC + tl.arange(0, BC)",
        "m = tl.program_id(1) * BM + tl.arange(0, BM)",
        "CP = (C + 15) // 16 * 16",
        "MP = (M + 15) // 16 * 16",
        *_tile(program),
    ]
    for r in sorted({f.result for f in forms}):
        body.append(f"x{r} = {program.results[r]}.to(tl.float32)")
        if any(f.result == r and f.kind in BLOCKS for f in forms):
            body.append(f"b{r} = tl.where(live, fp8.abs_bits({program.results[r]}), 0)")
    for i, form in enumerate(forms):
        body += _cast(i, form)
    sizes = ["M", "C", "BM: tl.constexpr", "BC: tl.constexpr"]
    return _function("cast_kernel", [*pointers, *sizes], body)


def _cast(i: int, form: Form) -> list[str]:
    """Lines that quantize a tile to form ``i``: values q and decode scales s."""
    limit, element = fp8.MAX[ELEMENTS[form.element]], _TRITON[form.element]
    amax, store = _scale(i, form)
    spread = ""
    if form.kind in ("row", "block"):
        spread = "[None, :]" if form.transposed else "[:, None]"
    if form.transposed:
        values, at = f"tl.trans(n{i})", "c[:, None].to(tl.int64) * MP + m[None, :]"
        mask = "(c < C)[:, None] & (m < MP)[None, :]"
    else:
        values, at = f"n{i}", "m[:, None].to(tl.int64) * CP + c[None, :]"
        mask = "(m < M)[:, None] & (c < CP)[None, :]"
    return [
        f"e{i} = fp8.encode({amax}, {limit}, {form.pow2})",
        f"y{i} = tl.where(live, x{form.result} * e{i}{spread}, 0.0)",
        f"n{i} = fp8.narrow(y{i}, {limit}, {element})",
        f"tl.store(q{i}_ptr + {at}, {values}, mask={mask})",
        *store,
    ]


def _scale(i: int, form: Form) -> tuple[str, list[str]]:
    """The amax of a form's tile, and lines that store its decode scales."""
    r, decode = form.result, f"fp8.decode(e{i})"
    # The index and size along which scales lie, and the program ids across and along it.
    axis, size, across, along = ("c", "C", 1, 0) if form.transposed else ("m", "M", 0, 1)
    if form.kind == "tensor":
        first = "if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):"
        return f"tl.load({form.amax}_ptr)", [first, f"    tl.store(s{i}_ptr, {decode})"]
    if form.kind == "row":
        return f"tl.load({form.amax}_ptr + {axis}, mask={axis} < {size}, other=0.0)", [
            f"if tl.program_id({across}) == 0:",
            f"    tl.store(s{i}_ptr + {axis}, {decode}, mask={axis} < {size})",
        ]
    if form.kind == "block":
        return f"fp8.amax_of_bits(tl.max(b{r}, axis={0 if form.transposed else 1}))", [
            f"t{i} = tl.program_id({across}).to(tl.int64) * {size} + {axis}",
            f"tl.store(s{i}_ptr + t{i}, {decode}, mask={axis} < {size})",
        ]
    other = "M" if form.transposed else "C"
    return f"fp8.amax_of_bits(tl.max(tl.max(b{r}, axis=1), axis=0))", [
        f"w{i} = (({other} + 127) // 128 + 3) // 4 * 4",
        f"tl.store(s{i}_ptr + tl.program_id({along}) * w{i} + tl.program_id({across}), {decode})",
    ]


def _function(name: str, parameters: list[str], body: list[str]) -> str:
    head = ["@triton.jit", f"def {name}(", *(f"    {p}," for p in parameters), "):"]
    return "\n".join([*head, *(f"    {line}" for line in body)])
