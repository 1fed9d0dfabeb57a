"""The Triton source of ``fused_cast``: of the scales of its forms, and of forms made in one read.

Copies of x.T are made four rows at a time, as words of four bytes: two conversions a word, and a
transpose of words, where bytes cost a shared-memory instruction each. What every row or column of a
tile would compute of its amax is computed once, by the kernel of the scales; one scale of a tensor
every program computes for itself, which spares that kernel where there is no other.
"""

from dataclasses import dataclass

from lpcompile.ops import fp8, pointwise, tile_source
from lpcompile.ops.fused_source import BLOCKS, ELEMENTS, WHOLE, Form, is_grouped, parse_form


def scales_source(forms: tuple[str, ...]) -> str:
    """A module with a ``kernel``: of each form's amax the encode scales e and decode scales s.

    Forms of rows alone: the others have theirs in the tile, or one.
    """
    body = ["i = tl.program_id(0) * B + tl.arange(0, B)"]
    for i, form in enumerate(map(parse_form, forms)):
        body += [
            f"if tl.program_id(1) == {i}:",
            f"    amax = tl.load(a{i}_ptr + i, mask=i < n{i}, other=0.0)",
            f"    e = fp8.encode(amax, {fp8.MAX[ELEMENTS[form.element]]}, {form.pow2})",
            f"    tl.store(e{i}_ptr + i, e, mask=i < n{i})",
            f"    tl.store(s{i}_ptr + i, fp8.decode(e), mask=i < n{i})",
        ]
    names = [
        f"{name}{i}{'' if name == 'n' else '_ptr'}" for i in range(len(forms)) for name in "aesn"
    ]
    return tile_source.module("", forms, tile_source.function([*names, "B: tl.constexpr"], body))


def cast_source(program: str, forms: tuple[str, ...], even: bool) -> str:
    """A module with the ``kernel`` of ``fused_cast``, of tiles of BM rows and BC columns.

    It goes COLUMNS columns to the right, so that the group of a tile is found once.
    even: C is a multiple of BC, so that nothing is masked.
    """
    named, parsed = pointwise.parse(program), [parse_form(f) for f in forms]
    grouped = is_grouped(forms)
    rows = 4 if any(form.way != "n" for form in parsed) else 1
    tile = ["c = start + tl.arange(0, BC)"]
    for k in range(rows):
        tile.append(f"m = tl.minimum(t + {k}, last - 1)")
        tile += [f"m{k} = m", *tile_source.tile(named, even, rounded=True, rows_exist=True)]
        for r in sorted({form.result for form in parsed}):
            for j, name in enumerate(named.parts[r]):
                tile.append(f"x{r}_{j}_{k} = {tile_source.live(f'f_{name}', even)}")
    for i, form in enumerate(parsed):
        parts = len(named.parts[form.result])
        for j in range(parts):
            tile += _cast(_Piece(i, form, j, parts, rows, even))
    body = [
        *_place(parsed, rows, grouped),
        *(line for i, form in enumerate(parsed) if form.kind in WHOLE for line in _one(i, form)),
        "begin_of_columns = tl.program_id(0) * COLUMNS",
        "end_of_columns = tl.minimum(begin_of_columns + COLUMNS, C)",
        "for start in tl.range(begin_of_columns, end_of_columns, BC, num_stages=STAGES):",
        *(f"    {line}" for line in tile),
    ]
    pointers = tile_source.pointers(named)
    of_kind = {"row": "e", **dict.fromkeys(WHOLE, "a")}
    pointers += [f"{of_kind[f.kind]}{i}_ptr" for i, f in enumerate(parsed) if f.kind in of_kind]
    for i, form in enumerate(parsed):
        pointers += [f"q{i}_ptr", *_more_pointers(i, form)]
    sizes = [
        *tile_source.SIZES[grouped],
        "TP",
        "ALIGN: tl.constexpr",
        "COLUMNS: tl.constexpr",
        "STAGES: tl.constexpr",
    ]
    kernel = tile_source.function([*pointers, *sizes, *tile_source.TILE[grouped]], body)
    return tile_source.module(program, forms, kernel)


def _more_pointers(i: int, form: Form) -> list[str]:
    """What a form's kernel writes beside values."""
    return [f"s{i}_ptr"] * (form.kind != "row") + [f"p{i}_ptr"] * (form.way == "g")


def _one(i: int, form: Form) -> list[str]:
    """Lines that make the one encode scale of form i of its amax, and store the decode scale."""
    return [
        f"e{i} = fp8.encode(tl.load(a{i}_ptr), {fp8.MAX[ELEMENTS[form.element]]}, {form.pow2})",
        "if (tl.program_id(1) == 0) & (tl.program_id(0) == 0):",
        f"    tl.store(s{i}_ptr, fp8.decode(e{i}))",
    ]


def _place(forms: list[Form], rows: int, grouped: bool) -> list[str]:
    """Lines that find a tile's rows t, and where they lie, in words, along x.T."""
    lines = ["tile = tl.program_id(1)"]
    if grouped:
        lines += [
            "SUB: tl.constexpr = (ALIGN + BM - 1) // BM  # tiles that cover a group's padding too",
            "tile = tile // SUB",
            *(line.format(tile="BM * SUB", align="ALIGN") for line in tile_source.LOCATE),
            tile_source.REST,
            "index = index * SUB + tl.program_id(1) % SUB",
            "if (tl.program_id(1) == 0) & (tl.program_id(0) == 0):",
            *(
                f"    groups.store_padded_ends(p{i}_ptr, starts, ends, E, ALIGN, EP)"
                for i, form in enumerate(forms)
                if form.way == "g"
            ),
        ]
    else:
        lines.append("first, last, index, begin = 0, M, tile, 0")
    lines.append(f"t = first + index * BM + {rows} * tl.arange(0, BM // {rows})")
    if rows == 1:
        return lines
    exists = "tl.where(group < E, last - t, 0)" if grouped else "last - t"
    end = "begin + tl.cdiv(last - first, ALIGN) * ALIGN"
    return [
        *lines,
        f"keep = fp8.first_bytes({exists})[:, None]  # of four rows, those that exist",
        "# Divided and multiplied, to show the compiler that whole vectors are stored.",
        "to = (begin // 16 + index * (BM // 16)) * 4 + tl.arange(0, BM // 4)",
        *(["# Tiles past the last group write the zeros between it and TP."] if grouped else []),
        f"stop = tl.where(group < E, {end}, TP) // 16 * 4" if grouped else "stop = TP // 16 * 4",
    ]


@dataclass(frozen=True)
class _Piece:
    """Form i of one part of a result that has ``parts``, of tiles of ``rows`` rows a word."""

    i: int
    form: Form
    j: int
    parts: int
    rows: int
    even: bool

    @property
    def column(self) -> str:
        """The columns of the tile in the whole result."""
        return f"({self.j} * C + c)" if self.j else "c"

    @property
    def width(self) -> str:
        """How wide the whole result is."""
        return f"({self.parts} * C)" if self.parts > 1 else "C"

    def x(self, k: int) -> str:
        """The k-th tile of the part."""
        return f"x{self.form.result}_{self.j}_{k}"

    def masked(self, *conditions: str) -> str:
        """The mask of a load or store: nothing where everything is even."""
        live = [c for c in conditions if c]
        return f", mask={' & '.join(live)}" if live else ""


def _cast(piece: _Piece) -> list[str]:
    """Lines that quantize a part of a tile: values q, and of blocks the decode scales s."""
    i, form, u = piece.i, piece.form, f"{piece.i}_{piece.j}"
    element = tile_source.TRITON[form.element]
    lines, scaled = _scale(piece), []
    for k in range(piece.rows):
        e = f"e{u}"
        if form.kind == "row" and form.way == "n":
            e = f"tl.load(e{i}_ptr + m{k})[:, None]"
        scaled.append(tile_source.live(f"{piece.x(k)} * {e}", piece.even))
    live = "" if piece.even else "(c < C)"
    if form.way != "n":
        word = f'fp8.narrow4({", ".join(scaled)}, "{form.element}") & keep'
        at = f"{piece.column}[:, None].to(tl.int64) * (TP // 16 * 4) + to[None, :]"
        mask = piece.masked(f"{live}[:, None]" if live else "", "(to < stop)[None, :]")
        words = f"q{i}_ptr.to(tl.pointer_type(tl.int32))"
        return [*lines, f"tl.store({words} + {at}, tl.trans({word}){mask})"]
    padded = f"(({piece.width} + 15) // 16 * 16)"
    last = piece.j + 1 == piece.parts
    end = f"{padded} - {piece.j} * C" if last else "C"
    mask = "" if piece.even else f", mask=(c < {end})[None, :]"
    for k, y in enumerate(scaled):
        at = f"m{k}[:, None].to(tl.int64) * {padded} + {piece.column}[None, :]"
        lines.append(f"tl.store(q{i}_ptr + {at}, fp8.narrow({y}, {element}){mask})")
    return lines


def _scale(piece: _Piece) -> list[str]:
    """Lines that load or make the encode scales of a form's part, but those of rows."""
    form, i, u = piece.form, piece.i, f"{piece.i}_{piece.j}"
    if form.kind in BLOCKS:
        return _block_scale(piece)
    if form.kind in WHOLE:
        return [f"e{u} = e{i}"]
    if form.way == "n":
        return []
    at, live = piece.column, [] if piece.even else ["(c < C)"]
    if form.way == "g":
        at, live = f"group.to(tl.int64) * {piece.width} + {at}", [*live, "(group < E)"]
    mask = f"{piece.masked(*live)}, other=0.0" if live else ""
    return [f"e{u} = tl.load(e{i}_ptr + {at}{mask})[None, :]"]


def _block_scale(piece: _Piece) -> list[str]:
    """Lines that take the amax of a block of the tile, and store its decode scale."""
    form, i, u = piece.form, piece.i, f"{piece.i}_{piece.j}"
    axis = 1 if form.kind == "block" and form.way == "n" else 0
    amax = f"tl.abs({piece.x(0)})"
    for k in range(1, piece.rows):
        amax = f"fp8.larger({amax}, tl.abs({piece.x(k)}))"
    amax = f"tl.reduce({amax}, {axis}, fp8.larger)"
    if form.kind == "square":
        amax = f"tl.reduce({amax}, 0, fp8.larger)"
    if form.way == "g":
        amax = f"tl.where(group < E, {amax}, 0.0)"
    spread = {"square": ""}.get(form.kind, "[:, None]" if axis else "[None, :]")
    at, mask = _of_block(piece)
    limit = fp8.MAX[ELEMENTS[form.element]]
    return [
        f"d{u} = fp8.encode({amax}, {limit}, {form.pow2})",
        f"tl.store(s{i}_ptr + {at}, fp8.decode(d{u}){mask})",
        f"e{u} = d{u}{spread}",
    ]


def _of_block(piece: _Piece) -> tuple[str, str]:
    """Where the scale of a block of the tile lies, and the mask of its store."""
    form, live = piece.form, "" if piece.even else "(c < C)"
    column = "start // BC" + (f" + {piece.j} * (C // BC)" if piece.j else "")
    if form.kind == "square":
        row, column, size = "tile", column, piece.width
        if form.way == "t":
            row, column, size = column, row, "M"
        return f"({row}) * ((({size} + 127) // 128 + 3) // 4 * 4) + {column}", ""
    if form.way == "n":
        return f"({column}) * M + m0", ""
    block = "(begin // BM + index)" if form.way == "g" else "tile"
    exists = "(begin + index * BM < TP)" if form.way == "g" else ""
    return f"{block}.to(tl.int64) * {piece.width} + {piece.column}", piece.masked(live, exists)
