"""The result of a benchmark, and how it is shown: a terminal table, JSON, a page of Markdown."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lpcompile.errors import OptionError

Row = dict[str, Any]

# How a column's numbers are written, by the end of its name; three significant digits otherwise.
_FORMATS = {
    "ms": "{:.3f}",
    "us": "{:.1f}",
    "speedup": "{:.2f}x",
    "ratio": "{:.2f}x",
    "share": "{:.0%}",
    "spread": "{:.1%}",
    "TFLOP/s": "{:.0f}",
    "TB/s": "{:.2f}",
    "GiB": "{:.2f}",
    "error": "{:.4f}",
    "tokens/s": "{:.0f}",
    "compile s": "{:.1f}",
}


@dataclass
class Result:
    """A table: rows of equal columns, what they were measured on, and how to measure them again."""

    benchmark: str
    command: str
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """Every column that some row has, in the order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    @property
    def failed(self) -> bool:
        """Whether a row stands for something that did not run."""
        return any("failed" in row for row in self.rows)


def cell(column: str, value: Any) -> str:
    """A value as tables show it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    pattern = next((p for end, p in _FORMATS.items() if column.endswith(end)), "{:.3g}")
    return pattern.format(value)


def show(result: Result, console: Console | None = None) -> None:
    """Print the table, its notes and what it was measured on."""
    console = console or Console(width=None if Console().is_terminal else 200)
    table = Table(title=result.benchmark, title_justify="left")
    for column in result.columns:
        numeric = any(isinstance(row.get(column), int | float) for row in result.rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in result.rows:
        table.add_row(*(cell(c, row.get(c)) for c in result.columns))
    console.print(table)
    for note in result.notes:
        console.print(note, markup=False, highlight=False)
    console.print(on(result), style="dim", markup=False, highlight=False)


def on(result: Result) -> str:
    """One line: what the numbers were measured on."""
    return ", ".join(f"{name} {value}" for name, value in result.machine.items())


def save(results: list[Result], path: Path) -> None:
    """Write the results as JSON."""
    path.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


def load(paths: Iterable[Path]) -> list[Result]:
    """The results in JSON files that ``save`` wrote."""
    results = []
    for path in paths:
        try:
            saved = json.loads(path.read_text())
            if not isinstance(saved, list):
                raise TypeError(f"a {type(saved).__name__}")
            results += [Result(**r) for r in saved]
        except (OSError, TypeError, ValueError) as error:
            raise OptionError(
                f"{path} holds no benchmark results ({error}): make one with "
                "python -m lpcompile bench ffn --json out.json"
            ) from error
    return results


def markdown(results: list[Result]) -> str:
    """A page of tables, each under the command that made it."""
    parts = ["# Benchmarks\n"]
    for result in results:
        columns = result.columns
        lines = [
            f"## {result.benchmark}\n",
            f"`{result.command}`\n",
            f"{on(result)}\n",
            _line(columns),
            _line("---" for _ in columns),
            *(_line(cell(c, row.get(c)) for c in columns) for row in result.rows),
            "",
            *(f"{note}\n" for note in result.notes),
        ]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(c.replace('|', '/') for c in cells)} |"
