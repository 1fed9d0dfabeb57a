"""Order the quantizes of one graph, and the GEMMs that read them, so that less lives at once.

- Around tensors that are cast from the same inputs, the order that holds least is searched
  (``lpcompile.peak``). SwiGLU's backward: whether h, for wgrad, and the gradients of gate and up
  are cast one after another, each before its own GEMMs, or at once, which lets go of gate, up and
  the gradient of h; whether dX comes before dW, and when x is narrowed for wgrad. One kernel casts
  several, and reads their inputs once, where the peak is no higher for it.
- What is quantized from inputs of the graph that are held anyway (weights, above all) is quantized
  right before the first GEMM that reads it: a copy made early is held beside them.

Inductor takes the order with the least peak, by its estimate, of four: the one that it is given and
three of its own (``reorder_for_peak_memory``, torch 2.11 to 2.13), none of which finds this one.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import fx

from lpcompile import ops
from lpcompile.cones import LARGE
from lpcompile.graph import TRANSPOSES, VIEWS, base, call, calls, is_own, shape, value
from lpcompile.liveness import is_cheap
from lpcompile.ops import pointwise
from lpcompile.ops.define import PRODUCTS
from lpcompile.ops.fused_source import parse_form
from lpcompile.passes.fuse import MOST_INPUTS, MOST_STATEMENTS
from lpcompile.peak import CALLERS, Memory, Part

CASTS = (ops.fused_cast.op, ops.fused_cast_micro.op)


def run(graph: fx.Graph) -> int:
    """Move what is better made later, and return how many calls were moved or joined."""
    count = 0
    for casts in _groups(graph):
        count += _order(graph, casts)
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


def _order(graph: fx.Graph, casts: list[fx.Node]) -> int:
    """Put a part of the graph into its best order, and join casts; how many calls that changed."""
    everything = list(graph.nodes)
    first, end = _range(everything, casts)
    memory = Memory(graph)
    lives = memory.lives(everything)
    part = Part(memory, everything[first:end], list(_joins(casts)))
    live = memory.held(set(everything[:first]))
    floor = max(lives[:first] + lives[end:], default=0)
    steps = part.order(live, floor)
    if steps is None:
        return 0
    order = part.nodes_in(steps)
    for at, node in pairwise([everything[first - 1], *order]):
        at.append(node)
    for step in steps:
        if len(step.calls) > 1:
            _join(graph, step.calls)
    return sum(a is not b for a, b in zip(order, part.nodes, strict=True))


def _range(nodes: list[fx.Node], casts: list[fx.Node]) -> tuple[int, int]:
    """Which nodes there is something to gain from: up to the GEMMs that read the casts.

    From the first cast, or the casts that the GEMM reads which makes an input of theirs.
    """
    at = {node: i for i, node in enumerate(nodes)}
    makers = {i for cast in casts for i in _inputs(cast) if i.target in PRODUCTS}
    read = {i.args[0] for maker in makers for i in maker.all_input_nodes if _is_item(i)}
    first = min(at[node] for node in [*casts, *read])  # type: ignore[index]
    readers = {u for cast in casts for item in cast.users for u in item.users if u.op != "output"}
    end = 1 + max(at[node] for node in [*casts, *readers])
    while nodes[end].op == "call_function" and (_is_item(nodes[end]) or is_cheap(nodes[end])):
        end += 1
    return first, end


def _is_item(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def _joins(casts: list[fx.Node]) -> Iterator[tuple[fx.Node, ...]]:
    """Casts that one kernel can make, two and more."""
    alone = [(cast,) for cast in casts if cast.target is ops.fused_cast.op]
    some: list[tuple[fx.Node, ...]] = list(alone)
    while some:
        some = [(*c, other) for c in some for (other,) in alone if c[-1] < other]
        some = [c for c in some if _fits(c)]
        yield from some


def _fits(casts: Sequence[fx.Node]) -> bool:
    """Whether casts are of matrices of one shape, in the same groups of rows, by a program."""
    program, _ = _program(casts)
    large = sum(kind in LARGE for kind in program.kinds)
    small = large <= MOST_INPUTS and len(program.statements) <= MOST_STATEMENTS
    return small and len({_whole(c) for c in casts}) == 1


def _whole(cast: fx.Node) -> tuple[Any, ...]:
    """The shape that a cast's program computes in, and what says where groups of rows end."""
    args: Any = cast.args
    return (*shape(args[0][pointwise.parse(args[2]).large]), *args[4:])


def _program(casts: Sequence[fx.Node]) -> tuple[pointwise.Program, list[fx.Node]]:
    """The program of all casts and its inputs, of which views of one tensor are one."""
    views: dict[str, fx.Node] = {}
    parts = []
    for cast in casts:
        args: Any = cast.args
        inputs = [
            views.setdefault(f"{i.target} {i.args}", i) if i.target in VIEWS else i for i in args[0]
        ]
        parts.append((pointwise.parse(args[2]), inputs))
    return pointwise.join(parts)


def _join(graph: fx.Graph, casts: Sequence[fx.Node]) -> None:
    """One cast for casts that lie side by side."""
    program, inputs = _program(casts)
    forms: list[str] = []
    amaxes: list[fx.Node] = []
    results = 0
    for cast in casts:
        args: Any = cast.args
        for form in map(parse_form, args[3]):
            forms.append(replace(form, result=form.result + results).text)
        amaxes += args[1]
        results += len(pointwise.parse(args[2]).results)
    fake_mode: Any = value(inputs[0]).fake_mode  # type: ignore[attr-defined]
    given = (inputs, amaxes, program.text(), forms, *casts[0].args[4:])
    with graph.inserting_after(max(casts)):
        made = call(graph, fake_mode, ops.fused_cast.op, *given)
    count = 0
    for cast in casts:
        for item in list(cast.users):
            item.update_arg(1, item.args[1] + count)  # type: ignore[operator]
            item.update_arg(0, made)
            made.append(item)
        count += len(value(cast))
        graph.erase_node(cast)


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
