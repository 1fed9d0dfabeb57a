"""What happened to every GEMM, and why: rows that a program and a person can read."""

from collections import Counter
from dataclasses import dataclass, field
from io import StringIO
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from lpcompile.cost import Estimate
from lpcompile.recipes import Product


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
        for key, count in Counter(map(_shown, self.rows)).items():
            times = f" (x{count})" if count > 1 else ""
            table.add_row(key[0] + times, *key[1:])
        out = StringIO()
        console = Console(file=out, width=140, color_system=None)
        console.print(table)
        if self.saved_bytes is not None:
            before, after = self.saved_bytes
            console.print(
                f"saved for the backward, weights not counted: {before / 2**20:.1f} MiB in bf16, "
                f"{after / 2**20:.1f} MiB rewritten"
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


def _shown(row: Row) -> tuple[str, ...]:
    """A row as the table shows it: the blocks of a model, alike but for their number, share one."""
    parts = ["*" if p.isdigit() else p for p in row.module.split(".")]
    sizes = ("?" if s is None else str(s) for s in (row.m, row.n, row.k))
    groups = str(row.num_groups) if row.num_groups > 1 else ""
    return (".".join(parts) or "(root)", row.product, *sizes, groups, row.recipe, row.reason)
