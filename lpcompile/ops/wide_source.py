"""The Triton source of ``fused_wide_micro``, for one program and its forms.

Generated: the producer, and which copies are made of its results. What narrows a tile and widens it
again is ``lpcompile.ops.wide_tile``.
"""

from lpcompile.ops import fp8, groups, hadamard, micro_source, mx, pointwise, tile_source
from lpcompile.ops.micro_source import E4M3, Form, parse_form

TRANSFORMED = ("h", "gh")
GROUPED = ("g", "gh")


def is_grouped(forms: list[Form]) -> bool:
    """Whether tiles are cut inside ragged groups of rows."""
    return any(form.way in GROUPED for form in forms)


def source(program: str, forms: tuple[str, ...], even: bool, index: str) -> str:
    """A module with the ``kernel`` of every form, tiles of BM rows and BC columns of the results.

    It goes COLUMNS columns to the right.
    Of stochastic rounding it takes the draw, so that one kernel makes every draw.
    even: M and C are multiples of a tile, and there are no groups, so that nothing is masked. In
        groups the kernel's EVEN is that C is one, and masks nothing that is padded along rows: of a
        tile that has anything to do there, every row is.
    NATIVE: with the instructions of Hopper.
    index: the Triton integer that holds the index of every element.
    """
    named, parsed = pointwise.parse(program), [parse_form(f) for f in forms]
    grouped = is_grouped(parsed)
    pointers = tile_source.pointers(named)
    bumps = [f"i{i}_ptr += e * M * C" for i, kind in enumerate(named.kinds) if kind == "full"]
    for i, form in enumerate(parsed):
        pointers += [f"w{i}_ptr"] + [f"a{i}_ptr"] * bool(form.amax)
        pointers += [f"draw{i}"] * (form.draw is not None)
    if any(form.draw is not None for form in parsed):
        pointers.append("seed_ptr")
    # The transform has 16 rows in a thread, which a known C puts at known distances.
    width = "C: tl.constexpr" if parsed[0].way in TRANSFORMED else "C"
    sizes = ["M", width, "COLUMNS: tl.constexpr", "STAGES: tl.constexpr"]
    if grouped:
        sizes = ["place_ptr", "E", "TP", *sizes]
    before = ["seed = tl.load(seed_ptr)"] * any(form.draw is not None for form in parsed)
    for i, form in enumerate(parsed):
        if form.amax:
            amax = "group, mask=group < E, other=0.0" if form.way in GROUPED else "e"
            before.append(f"amax{i} = tl.load(a{i}_ptr + {amax})")
    tile = ["c = start + tl.arange(0, BC)", "eight = start + tl.arange(0, BC // 8) * 8"]
    if any(form.way not in TRANSFORMED for form in parsed):
        tile.append(f"x = {_produce(named, 'm', 'm < last')}")
    for i, form in enumerate(parsed):
        tile += _form(i, form, named, index, grouped)
    loop = [_LOOP, *(f"    {line}" for line in tile)]
    if grouped and parsed[0].way in TRANSFORMED:
        # Around the loop: inside, a thread would need half as many registers again.
        padding = [_LOOP, "    c = start + tl.arange(0, BC)", f"    {_store(0, _ZEROS, 'g')}"]
        loop = _unless_padding(loop, padding)
    body = [
        "e = tl.program_id(2).to(tl.int64)  # of a stack, the matrix",
        *bumps,
        *(_GROUPED_ROWS if grouped else _ROWS),
        "m, to = top + tl.arange(0, BM), to_top + tl.arange(0, BM)",
        "begin_of_columns = tl.program_id(0) * COLUMNS",
        "end_of_columns = tl.minimum(begin_of_columns + COLUMNS, (C + 31) // 32 * 32)",
        *(_SKIP if grouped else []),
        *before,
        *loop,
    ]
    masked = not pointwise.keeps_zero(program)
    return micro_source._module(program, forms, named, [*pointers, *sizes], body, even, masked)


_ZEROS = "tl.zeros([BM, BC], tl.int16)"
_LOOP = "for start in tl.range(begin_of_columns, end_of_columns, BC, num_stages=STAGES):"
# Rows m of the results, from ``top``, before ``last``; and rows ``to``, from ``to_top``, before
# ``stop``, of what is padded along them.
_ROWS = [
    "top = tl.program_id(1) * BM",
    "to_top, last, real, stop = top, M, M, (M + 31) // 32 * 32",
    "full = stop",
]
_GROUPED_ROWS = [
    f"SUB: tl.constexpr = {groups.ALIGN} // BM  # tiles that cover a group's padding too",
    "place_ptr += tl.program_id(1) // SUB * 8  # see group_tile.located",
    "group, first, last = tl.load(place_ptr), tl.load(place_ptr + 1), tl.load(place_ptr + 2)",
    "index, begin = tl.load(place_ptr + 3), tl.load(place_ptr + 4)",
    "index = index * SUB + tl.program_id(1) % SUB",
    "top, to_top = first + index * BM, begin + index * BM",
    "real = tl.where(group < E, last, 0)  # rows past the last group are zeros where it is padded",
    f"stop = begin + tl.cdiv(last - first, {groups.ALIGN}) * {groups.ALIGN}",
    "stop = tl.where(group < E, stop, TP)",
    "full = begin + tl.cdiv(last - first, 32) * 32  # zeros follow, under a NaN scale too",
]
# Programs past the last row have nothing to do.
_SKIP = ["if (top >= last) & (to_top >= stop):", "    end_of_columns = begin_of_columns"]
# The logical index of every element of a copy, by its rows r and columns c as the result lies.
_INDEX = {
    "n": "(e * M + {r}).to({index}) * C + {c}.to({index})",
    "t": "(e * C + {c}).to({index}) * M + {r}.to({index})",
    "h": "(e * C + {c}).to({index}) * ((M + 15) // 16 * 16) + {r}.to({index})",
    "g": "{c}.to({index}) * TP + {r}.to({index})",
    "gh": "{c}.to({index}) * TP + {r}.to({index})",
}
_PLACE = {
    "n": "e * M + m, m < last, c, (C + 31) // 32 * 32",
    "t": "e * stop + to, to < stop, c, C",
    "g": "to, to < stop, c, C",
}


def _form(i: int, form: Form, program: pointwise.Program, index: str, grouped: bool) -> list[str]:
    """Lines that make and store one copy."""
    seed = "0, 0, False" if form.draw is None else f"seed, draw{i}, True"
    if form.way in TRANSFORMED:
        return _transformed(i, form, program, index, seed)
    blocks = f"{form.rows}, {form.size}" if form.way == "n" else f"{form.size}, {form.rows}"
    tile = f"x[{form.result}]"
    if form.size == 32:
        how = f"{fp8.MAX[E4M3]}, {mx.EXPONENT[E4M3]}, {form.how == 'floor'}"
        made = f"wide_tile.mxfp8({tile}, {how}, {blocks}, NATIVE)"
    else:
        r = "to[:, None]" if form.way == "g" else "m[:, None]"
        # Of each element, or along rows of the first of eight.
        c = "eight[None, :]" if form.way == "n" else "c[None, :]"
        at = _INDEX[form.way].format(r=r, c=c, index=index)
        made = f"wide_tile.nvfp4({tile}, amax{i}, {at}, {seed}, {blocks}, NATIVE)"
    even = "False" if grouped and form.way == "n" else "EVEN"
    store = [_store(i, made, form.way, even)]
    return _unless_padding(store, [_store(i, _ZEROS, "g")]) if form.way == "g" else store


def _store(i: int, tile: str, way: str, even: str = "EVEN") -> str:
    return f"wide_tile.store(w{i}_ptr, {tile}, {_PLACE[way]}, {even})"


def _unless_padding(lines: list[str], zeros: list[str]) -> list[str]:
    """The lines, but others where a tile is padding, whose scale may be NaN."""
    real = ["if (group < E) & (to_top < full):", *(f"    {line}" for line in lines)]
    return [*real, "else:", *(f"    {line}" for line in zeros)]


def _transformed(
    i: int, form: Form, program: pointwise.Program, index: str, seed: str
) -> list[str]:
    """Lines that make and store a copy after the Hadamard transform, run by run."""
    tile = _produce(program, "run.to(tl.int64) + k", "real - run > k")
    at = _INDEX[form.way].format(r="to_run[:, None]", c="c[None, :]", index=index)
    return [
        f"rows{i} = ()",
        "run = top + tl.arange(0, BM // 16) * 16",
        "for k in tl.static_range(16):",
        f"    rows{i} = rows{i} + ({tile}[{form.result}],)",
        f"rows{i} = hadamard.transformed(rows{i}, {hadamard.SIGNS})",
        "to_run = to_top + tl.arange(0, BM // 16) * 16",
        f"wide_tile.store_transformed(w{i}_ptr + e * stop * C, rows{i}, amax{i}, {at}, {seed}, "
        "to_run, stop, c, C, NATIVE, EVEN)",
    ]


def _produce(program: pointwise.Program, m: str, here: str) -> str:
    return f"produce({', '.join(tile_source.pointers(program))}, {m}, {here}, c, C)"
