"""Train one model in bf16 and under recipes, and print what differs: what the examples share."""

import argparse
import math
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import corpus
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from training import LAP, Plan, Run, Size, Variant, train

import lpcompile


def arguments(
    about: str | None, sizes: dict[str, Size], argv: list[str] | None
) -> argparse.Namespace:
    """What the command line says; ``size`` is one of the sizes."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", default="fp8_rowwise", help="a recipe's name, or several with commas between")
    add("--steps", type=int, help="training steps (default: the size's own)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--size", choices=sizes, help="the model (default: tiny on a CPU, small on a GPU)")
    add("--corpus", default="stdlib", help="stdlib, all (every installed package), or a folder")
    add("--seed", type=int, default=0, help="of the weights and of the order of the data")
    add("--codegen", choices=["inductor", "eager"], default="inductor", help="as in lpcompile")
    add("--out", type=Path, help="keep checkpoints, losses and loss.png in this folder")
    add("--minutes", type=float, default=math.inf, help="stop training after so long (with --out)")
    args = parser.parse_args(argv)
    try:
        for recipe in args.recipe.split(","):
            lpcompile.Options(recipe=recipe)
    except lpcompile.LowPrecisionError as error:  # now, and not after the runs before it
        parser.error(f"--recipe: {error}")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps is at least 1, got {args.steps}")
    if args.minutes < math.inf and not args.out:
        parser.error("--minutes needs --out, where the runs are kept to go on with")
    args.size = sizes[args.size or ("small" if args.device == "cuda" else "tiny")]
    return args


def plan_of(args: argparse.Namespace, console: Console) -> Plan:
    """The plan of every run; without a C++ compiler it generates no code."""
    codegen = args.codegen
    if codegen == "inductor" and not has_compiler():
        console.print(
            "No C++ compiler with Python's headers here: running codegen='eager', which rewrites "
            "the same GEMMs and runs the graph op by op. bf16 then runs uncompiled."
        )
        codegen = "eager"
    return args.size.plan(args.device, codegen, args.steps)


def has_compiler() -> bool:
    """Whether Inductor can build what it generates: a C++ compiler and Python's headers."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return (Path(sysconfig.get_path("include")) / "Python.h").exists()


def compare(args: argparse.Namespace, plan: Plan, console: Console) -> dict[str, Run]:
    """Report, train and compare; the runs by name, those that a deadline left unfinished too."""
    reports = {recipe: explain(plan, recipe) for recipe in args.recipe.split(",")}
    first = next(iter(reports.values()))
    console.print(str(replace(first, saved_bytes=None)), markup=False, soft_wrap=True)

    text = corpus.load(args.corpus)
    console.print(f"{args.corpus}: {text}", soft_wrap=True)
    runs = train_all(args, plan, text, console)
    if not are_finished(runs):
        console.print(f"Stopped after {args.minutes} minutes: the same command goes on from here.")
        return runs

    console.print(differences(runs))
    for recipe, report in reports.items():
        before, after = report.saved_bytes
        console.print(
            f"Saved for the backward of a step, weights not counted: {before / 2**20:.1f} MiB in "
            f"bf16, {after / 2**20:.1f} MiB in {recipe} ({after / before:.2f}x)",
            soft_wrap=True,
        )
    console.print(costs(runs, plan), soft_wrap=True)
    return runs


def are_finished(runs: dict[str, Run]) -> bool:
    return all(run.is_finished for run in runs.values())


def explain(plan: Plan, recipe: str) -> lpcompile.Report:
    """What becomes of every GEMM of the model that is trained here."""
    model = plan.shape.build().to(plan.device)
    tokens = torch.zeros(plan.batch, plan.shape.context, dtype=torch.long, device=plan.device)
    with torch.autocast(plan.device, torch.bfloat16):
        return lpcompile.explain(model, tokens, tokens, recipe=recipe, options={"rewrite": "all"})


def train_all(
    args: argparse.Namespace, plan: Plan, text: corpus.Corpus, console: Console
) -> dict[str, Run]:
    """bf16, each recipe from the same seed, then bf16 from another; a bar for each."""
    variants = {name: Variant(name, name, args.seed) for name in args.recipe.split(",")}
    bf16 = Variant("bf16", None, args.seed)
    variants = {"bf16": bf16, **variants, "bf16, other seed": replace(bf16, seed=args.seed + 1)}
    deadline = time.monotonic() + 60 * args.minutes
    runs: dict[str, Run] = {}
    columns = (
        TextColumn("{task.description:18}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    with Progress(*columns, console=console) as progress:
        for name, variant in variants.items():
            bar = progress.add_task(name, total=plan.steps, losses="compiling")

            def on_lap(run: Run, bar=bar) -> None:
                losses = both_losses(run, runs.get("bf16"))
                progress.update(bar, completed=len(run.losses), losses=losses)

            runs[name] = train(variant, plan, text, on_lap, args.out, deadline)
    return runs


def both_losses(run: Run, bf16: Run | None) -> str:
    """The loss of the last few steps, beside bf16's of the same steps."""
    step = len(run.losses)
    if not step:
        return "compiling"
    loss, base = (
        sum(r.losses[max(0, step - LAP) : step]) / min(LAP, step) for r in (run, bf16 or run)
    )
    return f"loss {loss:.4f}" if bf16 is None else f"loss {loss:.4f}, bf16 {base:.4f}"


def differences(runs: dict[str, Run]) -> Table:
    """Each run's losses, and how far they are from bf16's."""
    table = Table("", "training loss", "difference", "validation loss", "difference")
    bf16 = runs["bf16"]
    for name, run in runs.items():
        table.add_row(
            name,
            f"{run.tail:.4f}",
            "" if run is bf16 else f"{run.tail / bf16.tail - 1:+.2%}",
            f"{run.validation:.4f}",
            "" if run is bf16 else f"{run.validation / bf16.validation - 1:+.2%}",
        )
    table.caption = (
        f"training loss: mean of the last {max(1, len(bf16.losses) // 10)} steps, nats per byte"
    )
    return table


def costs(runs: dict[str, Run], plan: Plan) -> Table | str:
    """Tokens a second and peak memory on a GPU; on a CPU, why there are none."""
    if plan.device != "cuda":
        return (
            "The formats are emulated on a CPU: the same quantized bits as on a GPU, computed "
            "with fp32 arithmetic. So no speed is given here."
        )
    table = Table("", "tokens/s", "peak memory", title=torch.cuda.get_device_name())
    for name, run in runs.items():
        table.add_row(name, f"{run.tokens_per_second:,.0f}", f"{run.peak_bytes / 2**30:.2f} GiB")
    return table


def plot(runs: dict[str, Run], path: Path) -> str:
    """Draw the losses, smoothed, and their distance from bf16's; say where."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "No loss.png: matplotlib is not installed (pip install 'lpcompile[inspect]')."
    figure = Figure(figsize=(9, 7), layout="tight")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[2, 1])
    width = max(1, len(runs["bf16"].losses) // 50)
    curves = {name: smooth(run.losses, width) for name, run in runs.items()}
    for i, (name, curve) in enumerate(curves.items()):
        top.plot(curve, label=name, linewidth=1, color=f"C{i}")
        if name != "bf16":
            bottom.plot(curve - curves["bf16"], linewidth=1, color=f"C{i}")
    top.set(ylabel="training loss, nats per byte")
    bottom.set(xlabel=f"step (mean of {width})", ylabel="minus bf16")
    bottom.axhline(0, color="black", linewidth=0.5)
    top.legend()
    figure.savefig(path, dpi=120)
    return f"Wrote {path}"


def smooth(losses: list[float], width: int) -> torch.Tensor:
    """The mean of each ``width`` losses in a row."""
    return torch.tensor(losses).unfold(0, width, 1).mean(1)
