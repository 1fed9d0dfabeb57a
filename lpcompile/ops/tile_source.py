"""Lines of Triton source that all generated kernels are put together of.

The tile's producer is ``pointwise.to_triton``. Kernels that are grouped cut their tiles inside
groups of rows, found on the device, the rows past the last group being one more. Rows past the end
of a tile's group are its last row again, which changes no maximum and needs no mask.
"""

from lpcompile.ops import pointwise

TRITON = {"e4m3": "tl.float8e4nv", "e5m2": "tl.float8e5"}
_LOADS = {
    "full": "tl.load(i{0}_ptr + at{1})",
    "wide": "tl.load(i{0}_ptr + m[:, None].to(tl.int64) * i{0}_stride + c[None, :]{1})",
    "row": "tl.load(i{0}_ptr + m{2})[:, None]",
    "column": "tl.load(i{0}_ptr + c{3})[None, :]",
    "scalar": "tl.load(i{0}_ptr)",
}
# A tile's group; of the tiles past the last group, the rows past it.
LOCATE = [
    "starts, ends = groups.load(offs_ptr, E, EP)",
    "group, first, last, index, begin = groups.locate(tile, starts, ends, {tile}, {align}, EP)",
]
REST = "first, last = groups.rest(group, first, last, ends, E, M)"
# What every kernel takes of sizes, plain and grouped.
SIZES = {False: ["M", "C"], True: ["offs_ptr", "M", "C", "E"]}
TILE = {
    False: ["BM: tl.constexpr", "BC: tl.constexpr"],
    True: ["BM: tl.constexpr", "BC: tl.constexpr", "EP: tl.constexpr"],
}


def module(program: str, wanted: tuple[str, ...], kernel: str) -> str:
    """The source of a module: what is computed, what is wanted of it, and the kernel."""
    doc = '"""' + program + "\n\n" + "\n".join(wanted) + '\n"""'
    imports = "import triton\nimport triton.language as tl\n\n"
    imports += "from lpcompile.ops import fp8, groups, pointwise, turned"
    return "\n\n".join([doc, imports, kernel]) + "\n"


def tile(program: pointwise.Program, even: bool, rounded: bool, rows: str = "m < M") -> list[str]:
    """Lines that load a tile's inputs and compute its results.

    rows: which m there are; empty where all are, so that only columns are masked.
    """
    masks = ("", "", "")
    lines = ["at = m[:, None].to(tl.int64) * C + c[None, :]"]
    if not even:
        lines.append(f"live = {f'({rows})[:, None] & ' if rows else ''}(c < C)[None, :]")
        of_rows = f", mask={rows}, other=0.0" if rows else ""
        masks = (", mask=live, other=0.0", of_rows, ", mask=c < C, other=0.0")
    for i, kind in enumerate(program.kinds):
        lines.append(f"i{i} = {_LOADS[kind].format(i, *masks)}")
    return lines + pointwise.to_triton(program, rounded)


def live(tile: str, even: bool) -> str:
    """A tile with zeros outside [M, C], where producers make anything of masked loads."""
    return tile if even else f"tl.where(live, {tile}, 0.0)"


def pointers(program: pointwise.Program) -> list[str]:
    """What a kernel takes for ``pointwise.arguments``."""
    names = []
    for i, kind in enumerate(program.kinds):
        names += [f"i{i}_ptr", f"i{i}_stride"] if kind == "wide" else [f"i{i}_ptr"]
    return names


def function(parameters: list[str], body: list[str]) -> str:
    """The source of a kernel."""
    typed = [f"{p}: tl.int32" if p in ("M", "C") else p for p in parameters]  # see fp8.narrow
    head = ["@triton.jit", "def kernel(", *(f"    {p}," for p in typed), "):"]
    return "\n".join([*head, *(f"    {line}" for line in body)])
