"""Take the maxima of x's columns in the read that narrows x by rows: two ops of x become one.

    quantize_fp8_row(x, columns=amax_column(x))  ->  fused_quantize_row(x, columns=True)

What the backward narrows across the rows (W for dgrad, X for wgrad) it narrows under an amax that
the forward saves, a vector (``placement.keep_amax``). With what makes x, where a program can hold
that. The weights of experts are stacks of matrices, and tokens lie in groups, each with maxima of
its own. Before ``fuse``, which takes what is left.
"""

import operator
from functools import partial
from typing import Any

from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

from lpcompile import ops
from lpcompile.graph import call, calls, shape, value
from lpcompile.ops.fused_quantize_row import WIDEST_WITH_MAXIMA
from lpcompile.ops.pointwise import IDENTITY
from lpcompile.passes.fuse import alone, is_whole, matrix, with_producers
from lpcompile.placement import OF_COLUMNS


def run(graph: fx.Graph) -> int:
    """Merge what one read serves, and return how many quantizes were merged."""
    maxima = _maxima(graph)
    private = with_producers(graph, {*maxima, *maxima.values()})
    count = sum(_replace(graph, *pair, private) for pair in maxima.items())
    if count:
        stable_topological_sort(graph)
    return count


def _maxima(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The amax that a quantize names, of the first of those that make the same of one tensor.

    Of two readers of x one may ask for maxima, and their quantizes differ in that.
    """
    made: dict[Any, fx.Node] = {}
    found: dict[fx.Node, fx.Node] = {}
    for quantize in list(calls(graph, (ops.quantize_fp8_row.op,))):
        x: Any = quantize.args[0]
        first = made.setdefault(quantize.args, quantize)
        amax, quantize.kwargs = quantize.kwargs.get("columns"), {}
        if isinstance(amax, fx.Node) and amax.target in OF_COLUMNS and is_whole(x, len(shape(x))):
            found.setdefault(first, amax)
        if first is not quantize:
            quantize.replace_all_uses_with(first)
            graph.erase_node(quantize)
    return found


def _replace(graph: fx.Graph, quantize: fx.Node, amax: fx.Node, private: set[fx.Node]) -> bool:
    """Whether the two could be one op, which then stands in their place."""
    x: Any = quantize.args[0]
    fake_mode: Any = value(amax).fake_mode  # type: ignore[attr-defined]
    make = partial(call, graph, fake_mode)
    with graph.inserting_before(quantize):
        inputs, program = [x], IDENTITY
        if len(shape(x)) == 2:
            group = alone(x, [], private)
            if group.cone.num_full * group.cone.columns > WIDEST_WITH_MAXIMA:
                return False
            inputs = [matrix(make, group.cone, leaf, kind) for leaf, kind in group.cone.leaves]
            program = group.cone.program([name for name, _ in group.results]).text()
        made = make(
            ops.fused_quantize_row.op, inputs, program, *quantize.args[1:], True, *amax.args[1:]
        )
        columns = make(operator.getitem, made, 2)
    quantize.replace_all_uses_with(made)
    amax.replace_all_uses_with(columns)
    graph.erase_node(quantize)
    graph.erase_node(amax)
    return True
