"""Train a small GPT in bf16 and in low precision, from one seed on one order of data, and compare.

    python examples/01_train_gpt.py
    python examples/01_train_gpt.py --recipe fp8_tensorwise --steps 500
    python examples/01_train_gpt.py --size medium --corpus all --recipe fp8_rowwise,mxfp8 --out runs

The text is the Python source installed on this machine, as bytes. The second bf16 run, from another
seed, tells how large a difference means nothing. With --out, a run that was interrupted goes on
where it was, and runs that finished are not repeated.
"""

import time
from pathlib import Path

import before_after
import torch
from comparison import are_finished, arguments, compare, plan_of, plot
from gpt import GPT, LLAMA3_8B
from rich.console import Console
from training import SIZES, Run

import lpcompile


def main(argv: list[str] | None = None) -> dict[str, Run]:
    """The whole comparison; the runs by name, those that a deadline left unfinished too."""
    args = arguments(__doc__, SIZES, argv)
    console = Console(highlight=False)
    plan = plan_of(args, console)
    recipe = args.recipe.split(",")[0]

    console.print("One linear's three GEMMs, before and after:")
    for line in before_after.lines(recipe):
        console.print(line, markup=False, soft_wrap=True)

    runs = compare(args, plan, console)
    if are_finished(runs):
        explain_llama(recipe, console)
        console.print(plot(runs, (args.out or Path()) / "loss.png"), soft_wrap=True)
    return runs


def explain_llama(recipe: str, console: Console) -> None:
    """The same of a Llama3-8B, which needs neither its weights nor a GPU."""
    start = time.perf_counter()
    with torch.device("meta"):
        model = GPT(LLAMA3_8B).bfloat16()
        tokens = torch.zeros(2, LLAMA3_8B.context, dtype=torch.long)
    report = lpcompile.explain(model, tokens, tokens, recipe=recipe, options={"target": "h200"})
    seconds = time.perf_counter() - start
    console.print(f"A Llama3-8B on 2 x 8192 tokens, on no device at all, in {seconds:.0f} s:")
    console.print(str(report), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
