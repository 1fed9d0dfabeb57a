"""Read what the compiler did with a model: every graph before and after each pass, as Python.

python examples/02_read_a_dump.py --folder lpcompile_dump
"""

import argparse
import runpy
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import lpcompile


class FFN(nn.Module):
    """w2(silu(w1(x)) * w3(x)), as in Llama."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def main(folder: str = "lpcompile_dump", recipe: str = "fp8_rowwise") -> None:
    shutil.rmtree(folder, ignore_errors=True)

    # 1. Compile inside `dump`. Eager code generation needs no C++ compiler and has the same graphs;
    #    rewrite="all" because at this size no GEMM is worth narrowing.
    model = FFN(dim=64, hidden=192).bfloat16()
    options = {"recipe": recipe, "rewrite": "all", "codegen": "eager"}
    model.compile(backend="lowprec", options=options)
    x = torch.randn(4, 32, 64, dtype=torch.bfloat16, requires_grad=True)
    with lpcompile.dump(folder):
        model(x).sum().backward()

    # 2. One folder per graph, with an index.
    graph = Path(folder) / "graph_0"
    section("What was written", (graph / "index.txt").read_text())

    # 3. The three GEMMs of one linear, before and after.
    gemms = (graph / "gemms.txt").read_text().split("\n\n")
    section("The GEMMs of w1", "\n\n".join(g for g in gemms if g.startswith("w1 ")))

    # 4. What the forward keeps for the backward, narrowed and in bf16.
    section("What is saved for the backward", (graph / "saved.txt").read_text())

    # 5. Every graph is a program: it makes fake inputs, runs, and prints what comes out.
    for name in ("joint_0_traced.py", "joint_1_linear.py"):
        section(f"python {graph / name}")
        runpy.run_path(str(graph / name), run_name="__main__")


def section(title: str, text: str = "") -> None:
    """Print a text under a title."""
    print(f"\n== {title}\n\n{text.strip()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="lpcompile_dump")
    parser.add_argument("--recipe", default="fp8_rowwise", choices=sorted(lpcompile.RECIPES))
    main(**vars(parser.parse_args()))
