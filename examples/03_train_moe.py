"""Train a small mixture-of-experts GPT in bf16 and in low precision, and compare.

    python examples/03_train_moe.py
    python examples/03_train_moe.py --recipe fp8_tensorwise,fp8_blockwise --steps 300
    python examples/03_train_moe.py --size small --corpus all --out runs

As 01_train_gpt.py does for a dense model: the same text in the same order. Grouped GEMMs of experts
are narrowed like linears; the router stays in bf16, as the report says, so that quantizing it does
not decide where tokens go. At the end stands how many tokens each expert had.
"""

from pathlib import Path

from comparison import are_finished, arguments, compare, plan_of, plot
from moe import MoEShape
from rich.console import Console
from rich.table import Table
from training import Run, Size

TINY = MoEShape(
    dim=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    hidden=128,
    context=128,
    num_experts=8,
    top_k=2,
    expert_hidden=128,
)
SMALL = MoEShape(
    dim=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    hidden=512,
    context=512,
    num_experts=32,
    top_k=4,
    expert_hidden=512,
)
SIZES = {
    "tiny": Size(TINY, batch=16, steps=120, learning_rate=1e-3),
    "small": Size(SMALL, batch=32, steps=1000, learning_rate=1e-3),
}


def main(argv: list[str] | None = None) -> dict[str, Run]:
    """The whole comparison; the runs by name, those that a deadline left unfinished too."""
    args = arguments(__doc__, SIZES, argv)
    console = Console(highlight=False)
    runs = compare(args, plan_of(args, console), console)
    if are_finished(runs):
        console.print(loads(runs))
        console.print(plot(runs, (args.out or Path()) / "loss.png"), soft_wrap=True)
    return runs


def loads(runs: dict[str, Run]) -> Table:
    """What share of the validation's tokens each expert had, in each layer of each run."""
    table = Table("", "layer", "least", "most", "each expert's share of the load, %")
    for name, run in runs.items():
        for layer, counts in enumerate(run.loads):
            shares = [100 * count / sum(counts) for count in counts]
            each = " ".join(f"{share:.0f}" for share in shares)
            table.add_row(name, str(layer), f"{min(shares):.1f}", f"{max(shares):.1f}", each)
            name = ""
        table.add_section()
    return table


if __name__ == "__main__":
    main()
