"""Order the quantizes of one graph, and the GEMMs that read them, so that less lives at once.

- Tensors that are cast from the same inputs are cast one after another, each before its own GEMMs,
  in an order that lets go of inputs early. SwiGLU's backward: h, for wgrad; the gradient of gate,
  after which up is dead; the gradient of up, from gate and dh. A GEMM that makes more than it lets
  go of (wgrad of a large weight on few tokens) waits until the last is cast.
- What is quantized from inputs of the graph that are held anyway (weights, above all) is quantized
  right before the first GEMM that reads it: a copy made early is held beside them.

Inductor takes the order with the least peak, by its estimate, of four: the one that it is given and
three of its own (``reorder_for_peak_memory``, torch 2.11 to 2.13), none of which finds this one.
"""

import operator
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

from lpcompile import ops
from lpcompile.cones import LARGE
from lpcompile.graph import TRANSPOSES, VIEWS, base, calls, hint, is_own, value
from lpcompile.liveness import is_cheap
from lpcompile.ops import pointwise
from lpcompile.ops.define import PRODUCTS

CASTS = (ops.fused_cast.op, ops.fused_cast_micro.op, ops.fused_wide_micro.op)
# How AOTAutograd names the inputs that the caller holds: Inductor knows them so too.
CALLERS = ("primals_", "tangents_")


def run(graph: fx.Graph) -> int:
    """Move what is better made later, and return how many calls were moved."""
    count = 0
    for casts in _groups(graph):
        count += sum(_put_after(*pair, casts) for pair in pairwise(_order(casts)))
    if count:
        stable_topological_sort(graph)
    return count + _sink(graph)


def _groups(graph: fx.Graph) -> list[list[fx.Node]]:
    """The casts of one graph that read a large input together, in graph order."""
    group_of: dict[fx.Node, list[fx.Node]] = {}  # by input
    for cast in calls(graph, CASTS):
        alike = {id(g): g for i in _inputs(cast) if (g := group_of.get(i)) is not None}
        group = [*(other for g in alike.values() for other in g), cast]
        group_of |= {i: group for member in group for i in _inputs(member)}
    groups = {id(group): group for group in group_of.values()}
    return [sorted(group) for group in groups.values() if len(group) > 1]


def _inputs(cast: fx.Node) -> set[fx.Node]:
    """What a cast reads that is as large as what it casts."""
    args: Any = cast.args
    kinds = pointwise.parse(next(a for a in args[1:] if isinstance(a, str))).kinds
    return {base(i) for i, kind in zip(args[0], kinds, strict=True) if kind in LARGE}


def _order(casts: list[fx.Node]) -> list[fx.Node]:
    """The casts and what reads them, in the order in which they are to run."""
    left = list(casts)
    order: list[fx.Node] = []
    late: list[fx.Node] = []
    while left:
        # The one that the most inputs die with; among equals the first.
        needed = {c: {i for other in left if other is not c for i in _inputs(other)} for c in left}
        cast = max(left, key=lambda c: len(_inputs(c) - needed[c]))
        left.remove(cast)
        order.append(cast)
        for reader in sorted({u for item in cast.users for u in item.users if u.op != "output"}):
            (late if _grows(reader) else order).append(reader)
    return [*order, *(reader for reader in late if reader not in order)]


def _grows(node: fx.Node) -> bool:
    """Whether a call makes more bytes than are dead after it."""
    freed = sum(_num_bytes(i) for i in node.all_input_nodes if set(i.users) == {node})
    return _num_bytes(node) > freed


def _num_bytes(node: fx.Node) -> int:
    made = node.meta.get("val")
    if not isinstance(made, torch.Tensor) or node.op == "placeholder":
        return 0
    return (hint(made.numel()) or 0) * made.element_size()


def _put_after(first: fx.Node, then: fx.Node, casts: list[fx.Node]) -> int:
    """Move a call behind another, with what else is quantized for it alone, if it is before it."""
    if not then < first:
        return 0
    moved, stack = {then}, [then]
    while stack:
        for i in stack.pop().all_input_nodes:
            for_it = _is_light(i) and i not in casts and all(u in moved for u in i.users)
            if for_it and i not in moved:
                moved.add(i)
                stack.append(i)
    early = sorted(node for node in moved if node < first)
    for node in reversed(early):
        first.append(node)
    return len(early)


def _sink(graph: fx.Graph) -> int:
    """Move what is quantized from tensors that are held anyway down to its first reader."""
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
        is_part = node.target is operator.getitem  # which takes nothing to be handed on
        is_idle = (first.op != "output" or is_part) and node.next is not first
        if is_idle and all(_is_held(base(i), first) for i in node.all_input_nodes):
            first.prepend(node)
            count += 1
    return count


def _is_held(node: fx.Node, until: fx.Node) -> bool:
    """Whether an input lives until then anyhow: for the caller, or for what is computed of it."""
    if node.op != "placeholder" or node.name.startswith(CALLERS) or value(node).dim() < 2:
        return True
    seen, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            if not user < until:
                return True
            if user not in seen and is_cheap(user):
                seen.add(user)
                stack.append(user)
    return False


def _is_light(node: fx.Node) -> bool:
    """A quantize or an amax, what it reads through, and what is taken of its outputs."""
    if node.op != "call_function":
        return False
    through = node.target in VIEWS or node.target in TRANSPOSES
    own = is_own(node) and node.target not in PRODUCTS
    return own or through or node.target is operator.getitem
