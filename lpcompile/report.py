"""What happened to every GEMM, and why: rows that a program and a person can read."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import StringIO
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from lpcompile.cost import Estimate
from lpcompile.recipes import PRODUCTS, Product

_ORDER: dict[str, int] = {product: i for i, product in enumerate(PRODUCTS)}


class Row(NamedTuple):
    """One GEMM. m, n and k are those of its linear, None where they are not known to be fixed.

    module: path from the compiled module, without wrappers; empty for its own forward.
    num_groups: experts of a grouped GEMM, 1 otherwise.
    recipe: the recipe's name ("custom" for one that has none); "bf16" when left alone.
    reason: why it was left alone, or what was decided; never empty for a GEMM left alone.
    estimate: microseconds in bf16 and narrowed, on the target; None for a GEMM that was not to be
        narrowed, cannot be, or is of no fixed size.
    """

    module: str
    product: Product
    m: int | None
    n: int | None
    k: int | None
    num_groups: int
    recipe: str
    rewritten: bool
    reason: str
    estimate: Estimate | None = None


class SavedBytes(NamedTuple):
    """Bytes saved for the backward, weights not counted: in bf16, and as rewritten."""

    before: int
    after: int


@dataclass
class Report:
    """One row per GEMM, and the bytes saved for the backward.

    Those are None in inference, and in a model with nested compile regions.
    """

    rows: list[Row] = field(default_factory=list)
    saved_bytes: SavedBytes | None = None
    target: str = ""

    @property
    def num_rewritten(self) -> int:
        """GEMMs that were narrowed."""
        return sum(row.rewritten for row in self.rows)

    def summary(self) -> str:
        """One line: how many were narrowed to what, and why the others were not."""
        return summarize(self.rows)

    def __str__(self) -> str:
        table = Table(title=self.summary(), title_justify="left")
        for name in ("module", "product"):
            table.add_column(name, overflow="fold")
        for name in ("M", "N", "K", "E"):
            table.add_column(name, justify="right")
        table.add_column("recipe")
        table.add_column("reason", overflow="fold")
        for cells in _cells(self.rows):
            table.add_row(*cells)
        out = StringIO()
        console = Console(file=out, width=140, color_system=None)
        console.print(table)
        if self.saved_bytes is not None:
            before, after = map(_size, self.saved_bytes)
            console.print(
                f"saved for the backward, weights not counted: {before} in bf16, {after} rewritten"
            )
        return out.getvalue()


def summarize(rows: list[Row]) -> str:
    """``12 of 15 GEMMs narrowed (fp8_rowwise 12); left: 3 a router: ...``."""
    if not rows:
        return "no GEMM in this graph"
    done = Counter(r.recipe for r in rows if r.rewritten)
    left = Counter(r.reason for r in rows if not r.rewritten)
    recipes = ", ".join(f"{name} {count}" for name, count in done.most_common())
    text = f"{sum(done.values())} of {len(rows)} GEMMs narrowed"
    text += f" ({recipes})" if recipes else ""
    reasons = "; ".join(f"{count} {reason}" for reason, count in left.most_common())
    return f"{text}; left: {reasons}" if reasons else text


def _cells(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    """The table, linear by linear; those of blocks that are alike but for their numbers share a
    line: ``layers.0-26.w1 (x27)``.
    """
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in rows:
        alike[_shown(row)].append(row.module)
    linears = {path: i for i, path in enumerate(dict.fromkeys(key[0] for key in alike))}

    def place(key: tuple[str, ...]) -> tuple[int, int, list[int]]:
        return linears[key[0]], _ORDER[key[1]], min(map(_numbers, alike[key]))

    for key in sorted(alike, key=place):
        modules = alike[key]
        times = f" (x{len(modules)})" if len(modules) > 1 else ""
        yield ((_together(modules) or "(root)") + times, *key[1:])


def _numbers(path: str) -> list[int]:
    return [int(part) for part in path.split(".") if part.isdigit()]


def _shown(row: Row) -> tuple[str, ...]:
    """A row as the table shows it, with the same path for every block of a model."""
    path = ".".join("*" if p.isdigit() else p for p in row.module.split("."))
    sizes = ("?" if s is None else str(s) for s in (row.m, row.n, row.k))
    groups, reason = str(row.num_groups) if row.num_groups > 1 else "", row.reason
    if row.estimate is not None and not row.rewritten:
        bf16, narrowed = row.estimate.bf16_us, row.estimate.lowprec_us
        reason += f": {bf16:.0f} us in bf16, {narrowed:.0f} us narrowed"
    return (path, row.product, *sizes, groups, row.recipe, reason)


def _together(modules: list[str]) -> str:
    """One path for modules that differ in numbers alone: all that its ranges name, or stars."""
    parts = list(zip(*(path.split(".") for path in modules), strict=True))
    if math.prod(len(set(p)) for p in parts) != len(set(modules)):
        return ".".join(p[0] if len(set(p)) == 1 else "*" for p in parts)
    return ".".join(map(_either, parts))


def _either(parts: tuple[str, ...]) -> str:
    """One name, or numbers: ``0-3,7``."""
    if not parts[0].isdigit():
        return parts[0]
    runs: list[list[int]] = []
    for number in sorted({int(p) for p in parts}):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _size(num_bytes: int) -> str:
    small = num_bytes < 2**20
    return f"{num_bytes / 2**10:.1f} KiB" if small else f"{num_bytes / 2**20:.1f} MiB"
