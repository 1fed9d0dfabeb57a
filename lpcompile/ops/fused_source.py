"""The Triton source of ``fused_amax`` and ``fused_quantize_row``, and the Forms of ``fused_cast``.

What ``lpcompile.ops.fp8`` does, written out for the forms that are wanted. Readable on purpose: it
is what a dump of a graph shows.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from string import digits

import torch

from lpcompile.ops import fp8, pointwise, tile_source

ELEMENTS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
NAMES = {element: name for name, element in ELEMENTS.items()}
BLOCKS = ("block", "square")
WHOLE = ("tensor", "tokens")  # kinds of one scale


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


@cache
def along(amax: str) -> str:
    """What an amax is of: "row", "column", "group", "tensor" or "tokens"."""
    return amax.rstrip(digits)


def is_grouped(wanted: Iterable[str]) -> bool:
    """Whether a kernel that makes these amaxes or forms cuts its tiles inside groups."""
    return any(w.startswith(("group", "tokens")) or w.endswith(" g") for w in wanted)


def amax_source(program: str, amaxes: tuple[str, ...], even: bool) -> str:
    """A module with the ``kernel`` of ``fused_amax``.

    even: C is a multiple of a tile, so that nothing is masked.
    """
    return tile_source.module(
        program, amaxes, _amax_kernel(pointwise.parse(program), list(amaxes), even)
    )


def row_source(program: str, element: str, pow2: bool, even: bool) -> str:
    """A module with the ``kernel`` of ``fused_quantize_row``: whole rows in registers."""
    named = pointwise.parse(program)
    masked = "" if even else ", mask=(m < M)[:, None] & (c < CP)[None, :]"
    body = [
        "m = tl.program_id(0) * BM + tl.arange(0, BM)",
        "c = tl.arange(0, BC)",
        "CP = (C + 15) // 16 * 16",
        *tile_source.tile(named, even, rounded=True),
        f"x = {tile_source.live(f'f_{named.results[0]}', even)}",
        *_narrowed(element, pow2, even),
        f"tl.store(q_ptr + m[:, None].to(tl.int64) * CP + c[None, :], n{masked})",
        f"tl.store(s_ptr + m, fp8.decode(e, {pow2}){'' if even else ', mask=m < M'})",
    ]
    sizes = ["M", "C", "BM: tl.constexpr", "BC: tl.constexpr"]
    kernel = tile_source.function([*tile_source.pointers(named), "q_ptr", "s_ptr", *sizes], body)
    return tile_source.module(program, (f"{element} {'pow2' if pow2 else 'fp32'}",), kernel)


def _narrowed(element: str, pow2: bool, even: bool) -> list[str]:
    """Lines that narrow whole rows x of a tile: their encode scales e, and values n."""
    limit, kind = fp8.MAX[ELEMENTS[element]], tile_source.TRITON[element]
    return [
        f"e = fp8.encode(tl.reduce(tl.abs(x), 1, fp8.larger), {limit}, {pow2})",
        f"n = fp8.narrow({tile_source.live('x * e[:, None]', even)}, {kind})",
    ]


def walk_source(program: str, element: str, pow2: bool, grouped: bool, even: bool) -> str:
    """A module with the ``walk`` of ``fused_quantize_row``: whole rows, and maxima of columns.

    even: C is a tile's width, so that nothing is masked.
    """
    named = pointwise.parse(program)
    masked = "" if even else ", mask=(c < CP)[None, :]"
    where = ["group, index = tl.program_id(1), tl.program_id(0)"]
    where += ["first, last = group * M, group * M + M"]
    if grouped:
        where = ["tile = tl.program_id(0)"]
        where += [
            *(line.format(tile="ROWS", align=1) for line in tile_source.LOCATE),
            tile_source.REST,
        ]
    live = [*([] if even else ["(c < C)"]), *(["(group < E)"] if grouped else [])]
    of_column = _atomic("a", "", "best", " + group.to(tl.int64) * C + c", " & ".join(live))
    inside = [
        "m = tl.minimum(start + tl.arange(0, BM), end - 1)",
        *tile_source.tile(named, even, rounded=True, rows=""),
        f"x = {tile_source.live(f'f_{named.results[0]}', even)}",
        "best = fp8.larger(best, tl.reduce(tl.abs(x), 0, fp8.larger))",
        *_narrowed(element, pow2, even),
        f"tl.store(q_ptr + m[:, None].to(tl.int64) * CP + c[None, :], n{masked})",
        f"tl.store(s_ptr + m, fp8.decode(e, {pow2}))",
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
    pointers = [*tile_source.pointers(named), "q_ptr", "s_ptr", "a_ptr"]
    sizes = [
        *tile_source.SIZES[grouped],
        "STAGES: tl.constexpr",
        "ROWS: tl.constexpr",
        *tile_source.TILE[grouped],
    ]
    form = f"{element} {'pow2' if pow2 else 'fp32'} columns{' of groups' if grouped else ''}"
    return tile_source.module(program, (form,), tile_source.function([*pointers, *sizes], body))


def _amax_kernel(program: pointwise.Program, amaxes: list[str], even: bool) -> str:
    """Every amax by atomic integer maxima, of tiles [BM, BC] down ROWS rows."""
    grouped = is_grouped(amaxes)
    tile = tile_source.tile(program, even, rounded=False, rows="")
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
        body += [line.format(tile="ROWS", align=1) for line in tile_source.LOCATE]
        if any(along(a) not in ("group", "tokens") for a in amaxes):
            body.append(tile_source.REST)
    body += [
        "c = tl.program_id(0) * BC + tl.arange(0, BC)",
        "top = first + index * ROWS",
        "end = tl.minimum(top + ROWS, last)",
        *before,
        "for start in tl.range(top, end, BM, num_stages=STAGES):",
        "    m = tl.minimum(start + tl.arange(0, BM), end - 1)",
        *(f"    {line}" for line in tile),
        *(f"    {line}" for line in inside),
        *after,
    ]
    pointers = [*tile_source.pointers(program), *(f"{a}_ptr" for a in amaxes)]
    sizes = ["STAGES: tl.constexpr", "ROWS: tl.constexpr", *tile_source.TILE[grouped]]
    return tile_source.function([*pointers, *tile_source.SIZES[grouped], *sizes], body)


def _maxima(
    r: int, parts: list[str], wanted: list[str], even: bool
) -> tuple[list[str], list[str], list[str]]:
    """Lines before, in and after the loop that take the maxima ``wanted`` of result r."""
    inside = [
        f"a{r}_{j} = {tile_source.live(f'tl.abs(f_{name})', even)}" for j, name in enumerate(parts)
    ]
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


def _atomic(name: str, part: str, amax: str, at: str, live: str) -> list[str]:
    mask = f", mask={live}" if live else ""
    return [
        f"{name}{part} = fp8.bits_of_amax({amax})",
        f'tl.atomic_max({name}_ptr{at}, {name}{part}{mask}, sem="relaxed")',
    ]
