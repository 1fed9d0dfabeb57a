"""Take the maxima of x in the read that narrows x: two ops of x become one.

    quantize_fp8_row(x, columns=amax_column(x))  ->  fused_quantize_row(x, columns=True)
    quantize_fp8_tensor(x, amax_tensor(x))       ->  fused_quantize_tensor(x)

What the backward narrows across the rows (W for dgrad, X for wgrad) it narrows under an amax that
the forward saves, a vector (``placement.keep_amax``). The weights of experts are stacks of
matrices, and tokens lie in groups, each with maxima of its own. Under one scale a matrix is read
once where it fits into a GPU's registers, as an expert's weight does. Before ``fuse``, which takes
what is left.
"""

import operator
from functools import partial
from typing import Any

from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

from lpcompile import ops
from lpcompile.fusion import depend, is_whole
from lpcompile.graph import call, calls, is_own, shape
from lpcompile.ops.fused_quantize_tensor import fits
from lpcompile.ops.pointwise import IDENTITY
from lpcompile.placement import OF_COLUMNS


def run(graph: fx.Graph) -> int:
    """Merge what one read serves, and return how many quantizes were merged."""
    maxima, small = _maxima(graph), _small(graph)
    for quantize, amax in maxima.items():
        offs = amax.args[1:]  # where there are groups
        args = ([quantize.args[0]], IDENTITY, *quantize.args[1:], True, *offs)
        _replace(graph, quantize, amax, ops.fused_quantize_row.op, args)
    for quantize, amax in small.items():
        x, _, *how = quantize.args
        _replace(graph, quantize, amax, ops.fused_quantize_tensor.op, (x, *how))
    if maxima or small:
        stable_topological_sort(graph)
    return len(maxima) + len(small)


def _maxima(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The amax that a quantize names, of the first of those that make the same of one tensor.

    Of two readers of x one may ask for maxima, and their quantizes differ in that.
    """
    made: dict[Any, fx.Node] = {}
    found: dict[fx.Node, fx.Node] = {}
    for quantize in calls(graph, {ops.quantize_fp8_row.op}):
        x: Any = quantize.args[0]
        first = made.setdefault(quantize.args, quantize)
        amax, quantize.kwargs = quantize.kwargs.get("columns"), {}
        if isinstance(amax, fx.Node) and amax.target in OF_COLUMNS and is_whole(x, len(shape(x))):
            # Where groups end may be computed from what an equal quantize before this one makes.
            too_late = depend(amax.all_input_nodes, {first})
            if not too_late:
                found.setdefault(first, amax)
        if first is not quantize:
            quantize.replace_all_uses_with(first)
            graph.erase_node(quantize)
    return found


def _small(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The amax that a quantize, and nothing else here, reads, of whole matrices that are small."""
    found = {}
    for amax in calls(graph, {ops.amax_tensor.op}):
        x: Any = amax.args[0]
        narrowed = [user for user in amax.users if is_own(user)]
        of_x = [q for q in narrowed if q.target is ops.quantize_fp8_tensor.op and q.args[0] is x]
        whole = is_whole(x, len(shape(x))) and isinstance(shape(x)[-2], int)
        if len(narrowed) == len(of_x) == 1 and whole and fits(*shape(x)[-2:]):
            found[of_x[0]] = amax
    return found


def _replace(graph: fx.Graph, quantize: fx.Node, amax: fx.Node, op: Any, args: Any) -> None:
    """One op in the place of the two, which makes the amax last."""
    make = partial(call, graph)
    with graph.inserting_before(quantize):
        made = make(op, *args)
        maxima = make(operator.getitem, made, 2)
    quantize.replace_all_uses_with(made)
    amax.replace_all_uses_with(maxima)
    graph.erase_node(quantize)
    graph.erase_node(amax)
