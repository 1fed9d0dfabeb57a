"""Merge the quantizes of what one graph holds, with the pointwise ops that make it, into two ops.

Runs after partitioning, when it is known what runs in one graph: dY is quantized both ways from
one read for the amaxes (``fused_amax``) and one for the casts (``fused_cast``); both gradients of
SwiGLU, both ways, and its output for wgrad, from two reads of (gate, up, dh). Blocks need no amax,
and one read. Tokens of experts likewise, group by group; and gradients that lie side by side in one
tensor, as those of a fused gate and up projection do.

A row-wise quantize alone is one op and one read, with what makes its operand
(``fused_quantize_row``). What stays as it was: one quantize alone of a tensor that is in memory,
which gains nothing; and one whose producer is too much for a program, which Inductor may fuse.
"""

import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._prims_common import is_contiguous_or_false

from lpcompile import ops
from lpcompile.cones import LARGE, POINTWISE, RESHAPES, Cone, TooComplex
from lpcompile.graph import aten, call, shape, value
from lpcompile.liveness import is_cheap
from lpcompile.ops.define import ALIGN
from lpcompile.ops.fused_cast import num_outputs
from lpcompile.ops.fused_quantize_row import WIDEST
from lpcompile.ops.fused_source import BLOCKS, ELEMENTS, Form
from lpcompile.ops.quantize_fp8_block import BLOCK

MOST_INPUTS, MOST_STATEMENTS = 4, 48
_LETTERS = {element: name for name, element in ELEMENTS.items()}
# quantize op -> kind of scale, which way (``Form.way``), and the op that makes its amax
QUANTIZES: dict[Any, tuple[str, str, Any]] = {
    ops.quantize_fp8_row.op: ("row", "n", None),
    ops.quantize_fp8_row_t.op: ("row", "t", ops.amax_column.op),
    ops.quantize_fp8_tensor.op: ("tensor", "n", ops.amax_tensor.op),
    ops.quantize_fp8_tensor_t.op: ("tensor", "t", ops.amax_tensor.op),
    ops.quantize_fp8_block.op: ("block", "n", None),
    ops.quantize_fp8_block_t.op: ("block", "t", None),
    ops.quantize_fp8_square.op: ("square", "n", None),
    ops.quantize_fp8_square_t.op: ("square", "t", None),
    ops.quantize_fp8_grouped_t.op: ("row", "g", ops.amax_column_grouped.op),
    ops.quantize_fp8_block_grouped_t.op: ("block", "g", None),
}
AMAXES = {amax for _, _, amax in QUANTIZES.values() if amax} | {ops.amax_tensor_grouped.op}


@dataclass
class Request:
    """One quantize of x that can be fused.

    amax: the node of the amax that it reads, if it reads one. makes_amax: this graph makes it of x.
    offs: the node that says where groups of rows end, if it or its amax reads one.
    """

    node: fx.Node
    x: fx.Node
    kind: str
    way: str
    amax: fx.Node | None
    makes_amax: bool
    offs: fx.Node | None

    def form(self, result: int) -> Form:
        """What it asks of the fused op."""
        element, pow2 = self.node.args[-2:]
        return Form(result, self.kind, _LETTERS[element], bool(pow2), self.way)  # type: ignore[index]


@dataclass
class Group:
    """Tensors of one shape that are made and quantized together."""

    cone: Cone
    results: list[tuple[str, list[Any]]]  # names in the program, and the requests for each

    @property
    def requests(self) -> list[Any]:
        """Every quantize of the group."""
        return [r for _, requests in self.results for r in requests]


def run(graph: fx.Graph) -> int:
    """Fuse what pays, and return how many quantizes were merged."""
    requests = _requests(graph)
    private = _private(graph, requests)
    count = 0
    for group in groups(requests, private):
        if _is_row(group):
            _replace_row(graph, group)
        elif _pays(group):
            _replace(graph, group)
        else:
            continue
        count += len(group.requests)
    if count:
        stable_topological_sort(graph)
    return count


def _requests(graph: fx.Graph) -> dict[fx.Node, list[Request]]:
    found: dict[fx.Node, list[Request]] = defaultdict(list)
    for node in graph.nodes:
        # What gathers rows as it reads is for its own kernel.
        if node.op == "call_function" and node.target in QUANTIZES and not node.kwargs.get("rows"):
            request = _request(node)
            # The weights of experts are stacks of matrices; a tensor has one kind of groups.
            if is_whole(request.x) and len(offsets([*found[request.x], request])) <= 1:
                found[request.x].append(request)
    return found


def _request(node: fx.Node) -> Request:
    (x, *rest), (kind, way, source) = node.args, QUANTIZES[node.target]
    given: list[Any] = [n for n in rest if isinstance(n, fx.Node)]
    amax = given.pop(0) if source else None
    makes = amax is not None and amax.target in AMAXES and amax.args[0] is x
    # Of rows that are picked from x, in whose order the groups lie, it is none of x's.
    makes = makes and not amax.kwargs.get("rows")  # type: ignore[union-attr]
    if amax is not None and makes and amax.target is ops.amax_tensor_grouped.op:
        kind, given = "tokens", [amax.args[1]]
    elif kind == "row" and way == "g" and value(amax).dim() == 1:  # type: ignore[arg-type]
        kind = "tokens"
    return Request(node, x, kind, way, amax, makes, given[0] if given else None)  # type: ignore[arg-type]


def is_whole(x: fx.Node, dim: int = 2) -> bool:
    """Whether x is a bf16 matrix, row after row, of a known width; of 3 ``dim`` a stack of them."""
    if len(shape(x)) != dim or not isinstance(shape(x)[-1], int):
        return False
    return value(x).dtype is torch.bfloat16 and is_contiguous_or_false(value(x))


def offsets(requests: Iterable[Any]) -> set[fx.Node]:
    """What says where groups of rows end, of quantizes of which some may know no groups."""
    return {r.offs for r in requests if getattr(r, "offs", None) is not None}


def _private(graph: fx.Graph, requests: dict[fx.Node, list[Request]]) -> set[fx.Node]:
    """Nodes that nobody needs but the quantizes: no fused kernel would compute them twice."""
    asked = [r for rs in requests.values() for r in rs]
    inner = {n for r in asked for n in (r.node, r.makes_amax and r.amax) if n}
    blocked = {r.x for r in asked if r.kind in BLOCKS and len(_parts(r.x)) > 1}
    private = with_producers(graph, inner, (aten.cat.default,))
    return private - {x for x in blocked if shape(_parts(x)[0])[1] % BLOCK}


def _parts(x: fx.Node) -> list[fx.Node]:
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
    part = _parts(x)[0] if x in private else x
    return Cone(shape(x)[0], shape(part)[1], private.__contains__)


def _add(cone: Cone, x: fx.Node) -> str:
    """The name of x in a cone's program, where it may be of several parts."""
    parts = _parts(x) if cone.is_private(x) else [x]
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


def _is_row(group: Group) -> bool:
    """Whether a group is one row-wise quantize whose inputs' rows fit in registers."""
    forms = [(r.kind, r.way) for r in group.requests]
    width = group.cone.num_full * group.cone.columns
    plain = bool(group.cone.statements) and "+" not in group.results[0][0]
    return forms == [("row", "n")] and plain and width <= WIDEST


def _pays(group: Group) -> bool:
    """Whether two ops move fewer bytes than what they replace."""
    forms = [(r.kind, r.way) for r in group.requests]
    if all(form == ("row", "n") for form in forms):
        return False
    inputs, results = group.cone.num_full, sum(len(name.split("+")) for name, _ in group.results)
    if not group.cone.statements:
        return len(forms) > 1
    amaxes = [r for r in group.requests if r.kind not in BLOCKS and not _given(r)]
    reads = 2 if amaxes else 1
    return reads * inputs <= inputs + results + results * reads


def _replace_row(graph: fx.Graph, group: Group) -> None:
    (request,) = group.requests
    fake_mode: Any = value(request.x).fake_mode  # type: ignore[attr-defined]
    make = partial(call, graph, fake_mode)
    program = group.cone.program([name for name, _ in group.results]).text()
    with graph.inserting_before(request.node):
        inputs = [matrix(make, group.cone, leaf, kind) for leaf, kind in group.cone.leaves]
        made = make(ops.fused_quantize_row.op, inputs, program, *request.node.args[1:])
    request.node.replace_all_uses_with(made)
    graph.erase_node(request.node)


def _given(request: Request) -> bool:
    """Whether a request comes with an amax that this graph does not compute from its x."""
    return request.amax is not None and not request.makes_amax


def _replace(graph: fx.Graph, group: Group) -> None:
    """For each result one op for its amaxes, and one for its copies, where they were.

    One for all copies would read the inputs once, and hold all of them from then on: ``schedule``
    joins ops of several results where there is room for it.
    """
    fake_mode: Any = value(group.requests[0].x).fake_mode  # type: ignore[attr-defined]
    make = partial(call, graph, fake_mode)
    amaxes = _replace_amaxes(graph, make, group)
    for whole, requests in group.results:
        cone, name = group.cone.part(whole)
        program = cone.program([name]).text()
        forms = [r.form(0) for r in requests]
        with graph.inserting_before(min(r.node for r in requests)):
            inputs = [matrix(make, cone, leaf, kind) for leaf, kind in cone.leaves]
            reads = [amax for r in requests if (amax := amaxes.get(r.node, r.amax)) is not None]
            texts, offs = [form.text for form in forms], offsets(requests)
            made = make(ops.fused_cast.op, inputs, reads, program, texts, *offs)
            items = (make(operator.getitem, made, i) for i in range(len(value(made))))
            outputs = [[next(items) for _ in range(num_outputs(form))] for form in forms]
        for request, found in zip(requests, outputs, strict=True):
            for user in list(request.node.users):
                user.replace_all_uses_with(found[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(request.node)


def _replace_amaxes(graph: fx.Graph, make: Any, group: Group) -> dict[fx.Node, fx.Node]:
    """One op for the amaxes of each result; gives the one of each quantize that reads it."""
    made: dict[fx.Node, fx.Node] = {}
    offs = offsets(group.requests)
    after = last([*offs, *(leaf for leaf, _ in group.cone.leaves)])
    for whole, requests in reversed(group.results):
        asked = [r for r in requests if r.kind not in BLOCKS and not _given(r)]
        if not asked:
            continue
        cone, name = group.cone.part(whole)
        wants = list(dict.fromkeys(r.form(0).amax for r in asked))
        with graph.inserting_before(after.next):
            inputs = [matrix(make, cone, leaf, kind) for leaf, kind in cone.leaves]
            every = make(ops.fused_amax.op, inputs, cone.program([name]).text(), wants, *offs)
            items = {want: make(operator.getitem, every, i) for i, want in enumerate(wants)}
        for r in asked:
            made[r.node] = items[r.form(0).amax]
            if r.amax is not None:
                r.amax.replace_all_uses_with(made[r.node])
    return made


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
