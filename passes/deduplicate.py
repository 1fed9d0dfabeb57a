"""Merge equal quantizes in graphs that AOTAutograd does not: those of inference and no_grad.

With a backward, AOT's own CSE runs in the partitioner, after the joint passes, and merges the
quantizes that w1 and w3 make of one x. Without one no partitioner runs (torch 2.11 to 2.13). What
the caller gets stays apart: two copies of x are two tensors, of which he may write to one.
"""

import operator

from torch import fx

from lpcompile.graph import is_own, is_view


def run(graph: fx.Graph) -> int:
    """Merge equal calls of lpcompile's ops, and of views before them; return how many fell away."""
    seen: dict[tuple[object, ...], fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        part = node.target is operator.getitem and is_own(node.all_input_nodes[0])
        if not (is_own(node) or part or is_view(node)) or _is_returned(node):
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            count += 1
    return count


def _is_returned(node: fx.Node) -> bool:
    """Whether the caller gets a node, a part of it, or a view."""
    return any(
        u.op == "output" or ((is_view(u) or u.target is operator.getitem) and _is_returned(u))
        for u in node.users
    )
