"""The Triton source of ``fused_amax``, ``fused_cast`` and ``fused_quantize_row``, for one program.

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
        return f"{along[self.kind]}{self.result}" if self.kind not in BLOCKS else ""


@cache
def parse_form(text: str) -> Form:
    """A Form from its text."""
    result, kind, element, scale, way = text.split(" ")
    return Form(int(result), kind, element, scale == "pow2", way == "t")


_LOADS = {
    "full": "tl.load(i{0}_ptr + at{1})",
    "row": "tl.load(i{0}_ptr + m{2})[:, None]",
    "column": "tl.load(i{0}_ptr + c{3})[None, :]",
    "scalar": "tl.load(i{0}_ptr)",
}


def amax_source(program: str, amaxes: tuple[str, ...], even: bool) -> str:
    """A module with the ``kernel`` of ``fused_amax``.

    even: M and C are multiples of every tile, so that nothing is masked.
    """
    return _module(program, amaxes, _amax_kernel(pointwise.parse(program), list(amaxes), even))


def cast_source(program: str, forms: tuple[str, ...], even: bool) -> str:
    """A module with the ``kernel`` of ``fused_cast``."""
    parsed = [parse_form(f) for f in forms]
    return _module(program, forms, _cast_kernel(pointwise.parse(program), parsed, even))


def row_source(program: str, element: str, pow2: bool, even: bool) -> str:
    """A module with the ``kernel`` of ``fused_quantize_row``: whole rows in registers."""
    named, limit = pointwise.parse(program), fp8.MAX[ELEMENTS[element]]
    masked = "" if even else ", mask=(m < M)[:, None] & (c < CP)[None, :]"
    body = [
        "m = tl.program_id(0) * BM + tl.arange(0, BM)",
        "c = tl.arange(0, BC)",
        "CP = (C + 15) // 16 * 16",
        *_tile(named, even, rounded=True),
        f"x = {_live(f'f_{named.results[0]}', even)}",
        f"e = fp8.encode(tl.reduce(tl.abs(x), 1, fp8.larger), {limit}, {pow2})",
        f"n = fp8.narrow({_live('x * e[:, None]', even)}, {_TRITON[element]})",
        f"tl.store(q_ptr + m[:, None].to(tl.int64) * CP + c[None, :], n{masked})",
        f"tl.store(s_ptr + m, fp8.decode(e){'' if even else ', mask=m < M'})",
    ]
    sizes = ["M", "C", "BM: tl.constexpr", "BC: tl.constexpr"]
    kernel = _function([*_pointers(named), "q_ptr", "s_ptr", *sizes], body)
    return _module(program, (f"{element} {'pow2' if pow2 else 'fp32'}",), kernel)


def _module(program: str, wanted: tuple[str, ...], kernel: str) -> str:
    doc = '"""' + program + "\n\n" + "\n".join(wanted) + '\n"""'
    imports = "import triton\nimport triton.language as tl\n\nfrom lpcompile.ops import fp8"
    return "\n\n".join([doc, imports, kernel]) + "\n"


def _tile(program: pointwise.Program, even: bool, rounded: bool) -> list[str]:
    """Lines that load a tile's inputs and compute its results."""
    masks = ("", "", "")
    lines = ["at = m[:, None].to(tl.int64) * C + c[None, :]"]
    if not even:
        lines.append("live = (m < M)[:, None] & (c < C)[None, :]")
        masks = tuple(f", mask={live}, other=0.0" for live in ("live", "m < M", "c < C"))  # type: ignore[assignment]
    for i, kind in enumerate(program.kinds):
        lines.append(f"i{i} = {_LOADS[kind].format(i, *masks)}")
    return lines + pointwise.to_triton(program, rounded)


def _live(tile: str, even: bool) -> str:
    """A tile with zeros outside [M, C], where producers make anything of masked loads."""
    return tile if even else f"tl.where(live, {tile}, 0.0)"


def _amax_kernel(program: pointwise.Program, amaxes: list[str], even: bool) -> str:
    """Every amax by atomic integer maxima, of tiles [BM, BC] down ROWS rows."""
    before, inside, after = [], [], []
    for r in sorted({int(a.strip(ascii_lowercase)) for a in amaxes}):
        inside.append(f"a{r} = {_live(f'tl.abs(f_{program.results[r]})', even)}")
        if f"row{r}" in amaxes:
            inside += _atomic(f"row{r}", f"tl.reduce(a{r}, 1, fp8.larger)", " + m", "m < M", even)
        if f"column{r}" in amaxes or f"tensor{r}" in amaxes:
            before.append(f"best{r} = tl.zeros([BM, BC], tl.float32)")
            inside.append(f"best{r} = fp8.larger(best{r}, a{r})")
            after.append(f"c{r} = tl.reduce(best{r}, 0, fp8.larger)")
        if f"column{r}" in amaxes:
            after += _atomic(f"column{r}", f"c{r}", " + c", "c < C", even)
        if f"tensor{r}" in amaxes:
            after += _atomic(f"tensor{r}", f"tl.reduce(c{r}, 0, fp8.larger)", "", "", True)
    loop = [
        "m = tl.program_id(1) * ROWS + i + tl.arange(0, BM)",
        *_tile(program, even, rounded=False),
        *inside,
    ]
    body = [
        "c = tl.program_id(0) * BC + tl.arange(0, BC)",
        *before,
        "for i in range(0, ROWS, BM):",
        *(f"    {line}" for line in loop),
        *after,
    ]
    pointers = [*_pointers(program), *(f"{a}_ptr" for a in amaxes)]
    sizes = ["M", "C", "ROWS", "BM: tl.constexpr", "BC: tl.constexpr"]
    return _function([*pointers, *sizes], body)


def _pointers(program: pointwise.Program) -> list[str]:
    return [f"i{i}_ptr" for i in range(len(program.kinds))]


def _atomic(name: str, amax: str, at: str, live: str, even: bool) -> list[str]:
    mask = "" if even else f", mask={live}"
    return [
        f"{name} = fp8.bits_of_amax({amax})",
        f'tl.atomic_max({name}_ptr{at}, {name}{mask}, sem="relaxed")',
    ]


def _cast_kernel(program: pointwise.Program, forms: list[Form], even: bool) -> str:
    """Every quantized copy of a tile [BM, BC], and its scales."""
    pointers = _pointers(program)
    pointers += [f"a{i}_ptr" for i, form in enumerate(forms) if form.kind not in BLOCKS]
    pointers += [f"{letter}{i}_ptr" for i in range(len(forms)) for letter in "qs"]
    body = [
        "c = tl.program_id(0) * BC + tl.arange(0, BC)",
        "m = tl.program_id(1) * BM + tl.arange(0, BM)",
        "CP = (C + 15) // 16 * 16",
        "MP = (M + 15) // 16 * 16",
        *_tile(program, even, rounded=True),
    ]
    for r in sorted({f.result for f in forms}):
        body.append(f"x{r} = {_live(f'f_{program.results[r]}', even)}")
    for i, form in enumerate(forms):
        body += _cast(i, form, even)
    sizes = ["M", "C", "BM: tl.constexpr", "BC: tl.constexpr"]
    return _function([*pointers, *sizes], body)


def _cast(i: int, form: Form, even: bool) -> list[str]:
    """Lines that quantize a tile to form ``i``: values q and decode scales s."""
    limit, element = fp8.MAX[ELEMENTS[form.element]], _TRITON[form.element]
    amax, store = _scale(i, form, even)
    spread = ""
    if form.kind in ("row", "block"):
        spread = "[None, :]" if form.transposed else "[:, None]"
    if form.transposed:
        values, at = f"tl.trans(n{i})", "c[:, None].to(tl.int64) * MP + m[None, :]"
        mask = "" if even else ", mask=(c < C)[:, None] & (m < MP)[None, :]"
    else:
        values, at = f"n{i}", "m[:, None].to(tl.int64) * CP + c[None, :]"
        mask = "" if even else ", mask=(m < M)[:, None] & (c < CP)[None, :]"
    return [
        f"e{i} = fp8.encode({amax}, {limit}, {form.pow2})",
        f"y{i} = {_live(f'x{form.result} * e{i}{spread}', even)}",
        f"n{i} = fp8.narrow(y{i}, {element})",
        f"tl.store(q{i}_ptr + {at}, {values}{mask})",
        *store,
    ]


def _scale(i: int, form: Form, even: bool) -> tuple[str, list[str]]:
    """The amax of a form's tile, and lines that store its decode scales."""
    x, decode = f"tl.abs(x{form.result})", f"fp8.decode(e{i})"
    # The index and size along which scales lie, and the program ids across and along it.
    axis, size, across, along = ("c", "C", 1, 0) if form.transposed else ("m", "M", 0, 1)
    mask = "" if even else f", mask={axis} < {size}"
    if form.kind == "tensor":
        first = "if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):"
        return f"tl.load(a{i}_ptr)", [first, f"    tl.store(s{i}_ptr, {decode})"]
    if form.kind == "row":
        other = "" if even else ", other=0.0"
        return f"tl.load(a{i}_ptr + {axis}{mask}{other})", [
            f"if tl.program_id({across}) == 0:",
            f"    tl.store(s{i}_ptr + {axis}, {decode}{mask})",
        ]
    if form.kind == "block":
        return f"tl.reduce({x}, {0 if form.transposed else 1}, fp8.larger)", [
            f"t{i} = tl.program_id({across}).to(tl.int64) * {size} + {axis}",
            f"tl.store(s{i}_ptr + t{i}, {decode}{mask})",
        ]
    other = "M" if form.transposed else "C"
    return f"tl.reduce(tl.reduce({x}, 1, fp8.larger), 0, fp8.larger)", [
        f"w{i} = (({other} + 127) // 128 + 3) // 4 * 4",
        f"tl.store(s{i}_ptr + tl.program_id({along}) * w{i} + tl.program_id({across}), {decode})",
    ]


def _function(parameters: list[str], body: list[str]) -> str:
    # Not specialized, for the reason that quantize_fp8_row_t gives.
    decorator = '@triton.jit(do_not_specialize=["M"])'
    head = [decorator, "def kernel(", *(f"    {p}," for p in parameters), "):"]
    return "\n".join([*head, *(f"    {line}" for line in body)])
