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
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

from lpcompile import ops
from lpcompile.fusion import (
    Group,
    groups,
    is_whole,
    last,
    matrix,
    offsets,
    parts_of,
    with_producers,
)
from lpcompile.graph import aten, call, shape, value
from lpcompile.ops.fused_cast import num_outputs
from lpcompile.ops.fused_quantize_row import WIDEST
from lpcompile.ops.fused_source import BLOCKS, NAMES, Form
from lpcompile.ops.quantize_fp8_block import BLOCK

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
        return Form(result, self.kind, NAMES[element], bool(pow2), self.way)  # type: ignore[index]


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


def _private(graph: fx.Graph, requests: dict[fx.Node, list[Request]]) -> set[fx.Node]:
    """Nodes that nobody needs but the quantizes: no fused kernel would compute them twice."""
    asked = [r for rs in requests.values() for r in rs]
    inner = {n for r in asked for n in (r.node, r.makes_amax and r.amax) if n}
    blocked = {r.x for r in asked if r.kind in BLOCKS and len(parts_of(r.x)) > 1}
    private = with_producers(graph, inner, (aten.cat.default,))
    return private - {x for x in blocked if shape(parts_of(x)[0])[1] % BLOCK}


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
    make = partial(call, graph)
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
    make = partial(call, graph)
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
