"""Where the parts of a loop's lanes are put together again: a concatenation, a sum of scatters."""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lpcompile.graph import aten, emit, meta_of, shape
from lpcompile.lanes import Family, range_of


def joined(family: Family, whole: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Nodes that put together what all lanes of a family make, and what they make."""
    nodes = family.nodes
    for user in nodes[0].users:
        if family.kind == "rows" and _is_cat(user, nodes):
            yield user, whole
        if family.kind == "stack" and user.target is aten.unsqueeze.default and user.args[1] == 0:
            for cat in user.users:
                given: Any = cat.args[0] if _is_cat(cat) else []
                under = [n.args[0] for n in given if n.target is aten.unsqueeze.default]
                if under == nodes and all(n.args[1] == 0 for n in given):
                    yield cat, whole
    target = SCATTERS[family.kind]
    found = [next((u for u in n.users if u.target is target), None) for n in nodes]
    scatters = [n for n in found if n is not None]
    if len(scatters) < len(nodes):
        return
    start = scatters[0].args[3] if family.kind == "stack" else 0
    if all(_is_part(n, e, family, start) for e, n in enumerate(scatters)):
        total = _total(scatters[0])
        terms = list(_terms(total, total))
        if set(scatters) <= set(terms):
            rest = [term for term in terms if term not in scatters]
            yield total, _sum(whole, scatters[0].args[0], start, rest, total)


# What puts the gradient of a part into that of the whole.
SCATTERS: dict[str, Any] = {
    "rows": aten.slice_scatter.default,
    "stack": aten.select_scatter.default,
}


def _is_cat(node: fx.Node, of: list[fx.Node] | None = None) -> bool:
    """Whether a node is a concatenation along dimension 0, of these nodes if any are given."""
    if node.target is not aten.cat.default or (len(node.args) > 1 and node.args[1] != 0):
        return False
    return of is None or node.args[0] == of


def _is_part(scatter: fx.Node, lane: int, family: Family, first: Any) -> bool:
    """Whether a scatter puts the part of a lane into zeros, where the whole has it."""
    args: Any = (*scatter.args, *([None] * 6))
    zeros, part, dim, *where = args
    if part is not family.nodes[lane] or zeros.target is not aten.full.default:
        return False
    if zeros.args[1] != 0 or dim not in (0, None):
        return False
    if family.kind == "stack":
        return where[0] == first + lane
    rows, ends = family.loop.rows, [0, *accumulate(family.loop.sizes)]
    said = range_of(where, rows)
    wanted = (ends[lane], ends[lane + 1], 1)
    return statically_known_true(shape(zeros)[0] == rows) and all(
        statically_known_true(a == b) for a, b in zip(said, wanted, strict=True)
    )


def _total(node: fx.Node) -> fx.Node:
    """The sum that a term is of, through additions that nobody else reads."""
    while len(node.users) == 1:
        (user,) = node.users
        if not _is_sum(user):
            break
        node = user
    return node


def _is_sum(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and not node.kwargs and len(node.all_input_nodes) == 2


def _terms(node: fx.Node, total: fx.Node) -> Iterator[fx.Node]:
    if _is_sum(node) and (node is total or len(node.users) == 1):
        for term in node.all_input_nodes:
            yield from _terms(term, total)
    else:
        yield node


def _sum(whole: fx.Node, zeros: Any, first: Any, rest: list[fx.Node], before: fx.Node) -> fx.Node:
    """The whole in the place that ``zeros`` has for it, and the other terms of a sum."""
    meta = meta_of(before)
    if not statically_known_true(shape(zeros)[0] == shape(whole)[0]):
        args = (zeros, whole, 0, first, first + shape(whole)[0])
        whole = emit(before, aten.slice_scatter.default, *args, meta=meta)
    for term in rest:
        whole = emit(before, aten.add.Tensor, whole, term, meta=meta)
    return whole
