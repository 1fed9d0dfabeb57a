"""The Triton source of ``fused_cast``: of the scales of its forms, and of forms made in one read.

Copies of x.T are made four rows at a time, as words of four bytes: two conversions a word, and a
transpose of words, where bytes cost a shared-memory instruction each. What every row or column of a
tile would compute of its amax is computed once, by the kernel of the scales; one scale of a tensor
every program computes for itself, which spares that kernel where there is no other.
"""

from collections.abc import Iterable, Sequence
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
            f"    tl.store(s{i}_ptr + i, fp8.decode(e, {form.pow2}), mask=i < n{i})",
        ]
    names = [
        f"{name}{i}{'' if name == 'n' else '_ptr'}" for i in range(len(forms)) for name in "aesn"
    ]
    return tile_source.module("", forms, tile_source.function([*names, "B: tl.constexpr"], body))


def cast_source(program: str, forms: tuple[str, ...], even: bool) -> str:
    """A module with the ``kernel`` of ``fused_cast``, of tiles of BM rows and BC columns.

    Of blocks a tile is kept in bf16, row by row cast before the next is made, for x.T at the end.

    It goes COLUMNS columns to the right, so that the group of a tile is found once.
    even: C is a multiple of BC, so that nothing is masked.
    """
    named, parsed = pointwise.parse(program), [parse_form(f) for f in forms]
    grouped, packed = is_grouped(forms), parsed[0].kind in BLOCKS
    rows = 4 if any(form.way != "n" for form in parsed) else 1
    pieces = [
        _Piece(i, form, j, len(named.parts[form.result]), rows, even)
        for i, form in enumerate(parsed)
        for j in range(len(named.parts[form.result]))
    ]
    tile = ["c = start + tl.arange(0, BC)"]
    for k in range(rows):
        tile.append(f"m = tl.minimum(t + {k}, last - 1)")
        tile += [f"m{k} = m", *tile_source.tile(named, even, not packed, rows="")]
        for r in sorted({form.result for form in parsed}):
            for j, name in enumerate(named.parts[r]):
                tile.append(f"x{r}_{j}_{k} = {_held(name, even, packed)}")
        for piece in pieces:
            if piece.in_rows:
                tile += [*_block_scale(piece, [k]), *_cast_rows(piece, [k])]
    for piece in pieces:
        if piece.in_rows:
            tile += _store_row_scales(piece)
        else:
            cast = _cast_rows if piece.form.way == "n" else _cast_columns
            tile += [*_scale(piece), *cast(piece, range(rows))]
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
        f"    tl.store(s{i}_ptr, fp8.decode(e{i}, {form.pow2}))",
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

    @property
    def block(self) -> str:
        """The block of columns of the tile in the whole result."""
        return "start // BC" + (f" + {self.j} * (C // BC)" if self.j else "")

    @property
    def in_rows(self) -> bool:
        """Whether a block is one row of the tile, which is cast before the next rows are made."""
        return self.form.kind == "block" and self.form.way == "n"

    def scaled(self, k: int, e: str) -> str:
        """The k-th tile of the part by its encode scales, fp32."""
        x = self.x(k)
        if self.form.kind in BLOCKS:
            # In other words for x than for x.T: were it one value, it would be held in fp32.
            x = f"{x}.to(tl.float32)" if self.in_rows else f"turned.widened({x})"
        return tile_source.live(f"{x} * {e}", self.even)

    def masked(self, *conditions: str) -> str:
        """The mask of a load or store: nothing where everything is even."""
        live = [c for c in conditions if c]
        return f", mask={' & '.join(live)}" if live else ""


def _held(name: str, even: bool, packed: bool) -> str:
    """What is kept of a result's tile until it is cast: fp32, or packed in bf16."""
    if not packed:
        return tile_source.live(f"f_{name}", even)
    return name if name[0] == "i" else f"pointwise.narrowed({tile_source.live(f'f_{name}', even)})"


def _cast_rows(piece: _Piece, strips: Iterable[int]) -> list[str]:
    """Lines that store values q of x."""
    i, form, e, lines = piece.i, piece.form, f"e{piece.i}_{piece.j}", []
    padded = f"(({piece.width} + 15) // 16 * 16)"
    last = piece.j + 1 == piece.parts
    end = f"{padded} - {piece.j} * C" if last else "C"
    mask = "" if piece.even else f", mask=(c < {end})[None, :]"
    for k in strips:
        if form.kind == "row":
            e = f"tl.load(e{i}_ptr + m{k})[:, None]"
        y = f"fp8.narrow({piece.scaled(k, e)}, {tile_source.TRITON[form.element]})"
        at = f"m{k}[:, None].to(tl.int64) * {padded} + {piece.column}[None, :]"
        lines.append(f"tl.store(q{i}_ptr + {at}, {y}{mask})")
    return lines


def _cast_columns(piece: _Piece, strips: Iterable[int]) -> list[str]:
    """Lines that store values q of x.T."""
    i, form = piece.i, piece.form
    scaled = ", ".join(piece.scaled(k, f"e{i}_{piece.j}") for k in strips)
    word = f'fp8.narrow4({scaled}, "{form.element}") & keep'
    at = f"{piece.column}[:, None].to(tl.int64) * (TP // 16 * 4) + to[None, :]"
    mask = piece.masked("" if piece.even else "(c < C)[:, None]", "(to < stop)[None, :]")
    words = f"q{i}_ptr.to(tl.pointer_type(tl.int32))"
    return [f"tl.store({words} + {at}, tl.trans({word}){mask})"]


def _scale(piece: _Piece) -> list[str]:
    """Lines that load or make the encode scales of a form's part, but those of rows."""
    form, i, u = piece.form, piece.i, f"{piece.i}_{piece.j}"
    if form.kind in BLOCKS:
        return _block_scale(piece, range(piece.rows))
    if form.kind in WHOLE:
        return [f"e{u} = e{i}"]
    if form.way == "n":
        return []
    at, live = piece.column, [] if piece.even else ["(c < C)"]
    if form.way == "g":
        at, live = f"group.to(tl.int64) * {piece.width} + {at}", [*live, "(group < E)"]
    mask = f"{piece.masked(*live)}, other=0.0" if live else ""
    return [f"e{u} = tl.load(e{i}_ptr + {at}{mask})[None, :]"]


def _block_scale(piece: _Piece, strips: Sequence[int]) -> list[str]:
    """Lines that make the encode scale of a block of the tile, and store what decodes it.

    But of rows, whose strips are one store at the end: between them threads would wait.
    """
    form, i, u = piece.form, piece.i, f"{piece.i}_{piece.j}"
    first, *others = (piece.x(k) for k in strips)
    for x in others:
        first = f"turned.larger({first}, {x})"
    amax = f"tl.reduce(tl.abs({first}.to(tl.float32)), {int(piece.in_rows)}, fp8.larger)"
    if form.kind == "square":
        amax = f"tl.reduce({amax}, 0, fp8.larger)"
    if form.way == "g":
        amax = f"tl.where(group < E, {amax}, 0.0)"
    encode = f"fp8.encode({amax}, {fp8.MAX[ELEMENTS[form.element]]}, {form.pow2})"
    if piece.in_rows:
        return [f"d{u}_{strips[0]} = {encode}", f"e{u} = d{u}_{strips[0]}[:, None]"]
    at, mask = _of_block(piece)
    return [
        f"d{u} = {encode}",
        f"tl.store(s{i}_ptr + {at}, fp8.decode(d{u}, {form.pow2}){mask})",
        f"e{u} = d{u}{'' if form.kind == 'square' else '[None, :]'}",
    ]


def _store_row_scales(piece: _Piece) -> list[str]:
    """Lines that store the decode scales of a tile's rows."""
    i, u, m, d = piece.i, f"{piece.i}_{piece.j}", "m0", f"d{piece.i}_{piece.j}_0"
    if piece.rows > 1:
        m = "tl.minimum(first + index * BM + tl.arange(0, BM), last - 1)"
        d = f"({', '.join(f'd{u}_{k}' for k in range(piece.rows))})"
        d = f"tl.reshape(turned.joined(turned.joined({d}, 2), 1)[0], (BM,))"
    return [f"tl.store(s{i}_ptr + ({piece.block}) * M + {m}, fp8.decode({d}, {piece.form.pow2}))"]


def _of_block(piece: _Piece) -> tuple[str, str]:
    """Where the scales of a tile that is one block, or of its columns, lie; the store's mask."""
    form, live = piece.form, "" if piece.even else "(c < C)"
    if form.kind == "square":
        row, column, size = "tile", piece.block, piece.width
        if form.way == "t":
            row, column, size = column, row, "M"
        return f"({row}) * ((({size} + 127) // 128 + 3) // 4 * 4) + {column}", ""
    block = "(begin // BM + index)" if form.way == "g" else "tile"
    exists = "(begin + index * BM < TP)" if form.way == "g" else ""
    return f"{block}.to(tl.int64) * {piece.width} + {piece.column}", piece.masked(live, exists)
