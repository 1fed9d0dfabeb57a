"""Narrow a tensor and take its maximum in one op: two ops of x become one.

    amax = amax_tensor(x); quantize_fp8_tensor(x, amax)  ->  quantize_fp8_whole(x)

Of small matrices, as the weights of experts are, the op reads x from memory once. After ``fuse``,
which takes tensors that are narrowed more than once and those that are made as they are narrowed.
"""

import operator
from functools import partial
from typing import Any

from torch import fx

from lpcompile import ops
from lpcompile.graph import call, calls


def run(graph: fx.Graph) -> int:
    """Merge what is left, and return how many quantizes were merged."""
    count = 0
    for quantize in calls(graph, {ops.quantize_fp8_tensor.op}):
        x, amax, *how = quantize.args
        if amax.target is ops.amax_tensor.op and amax.args[0] is x:  # type: ignore[union-attr]
            _replace(graph, quantize, amax, how)
            count += 1
    return count


def _replace(graph: fx.Graph, quantize: fx.Node, amax: Any, how: list[Any]) -> None:
    """One op where the maximum was taken."""
    make = partial(call, graph)
    with graph.inserting_before(amax):
        made = make(ops.quantize_fp8_whole.op, amax.args[0], *how)
        maximum = make(operator.getitem, made, 2)
    quantize.replace_all_uses_with(made)
    amax.replace_all_uses_with(maximum)
    graph.erase_node(quantize)
    graph.erase_node(amax)
    for item in list(made.users):
        if item is not maximum:
            maximum.append(item)
