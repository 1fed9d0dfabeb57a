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
from lpcompile.ops.fused_quantize_row import WIDEST
from lpcompile.ops.pointwise import IDENTITY
from lpcompile.passes.fuse import alone, is_whole, matrix, with_producers
from lpcompile.placement import OF_COLUMNS


def run(graph: fx.Graph) -> int:
    """Merge what one read serves, and return how many quantizes were merged."""
    pairs = {}
    for quantize in list(calls(graph, (ops.quantize_fp8_row.op,))):
        amax = quantize.kwargs.get("columns")
        if isinstance(amax, fx.Node):
            _unite(quantize)
            x: Any = quantize.args[0]
            if amax.target in OF_COLUMNS and is_whole(x, len(shape(x))):
                pairs[quantize] = amax
    private = with_producers(graph, {*pairs, *pairs.values()})
    count = sum(_replace(graph, *pair, private) for pair in pairs.items())
    if count:
        stable_topological_sort(graph)
    return count


def _unite(quantize: fx.Node) -> None:
    """Have it serve those too that quantize the same and know no maxima."""
    quantize.kwargs = {}
    for other in list(quantize.args[0].users):  # type: ignore[union-attr]
        alike = other.target is quantize.target and other.args == quantize.args
        if alike and other is not quantize and not other.kwargs:
            other.replace_all_uses_with(quantize)
            quantize.graph.erase_node(other)


def _replace(graph: fx.Graph, quantize: fx.Node, amax: fx.Node, private: set[fx.Node]) -> bool:
    """Whether the two could be one op, which then stands in their place."""
    x: Any = quantize.args[0]
    fake_mode: Any = value(amax).fake_mode  # type: ignore[attr-defined]
    make = partial(call, graph, fake_mode)
    with graph.inserting_before(quantize):
        inputs, program = [x], IDENTITY
        if len(shape(x)) == 2:
            group = alone(x, [], private)
            if group.cone.num_full * group.cone.columns > WIDEST:
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
