"""What runs of convergence.py left, compared: Markdown tables and pictures from saved curves.

    python examples/curves.py docs/convergence.json

prints the tables of docs/convergence.md and draws the pictures beside the file. A run is compared
with the bf16 run of its own seed, which started from the same weights and saw the same bytes in the
same order, so that what they have in common cancels. Two bf16 runs of different seeds share
neither: how far they are apart is the noise band.
"""

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from training import LAP

BASE = "bf16"

# How far above bf16's validation loss each may end, as a share of it.
TARGETS = {
    "fp8_rowwise": 0.003,
    "fp8_tensorwise": 0.003,
    "fp8_blockwise": 0.003,
    "mxfp8": 0.003,
    "nvfp4": 0.015,
    "nvfp4_last_blocks_bf16": 0.010,
    "nvfp4_ending_fprop_bf16": 0.010,
}


@dataclass(frozen=True)
class Curve:
    """One run: losses in nats per byte."""

    name: str
    seed: int
    training: list[float]  # the mean of each LAP steps
    validations: list[float]  # after each validate_every steps
    validation: float | None  # at the end; None: the run was cut


@dataclass(frozen=True)
class Curves:
    """The runs of one comparison, and what they share."""

    about: dict[str, object]  # machine, steps, tokens a step, validate_every, bytes
    runs: list[Curve] = field(default_factory=list)

    def base(self, curve: Curve) -> Curve | None:
        """The bf16 run of the same seed, unless this is it."""
        alike = (c for c in self.runs if (c.name, c.seed) == (BASE, curve.seed))
        return None if curve.name == BASE else next(alike, None)

    @property
    def band(self) -> float | None:
        """How far the first two bf16 seeds are apart at the end, as a share."""
        ends = [c.validation for c in self.runs if c.name == BASE and c.validation is not None]
        return abs(ends[1] / ends[0] - 1) if len(ends) > 1 else None

    def tokens(self, num_validations: int) -> float:
        """Tokens seen by then."""
        return num_validations * self.about["validate_every"] * self.about["tokens a step"]


def collect(folder: Path) -> Curves:
    """The curves of the runs in a folder, whether they came to their end or not."""
    about: dict[str, object] = {}
    runs = []
    for path in sorted(folder.glob("*-seed*.json")):
        record = json.loads(path.read_text())
        plan, run = record["identity"]["plan"], record["run"]
        about = {
            "machine": record["machine"],
            "steps": plan["steps"],
            "tokens a step": plan["batch"] * plan["shape"]["context"],
            "validate_every": plan["validate_every"],
            "bytes": record["identity"]["bytes"],
        }
        losses = run["losses"]
        runs.append(
            Curve(
                name=run["name"],
                seed=int(path.stem.rpartition("-seed")[2]),
                training=[round(mean(losses[i : i + LAP]), 5) for i in range(0, len(losses), LAP)],
                validations=[round(v, 6) for v in run["validations"]],
                validation=run["validation"] and round(run["validation"], 6),
            )
        )
    if not runs:
        raise ValueError(f"{folder} holds no run of convergence.py")
    return Curves(about, runs)


def write(curves: Curves, path: Path) -> None:
    lines = ",\n".join(json.dumps(vars(curve)) for curve in curves.runs)
    path.write_text(f'{{"about": {json.dumps(curves.about)},\n"runs": [\n{lines}\n]}}\n')


def read(path: Path) -> Curves:
    record = json.loads(path.read_text())
    return Curves(record["about"], [Curve(**run) for run in record["runs"]])


def above(curve: Curve, base: Curve) -> float:
    """How far the validation loss is above bf16's, as a share: at the end, or where one was cut."""
    if curve.validation is not None and base.validation is not None:
        return curve.validation / base.validation - 1
    at = min(len(curve.validations), len(base.validations)) - 1
    return curve.validations[at] / base.validations[at] - 1 if at >= 0 else math.nan


def paired(curve: Curve, base: Curve) -> tuple[float, float]:
    """The mean difference of the training losses of the last tenth of the steps that both took, and
    its standard error, as shares of bf16's. Every batch is new to both, and the same."""
    both = min(len(curve.training), len(base.training))
    last = slice(max(0, both - max(2, both // 10)), both)
    ours, theirs = curve.training[last], base.training[last]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(differences) < 2:
        return math.nan, math.nan
    error = stdev(differences) / math.sqrt(len(differences))
    return mean(differences) / mean(theirs), error / mean(theirs)


def verdict(curve: Curve, difference: float, band: float | None) -> str:
    """Whether a run ended as near to bf16 as it should."""
    target = TARGETS.get(curve.name)
    if target is None or math.isnan(difference):
        return ""
    asked = f"{target:.1%}"
    if difference <= target:
        return f"within {asked}"
    if band is not None and difference <= band:
        return f"above {asked}, inside the band"
    return f"**above {asked}**"


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def share(difference: float) -> str:
    return "" if math.isnan(difference) else f"{difference:+.2%}"


def ends(curves: Curves) -> list[str]:
    """A row a run: where it ended, and how far from bf16."""
    head = ("run", "seed", "validation loss", "above bf16", "training, last tenth", "target")
    lines = [row(*head), row(*["---"] * len(head))]
    for c in curves.runs:
        base = curves.base(c)
        cells = ["", "", ""]
        if base:
            difference, (tail, error) = above(c, base), paired(c, base)
            cells = [share(difference), share(tail) and f"{share(tail)} ± {error:.2%}"]
            cells.append(verdict(c, difference, curves.band))
        cut = f"cut after {len(c.training) * LAP} steps"
        loss = cut if c.validation is None else f"{c.validation:.4f}"
        lines.append(row(c.name, str(c.seed), loss, *cells))
    if curves.band is not None:
        lines += ["", f"Two bf16 runs of different seeds end {curves.band:.2%} apart."]
    return lines


def course(curves: Curves, num_marks: int = 5) -> list[str]:
    """A row a run: how far its validation loss was above bf16's, on the way."""
    longest = max(len(c.validations) for c in curves.runs)
    marks = sorted({round(longest * (i + 1) / num_marks) for i in range(num_marks)} - {0})
    head = [f"{curves.tokens(m) / 1e6:.3g}M tokens" for m in marks]
    lines = [row("run", "seed", *head), row(*["---"] * (2 + len(marks)))]
    for c in curves.runs:
        base = curves.base(c)
        if base:
            both = min(len(c.validations), len(base.validations))
            cells = [
                share(c.validations[m - 1] / base.validations[m - 1] - 1) if m <= both else ""
                for m in marks
            ]
            lines.append(row(c.name, str(c.seed), *cells))
    return lines


def tables(curves: Curves) -> str:
    return "\n".join([*ends(curves), "", *course(curves)])


def draw(curves: Curves, path: Path) -> list[Path]:
    """A picture of the 8-bit recipes and one of the 4-bit ones; none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    made = []
    for family, is_in in (("8bit", is_8bit), ("4bit", lambda name: not is_8bit(name))):
        chosen = [c for c in curves.runs if c.name == BASE or is_in(c.name)]
        if all(c.name == BASE for c in chosen):
            continue
        figure = Figure(figsize=(9, 8), layout="tight")
        top, bottom = figure.subplots(2, sharex=True)
        for i, c in enumerate(chosen):
            style = {"color": f"C{i}", "linewidth": 1, "linestyle": "--" if c.seed else "-"}
            label = f"{c.name}, seed {c.seed}"
            at = [curves.tokens(m + 1) / 1e6 for m in range(len(c.validations))]
            top.plot(at, c.validations, label=label, **style)
            base = curves.base(c)
            if base:
                shares = [
                    100 * (a / b - 1) for a, b in zip(c.validations, base.validations, strict=False)
                ]
                bottom.plot(at[: len(shares)], shares, label=label, **style)
        if curves.band is not None:
            bottom.axhspan(-100 * curves.band, 100 * curves.band, color="0.9", label="noise band")
        bottom.axhline(0, color="black", linewidth=0.5)
        bottom.set(xlabel="million tokens", ylabel="above bf16, %")
        top.set(ylabel="validation loss, nats per byte")
        for axis in (top, bottom):
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
        made.append(path.with_name(f"{path.stem}_{family}.png"))
        figure.savefig(made[-1], dpi=80)
    return made


def is_8bit(name: str) -> bool:
    return not name.startswith("nvfp4")


def main(argv: list[str] | None = None) -> Curves:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="curves.json, or the folder of the runs")
    path = parser.parse_args(argv).path
    if not path.exists():
        parser.error(f"there is no {path}")
    curves = collect(path) if path.is_dir() else read(path)
    if path.is_dir():
        path /= "curves.json"
        write(curves, path)
    print(tables(curves))
    for picture in draw(curves, path):
        print(f"\nWrote {picture}")
    return curves


if __name__ == "__main__":
    main()
