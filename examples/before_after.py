"""One linear's three GEMMs as the compiler has them, before and after the rewrite: 8 lines.

The lines are read off the joint graph of forward and backward, through an option of Inductor's
that hands its graph to a function: nothing here knows what a recipe does.
"""

from collections.abc import Callable, Iterator

import torch
from torch import fx, nn

M, N, K = 64, 48, 32  # all different, so that a tensor's shape tells its name
NAMES = {(M, K): "X", (N, K): "W", (M, N): "dY"}
OUTPUTS = {(M, N): "Y", (M, K): "dX", (N, K): "dW"}


def lines(recipe: str) -> list[str]:
    """The three GEMMs in bf16, then under the recipe."""
    found = []
    for name in ("bf16", recipe):
        products = gemms(name)
        found += [name, *(f"  {made:2} = {products[made]}" for made in OUTPUTS.values())]
    return found


def gemms(recipe: str) -> dict[str, str]:
    """How Y, dX and dW of one linear are computed when it is compiled under the recipe."""
    found: dict[str, str] = {}
    options = {
        "recipe": recipe,
        "rewrite": "all",
        "codegen": "eager",
        "joint_custom_post_pass": read_into(found),
    }
    linear = nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    x = torch.randn(M, K, dtype=torch.bfloat16, requires_grad=True)
    torch.compile(linear, backend="lowprec", fullgraph=True, options=options)(x).sum().backward()
    return found


def read_into(found: dict[str, str]) -> Callable[[fx.Graph], None]:
    """A pass that changes nothing and notes how each output of the graph is computed."""

    def read(graph: fx.Graph) -> None:
        for node in graph.output_node().all_input_nodes:
            found[OUTPUTS[tuple(node.meta["val"].shape)]] = spell(node)

    return read


def spell(node: fx.Node) -> str:
    """The expression that computes a node, its tensors named as the textbook does."""
    if node.op == "placeholder":
        return NAMES[tuple(node.meta["val"].shape)]
    name = node.target.__name__.partition(".")[0]
    if name == "getitem":  # values and scales of one quantize, which is named once
        return spell(node.args[0])
    arguments = list(dict.fromkeys(map(spell, tensors(node))))
    if name == "permute":
        (of,) = arguments
        return of.removesuffix(".T") if of.endswith(".T") else f"{of}.T"
    return f"{name}({', '.join(arguments)})"


def tensors(node: fx.Node) -> Iterator[fx.Node]:
    return (argument for argument in node.args if isinstance(argument, fx.Node))
