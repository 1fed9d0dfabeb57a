"""Tensors that are narrowed from one read: what makes them, as one program, and what asks for them.

Tensors of one shape whose producers read the same large inputs are a Group; so are halves of one
tensor that lie side by side. What is asked of each is a pass's own (``passes/fuse.py``,
``passes/fuse_micro.py``): a request has the ``node`` of its quantize, the tensor ``x`` that it
narrows, and ``offs``, the node that says where groups of rows end, or None.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._prims_common import is_contiguous_or_false

from lpcompile.cones import LARGE, POINTWISE, RESHAPES, Cone, TooComplex
from lpcompile.graph import aten, shape, value
from lpcompile.liveness import is_cheap
from lpcompile.ops.define import ALIGN

MOST_INPUTS, MOST_STATEMENTS = 4, 48  # of a program


@dataclass
class Group:
    """Tensors of one shape that are made and quantized together."""

    cone: Cone
    results: list[tuple[str, list[Any]]]  # names in the program, and the requests for each

    @property
    def requests(self) -> list[Any]:
        """Every quantize of the group."""
        return [r for _, requests in self.results for r in requests]


def is_whole(x: fx.Node, dim: int = 2) -> bool:
    """Whether x is a bf16 matrix, row after row, of a known width; of 3 ``dim`` a stack of them."""
    if len(shape(x)) != dim or not isinstance(shape(x)[-1], int):
        return False
    return value(x).dtype is torch.bfloat16 and is_contiguous_or_false(value(x))


def offsets(requests: Iterable[Any]) -> set[fx.Node]:
    """What says where groups of rows end, of quantizes of which some may know no groups."""
    return {r.offs for r in requests if r.offs is not None}


def parts_of(x: fx.Node) -> list[fx.Node]:
    """The tensors that lie side by side in x, all as wide; x alone where it is no such thing."""
    if x.target is not aten.cat.default or len(x.args) < 2 or x.args[1] not in (1, -1):
        return [x]
    parts: list[fx.Node] = list(x.args[0])  # type: ignore[arg-type]
    widths = {shape(part)[-1] for part in parts}
    whole = all(len(shape(part)) == 2 for part in parts) and len(widths) == 1
    return parts if whole and widths.pop() % ALIGN == 0 else [x]


def with_producers(
    graph: fx.Graph, private: set[fx.Node], targets: tuple[Any, ...] = ()
) -> set[fx.Node]:
    """The nodes, the pointwise ones that nobody needs but them, and those that nobody need write.

    What is made of the graph's inputs, and read by pointwise ops, these make again: a residual sum
    in a backward. To have it written for the quantize would let Inductor write it where it makes
    the norm's gradient, after every other GEMM, and have the GEMM that reads the copy wait for it.

    targets: ops that are inside too where nobody needs what they make but the nodes.
    """
    for node in reversed(graph.nodes):
        inside = _is_pointwise(node) or node.target in targets
        if inside and node.users and all(u in private for u in node.users):
            private.add(node)
    for node in graph.nodes:
        known = all(i.op == "placeholder" or i in private for i in node.all_input_nodes)
        if _is_pointwise(node) and known and all(u in private or is_cheap(u) for u in node.users):
            private.add(node)
    return private


def _is_pointwise(node: fx.Node) -> bool:
    """Whether a program can hold the node."""
    return node.op == "call_function" and (node.target in POINTWISE or node.target in RESHAPES)


def groups(requests: dict[fx.Node, list[Any]], private: set[fx.Node]) -> list[Group]:
    """Tensors whose producers read the same inputs together, the others by themselves."""
    alone = [_alone(x, rs, private) for x, rs in requests.items()]
    made: list[Group] = []
    for group in sorted(alone, key=lambda g: -g.cone.num_full):
        for i, other in enumerate(made):
            if _joins(group, other) and (both := _join(group, other, private)) is not None:
                made[i] = both
                break
        else:
            made.append(group)
    return made


def _cone(x: fx.Node, private: set[fx.Node]) -> Cone:
    part = parts_of(x)[0] if x in private else x
    return Cone(shape(x)[0], shape(part)[1], private.__contains__)


def _add(cone: Cone, x: fx.Node) -> str:
    """The name of x in a cone's program, where it may be of several parts."""
    parts = parts_of(x) if cone.is_private(x) else [x]
    return "+".join(cone.add(part) for part in parts)


def _fits(cone: Cone) -> bool:
    """Whether a program is small enough for one kernel."""
    return cone.num_full <= MOST_INPUTS and len(cone.statements) <= MOST_STATEMENTS


def _alone(x: fx.Node, requests: list[Any], private: set[fx.Node]) -> Group:
    cone = _cone(x, private)
    try:
        name = _add(cone, x)
    except TooComplex:
        name = ""
    if not name or not _fits(cone):
        cone = _cone(x, set())
        name = cone.leaf(x, "full")
    return Group(cone, [(name, requests)])


def _joins(a: Group, b: Group) -> bool:
    """Whether all large inputs of one are the other's, and it makes sense to read them once."""
    full_a, full_b = ({leaf for leaf, kind in g.cone.leaves if kind in LARGE} for g in (a, b))
    same = a.cone.columns == b.cone.columns and bool(full_a) and bool(full_b)
    same = same and len(offsets([*a.requests, *b.requests])) <= 1
    return same and (full_a <= full_b or full_b <= full_a)


def _join(a: Group, b: Group, private: set[fx.Node]) -> Group | None:
    """The group of both, or None where one reads what comes after the other."""
    leaves = [leaf for g in (a, b) for leaf, _ in g.cone.leaves]
    leaves += offsets([*a.requests, *b.requests])
    if depend(leaves, {r.node for g in (a, b) for r in g.requests}):
        return None
    cone = _cone(a.requests[0].x, private)
    try:
        results = [(_add(cone, rs[0].x), rs) for g in (b, a) for _, rs in g.results]
    except TooComplex:
        return None
    return Group(cone, results) if _fits(cone) else None


def depend(nodes: Iterable[fx.Node], on: set[fx.Node]) -> bool:
    """Whether any of the nodes is computed from any of ``on``."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in on:
            return True
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return False


def last(nodes: list[fx.Node]) -> fx.Node:
    """The last of the nodes in graph order, or the last placeholder if that comes later."""
    node = max(nodes)
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


def matrix(make: Any, cone: Cone, leaf: fx.Node, kind: str) -> fx.Node:
    """A leaf in the shape that a program's input of that kind has."""
    large = [-1, cone.columns]
    wanted = {"full": large, "wide": large, "row": [-1, 1], "column": [-1], "scalar": []}[kind]
    if list(shape(leaf)) in (wanted, [cone.rows, cone.columns]):
        return leaf
    return make(aten.view.default, leaf, wanted)
