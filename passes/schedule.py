"""Order the quantizes of one graph, and the GEMMs that read them, so that less lives at once.

- Tensors that are cast from the same inputs are cast one after another, each before its own GEMMs,
  in an order that lets go of inputs early. SwiGLU's backward: h, for wgrad; the gradient of gate,
  after which up is dead; the gradient of up, from gate and dh.
- What is quantized from the graph's inputs alone (weights, above all) is quantized right before the
  first GEMM that reads it: they are held anyway, and a copy made early is held beside them.

Inductor takes the order with the least peak, by its estimate, of four: the one that it is given and
three of its own (``reorder_for_peak_memory``, torch 2.11 to 2.13), none of which finds this one.
"""

import operator
from itertools import pairwise

from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

from lpcompile import ops
from lpcompile.graph import TRANSPOSES, VIEWS, base, calls, is_own
from lpcompile.ops import pointwise
from lpcompile.ops.define import PRODUCTS


def run(graph: fx.Graph) -> int:
    """Move what is better made later, and return how many calls were moved."""
    count = 0
    for casts in _groups(graph):
        count += sum(_put_after(*pair) for pair in pairwise(_order(casts)))
    if count:
        stable_topological_sort(graph)
    return count + _sink(graph)


def _groups(graph: fx.Graph) -> list[list[fx.Node]]:
    """The casts of one graph that read a large input together, in graph order."""
    groups: list[list[fx.Node]] = []
    for cast in calls(graph, (ops.fused_cast.op, ops.fused_cast_micro.op)):
        alike = [g for g in groups if any(_inputs(cast) & _inputs(other) for other in g)]
        groups = [g for g in groups if g not in alike]
        groups.append([*(c for g in alike for c in g), cast])
    return [g for g in groups if len(g) > 1]


def _inputs(cast: fx.Node) -> set[fx.Node]:
    """What a cast reads that is as large as what it casts."""
    inputs, *rest = cast.args
    kinds = pointwise.parse(next(a for a in rest if isinstance(a, str))).kinds
    return {base(i) for i, kind in zip(inputs, kinds, strict=True) if kind == "full"}  # type: ignore[arg-type,union-attr]


def _order(casts: list[fx.Node]) -> list[fx.Node]:
    """Next always the one that the most inputs die with; else as they stand."""
    left, order = list(casts), []
    while left:

        def dead(cast: fx.Node, left: list[fx.Node] = left) -> int:
            needed = {i for other in left if other is not cast for i in _inputs(other)}
            return len(_inputs(cast) - needed)

        order.append(max(left, key=dead))
        left.remove(order[-1])
    return order


def _put_after(first: fx.Node, cast: fx.Node) -> int:
    """Move a cast, what reads it and what is quantized for those behind what reads the first."""
    at = max(_readers(first))
    moved = {cast, *cast.users, *_readers(cast)}
    for node in reversed(cast.graph.nodes):
        if _is_light(node) and node.users and all(u in moved for u in node.users):
            moved.add(node)
    early = [node for node in cast.graph.nodes if node in moved and node < at]
    for node in early:
        at.append(node)
        at = node
    return len(early)


def _readers(cast: fx.Node) -> set[fx.Node]:
    """The calls that read what a cast makes; itself if there is none."""
    return {u for item in cast.users for u in item.users if u.op != "output"} or {cast}


def _sink(graph: fx.Graph) -> int:
    """Move what is quantized from the graph's inputs alone down to its first reader."""
    from_inputs: set[fx.Node] = set()
    for node in graph.nodes:
        known = all(i in from_inputs for i in node.all_input_nodes)
        if node.op == "placeholder" or (_is_light(node) and known):
            from_inputs.add(node)
    count = 0
    for node in reversed(list(graph.nodes)):
        if node.op == "placeholder" or node not in from_inputs or not node.users:
            continue
        first = min(node.users)
        if first.op != "output" and node.next is not first:
            first.prepend(node)
            count += 1
    return count


def _is_light(node: fx.Node) -> bool:
    """A quantize or an amax, what it reads through, and what is taken of its outputs."""
    if node.op != "call_function":
        return False
    through = node.target in VIEWS or node.target in TRANSPOSES
    own = is_own(node) and node.target not in PRODUCTS
    return own or through or node.target is operator.getitem
