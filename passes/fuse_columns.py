"""Take the maxima of x's columns in the read that narrows x by rows: two ops of x become one.

    quantize_fp8_row(x, columns=amax_column(x))  ->  fused_quantize_row(x, columns=True)

What the backward narrows across the rows (W for dgrad, X for wgrad) it narrows under an amax that
the forward saves, a vector (``placement.keep_amax``). The weights of experts are stacks of
matrices, and tokens lie in groups, each with maxima of its own. Before ``fuse``, which takes what
is left.
"""

import operator
from functools import partial
from typing import Any

from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

from lpcompile import ops
from lpcompile.fusion import depend, is_whole
from lpcompile.graph import call, calls, shape
from lpcompile.ops.pointwise import IDENTITY
from lpcompile.placement import OF_COLUMNS


def run(graph: fx.Graph) -> int:
    """Merge what one read serves, and return how many quantizes were merged."""
    maxima = _maxima(graph)
    for quantize, amax in maxima.items():
        _replace(graph, quantize, amax)
    if maxima:
        stable_topological_sort(graph)
    return len(maxima)


def _maxima(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The amax that a quantize names, of the first of those that make the same of one tensor.

    Of two readers of x one may ask for maxima, and their quantizes differ in that.
    """
    made: dict[Any, fx.Node] = {}
    found: dict[fx.Node, fx.Node] = {}
    asked: set[fx.Node] = set()
    for quantize in calls(graph, {ops.quantize_fp8_row.op}):
        x: Any = quantize.args[0]
        first = made.setdefault(quantize.args, quantize)
        amax, quantize.kwargs = quantize.kwargs.get("columns"), {}
        if isinstance(amax, fx.Node) and amax.target in OF_COLUMNS and is_whole(x, len(shape(x))):
            # Where groups end may be computed from what an equal quantize before this one makes.
            too_late = depend(amax.all_input_nodes, {first})
            if not too_late:
                found.setdefault(first, amax)
        asks = amax is not None or first in asked
        if asks:
            asked.add(first)
        if first is not quantize and asks:
            quantize.replace_all_uses_with(first)
            graph.erase_node(quantize)
    return found


def _replace(graph: fx.Graph, quantize: fx.Node, amax: fx.Node) -> None:
    """One op in the place of the two."""
    make = partial(call, graph)
    x, *how = quantize.args
    with graph.inserting_before(quantize):
        offs = amax.args[1:]  # where there are groups
        made = make(ops.fused_quantize_row.op, [x], IDENTITY, *how, True, *offs)
        columns = make(operator.getitem, made, 2)
    quantize.replace_all_uses_with(made)
    amax.replace_all_uses_with(columns)
    graph.erase_node(quantize)
    graph.erase_node(amax)
