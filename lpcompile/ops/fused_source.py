"""The Triton source of ``fused_amax`` and ``fused_quantize_row``, and what ``fused_cast`` shares.

The tile's producer is ``pointwise.to_triton``; the rest is what ``lpcompile.ops.fp8`` does, written
out for the forms that are wanted. Readable on purpose: it is what a dump of a graph shows.

Kernels that are grouped cut their tiles inside groups of rows, found on the device, the rows past
the last group being one more. Rows past the end of a tile's group are its last row again, which
changes no maximum and needs no mask.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from string import digits

import torch

from lpcompile.ops import fp8, pointwise

ELEMENTS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
BLOCKS = ("block", "square")
_TRITON = {"e4m3": "tl.float8e4nv", "e5m2": "tl.float8e5"}


@dataclass(frozen=True)
class Form:
    """One quantized copy of one result.

    kind: what shares a scale: "row", "tensor", "tokens" (all rows of all groups), "block" or
        "square".
    way: "n" of x, "t" of x.T, "g" of x.T with the columns of each group padded.
    """

    result: int
    kind: str
    element: str
    pow2: bool
    way: str

    @property
    def text(self) -> str:
        """The form as the schema carries it."""
        scale = "pow2" if self.pow2 else "fp32"
        return f"{self.result} {self.kind} {self.element} {scale} {self.way}"

    @property
    def amax(self) -> str:
        """The name of the amax it reads; empty for blocks, which have theirs in the tile."""
        along = {"n": "row", "t": "column", "g": "group"}[self.way]
        names = {"row": along, "tensor": "tensor", "tokens": "tokens"}
        return f"{names[self.kind]}{self.result}" if self.kind not in BLOCKS else ""


@cache
def parse_form(text: str) -> Form:
    """A Form from its text."""
    result, kind, element, scale, way = text.split(" ")
    return Form(int(result), kind, element, scale == "pow2", way)


def along(amax: str) -> str:
    """What an amax is of: "row", "column", "group", "tensor" or "tokens"."""
    return amax.rstrip(digits)


def is_grouped(wanted: Iterable[str]) -> bool:
    """Whether a kernel that makes these amaxes or forms cuts its tiles inside groups."""
    return any(w.startswith(("group", "tokens")) or w.endswith(" g") for w in wanted)


_LOADS = {
    "full": "tl.load(i{0}_ptr + at{1})",
    "wide": "tl.load(i{0}_ptr + m[:, None].to(tl.int64) * i{0}_stride + c[None, :]{1})",
    "row": "tl.load(i{0}_ptr + m{2})[:, None]",
    "column": "tl.load(i{0}_ptr + c{3})[None, :]",
    "scalar": "tl.load(i{0}_ptr)",
}
# A tile's group; of the tiles past the last group, the rows past it.
_LOCATE = [
    "starts, ends = groups.load(offs_ptr, E, EP)",
    "group, first, last, index, begin = groups.locate(tile, starts, ends, {tile}, {align}, EP)",
]
_REST = "first, last = groups.rest(group, first, last, ends, E, M)"


def amax_source(program: str, amaxes: tuple[str, ...], even: bool) -> str:
    """A module with the ``kernel`` of ``fused_amax``.

    even: C is a multiple of a tile, so that nothing is masked.
    """
    return _module(program, amaxes, _amax_kernel(pointwise.parse(program), list(amaxes), even))


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


def walk_source(program: str, element: str, pow2: bool, grouped: bool, even: bool) -> str:
    """A module with the ``walk`` of ``fused_quantize_row``: whole rows, and maxima of columns.

    even: C is a tile's width, so that nothing is masked.
    """
    named, limit = pointwise.parse(program), fp8.MAX[ELEMENTS[element]]
    masked = "" if even else ", mask=(c < CP)[None, :]"
    where = ["group, index = tl.program_id(1), tl.program_id(0)"]
    where += ["first, last = group * M, group * M + M"]
    if grouped:
        where = ["tile = tl.program_id(0)"]
        where += [*(line.format(tile="ROWS", align=1) for line in _LOCATE), _REST]
    live = [*([] if even else ["(c < C)"]), *(["(group < E)"] if grouped else [])]
    of_column = _atomic("a", "", "best", " + group.to(tl.int64) * C + c", " & ".join(live))
    inside = [
        "m = tl.minimum(start + tl.arange(0, BM), end - 1)",
        *_tile(named, even, rounded=True, rows_exist=True),
        f"x = {_live(f'f_{named.results[0]}', even)}",
        "best = fp8.larger(best, tl.reduce(tl.abs(x), 0, fp8.larger))",
        f"e = fp8.encode(tl.reduce(tl.abs(x), 1, fp8.larger), {limit}, {pow2})",
        f"n = fp8.narrow({_live('x * e[:, None]', even)}, {_TRITON[element]})",
        f"tl.store(q_ptr + m[:, None].to(tl.int64) * CP + c[None, :], n{masked})",
        "tl.store(s_ptr + m, fp8.decode(e))",
    ]
    body = [
        *where,
        "top = first + index * ROWS",
        "end = tl.minimum(top + ROWS, last)",
        "c = tl.arange(0, BC)",
        "CP = (C + 15) // 16 * 16",
        "best = tl.zeros([BC], tl.float32)",
        "for start in tl.range(top, end, BM, num_stages=STAGES):",
        *(f"    {line}" for line in inside),
        *of_column,
    ]
    pointers = [*_pointers(named), "q_ptr", "s_ptr", "a_ptr"]
    sizes = [*_SIZES[grouped], "STAGES: tl.constexpr", "ROWS: tl.constexpr", *_TILE[grouped]]
    form = f"{element} {'pow2' if pow2 else 'fp32'} columns{' of groups' if grouped else ''}"
    return _module(program, (form,), _function([*pointers, *sizes], body))


def _module(program: str, wanted: tuple[str, ...], kernel: str) -> str:
    doc = '"""' + program + "\n\n" + "\n".join(wanted) + '\n"""'
    imports = "import triton\nimport triton.language as tl\n\n"
    imports += "from lpcompile.ops import fp8, groups, pointwise"
    return "\n\n".join([doc, imports, kernel]) + "\n"


def _tile(
    program: pointwise.Program, even: bool, rounded: bool, rows_exist: bool = False
) -> list[str]:
    """Lines that load a tile's inputs and compute its results.

    rows_exist: every m is a row, so that only columns are masked.
    """
    masks = ("", "", "")
    lines = ["at = m[:, None].to(tl.int64) * C + c[None, :]"]
    if not even:
        lines.append(f"live = {'' if rows_exist else '(m < M)[:, None] & '}(c < C)[None, :]")
        rows = "" if rows_exist else ", mask=m < M, other=0.0"
        masks = (", mask=live, other=0.0", rows, ", mask=c < C, other=0.0")
    for i, kind in enumerate(program.kinds):
        lines.append(f"i{i} = {_LOADS[kind].format(i, *masks)}")
    return lines + pointwise.to_triton(program, rounded)


def _live(tile: str, even: bool) -> str:
    """A tile with zeros outside [M, C], where producers make anything of masked loads."""
    return tile if even else f"tl.where(live, {tile}, 0.0)"


def _amax_kernel(program: pointwise.Program, amaxes: list[str], even: bool) -> str:
    """Every amax by atomic integer maxima, of tiles [BM, BC] down ROWS rows."""
    grouped = is_grouped(amaxes)
    before: list[str] = []
    inside: list[str] = []
    after: list[str] = []
    for r in sorted({int(a.removeprefix(along(a))) for a in amaxes}):
        wanted = [along(a) for a in amaxes if a == f"{along(a)}{r}"]
        lines = _maxima(r, program.parts[r], wanted, even)
        for all_lines, some in zip((before, inside, after), lines, strict=True):
            all_lines += some
    body = ["first, last, index = 0, M, tl.program_id(1)"]
    if grouped:
        body = ["tile = tl.program_id(1)"]
        body += [line.format(tile="ROWS", align=1) for line in _LOCATE]
        if any(along(a) not in ("group", "tokens") for a in amaxes):
            body.append(_REST)
    body += [
        "c = tl.program_id(0) * BC + tl.arange(0, BC)",
        "top = first + index * ROWS",
        "end = tl.minimum(top + ROWS, last)",
        *before,
        "for start in tl.range(top, end, BM, num_stages=STAGES):",
        "    m = tl.minimum(start + tl.arange(0, BM), end - 1)",
        *(f"    {line}" for line in _tile(program, even, rounded=False, rows_exist=True)),
        *(f"    {line}" for line in inside),
        *after,
    ]
    pointers = [*_pointers(program), *(f"{a}_ptr" for a in amaxes)]
    return _function(
        [
            *pointers,
            *_SIZES[grouped],
            "STAGES: tl.constexpr",
            "ROWS: tl.constexpr",
            *_TILE[grouped],
        ],
        body,
    )


# What every kernel takes of sizes, plain and grouped.
_SIZES = {False: ["M", "C"], True: ["offs_ptr", "M", "C", "E"]}
_TILE = {
    False: ["BM: tl.constexpr", "BC: tl.constexpr"],
    True: ["BM: tl.constexpr", "BC: tl.constexpr", "EP: tl.constexpr"],
}


def _maxima(
    r: int, parts: list[str], wanted: list[str], even: bool
) -> tuple[list[str], list[str], list[str]]:
    """Lines before, in and after the loop that take the maxima ``wanted`` of result r."""
    inside = [f"a{r}_{j} = {_live(f'tl.abs(f_{name})', even)}" for j, name in enumerate(parts)]
    before: list[str] = []
    after: list[str] = []
    if "row" in wanted:
        whole = f"a{r}_0"
        for j in range(1, len(parts)):
            whole = f"fp8.larger({whole}, a{r}_{j})"
        inside += _atomic(f"row{r}", "", f"tl.reduce({whole}, 1, fp8.larger)", " + m", "")
    if wanted == ["row"]:
        return before, inside, after
    columns = [] if even else ["(c < C)"]
    for j in range(len(parts)):
        before.append(f"best{r}_{j} = tl.zeros([BM, BC], tl.float32)")
        inside.append(f"best{r}_{j} = fp8.larger(best{r}_{j}, a{r}_{j})")
        after.append(f"c{r}_{j} = tl.reduce(best{r}_{j}, 0, fp8.larger)")
        each, whole = f"c{r}_{j}", f"tl.reduce(c{r}_{j}, 0, fp8.larger)"
        of_group = f" + (group.to(tl.int64) * {len(parts)} + {j}) * C + c"
        for name, amax, at, live in (
            ("column", each, f" + {j} * C + c", columns),
            ("group", each, of_group, [*columns, "(group < E)"]),
            ("tensor", whole, "", []),
            ("tokens", whole, "", ["(group < E)"]),
        ):
            if name in wanted:
                after += _atomic(f"{name}{r}", f"_{j}", amax, at, " & ".join(live))
    return before, inside, after


def _pointers(program: pointwise.Program) -> list[str]:
    """What a kernel takes for ``pointwise.arguments``."""
    names = []
    for i, kind in enumerate(program.kinds):
        names += [f"i{i}_ptr", f"i{i}_stride"] if kind == "wide" else [f"i{i}_ptr"]
    return names


def _atomic(name: str, part: str, amax: str, at: str, live: str) -> list[str]:
    mask = f", mask={live}" if live else ""
    return [
        f"{name}{part} = fp8.bits_of_amax({amax})",
        f'tl.atomic_max({name}_ptr{at}, {name}{part}{mask}, sem="relaxed")',
    ]


def _function(parameters: list[str], body: list[str]) -> str:
    typed = [f"{p}: tl.int32" if p in ("M", "C") else p for p in parameters]  # see fp8.narrow
    head = ["@triton.jit", "def kernel(", *(f"    {p}," for p in typed), "):"]
    return "\n".join([*head, *(f"    {line}" for line in body)])
