"""Merge equal quantizes in graphs that AOTAutograd does not: those of inference and no_grad.

With a backward, AOT's own CSE runs in the partitioner, after the joint passes, and merges the
quantizes that w1 and w3 make of one x. Without one no partitioner runs (torch 2.11 to 2.13).
"""

import operator

from torch import fx

from lpcompile.graph import TRANSPOSES, VIEWS, is_own


def run(graph: fx.Graph) -> int:
    """Merge equal calls of lpcompile's ops, and of views before them; return how many fell away."""
    seen: dict[tuple[object, ...], fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not (
            is_own(node)
            or node.target in VIEWS
            or node.target in TRANSPOSES
            or (node.target is operator.getitem and is_own(node.all_input_nodes[0]))
        ):
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            count += 1
    return count
