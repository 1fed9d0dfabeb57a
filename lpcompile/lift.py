"""The work of all lanes done at once: a node for each family, and what reads them put right.

Every product of a weight for each expert becomes ``aten._grouped_mm``. See ``lpcompile.lanes``.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, takewhile
from typing import Any

import torch
from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg
from torch.utils.checkpoint import CheckpointPolicy

from lpcompile.graph import (
    CASTS,
    aten,
    call,
    calls,
    emit,
    meta_of,
    prims,
    shape,
    swaps_last_two,
    value,
)
from lpcompile.lanes import LINEARS, Family, Lanes, Loop, chain_of, range_of, stack_of
from lpcompile.sites import operands

STACKED = [0, 2, 1]  # what swaps the last two dimensions of a stack


def is_product(family: Family) -> bool:
    """Whether its nodes are matrix products."""
    return family.nodes[0].target in LINEARS


def weights_of(family: Family) -> list[fx.Node]:
    """The weight of every expert, in a family of products with one."""
    return [operands(n)[1] for n in family.nodes] if family.kind == "rows" else []


def common_stack(weights: list[fx.Node], lanes: Lanes) -> tuple[fx.Node, int] | None:
    """The stack that weights are of, one after another, and the first of them; or None."""
    found = [stack_of(w, lanes) for w in weights]
    if not found or found[0] is None:
        return None
    stack, first = found[0]
    in_order = found == [(stack, first + e) for e in range(len(found))]
    return (stack, first) if in_order else None


class Lift:
    """Add the families of loops, in order; then finish.

    New nodes stand in front of old ones, whose fake tensors they are made beside; the order in
    which they can be computed is that of ``finish``.
    """

    def __init__(self, graph: fx.Graph, lanes: Lanes) -> None:
        self.graph, self.lanes = graph, lanes
        self.wholes: dict[Family, fx.Node] = {}
        self.products: dict[Family, fx.Node] = {}
        self._offs: dict[Loop, fx.Node] = {}
        self._made: dict[Any, fx.Node] = {}  # of weights: dgrad's is what fprop's was

    def add(self, family: Family) -> None:
        """Make what all nodes of a family make together."""
        if family.base is not None:
            self.wholes[family] = family.base
            return
        before, first = max(family.nodes), family.nodes[0]
        meta = meta_of(first)
        if is_product(family):
            self.wholes[family] = self._product(family, before)
        elif swaps_last_two(first):
            dims = STACKED if family.kind == "stack" else [1, 0]
            whole = self._whole(first.args[0])
            self.wholes[family] = emit(before, aten.permute.default, whole, dims, meta=meta)
        else:
            again = partial(_callable(first), **first.kwargs)
            args = map_arg(first.args, self._whole)
            self.wholes[family] = emit(before, again, *args, meta=meta)

    def _whole(self, node: Any) -> fx.Node:
        return self.wholes[self.lanes.at[node][0]] if node in self.lanes.at else node

    def _product(self, family: Family, before: fx.Node) -> fx.Node:
        first, loop = family.nodes[0], family.loop
        if loop not in self._offs:
            self._offs[loop] = _offs(loop)
        offs, meta = self._offs[loop], meta_of(first)
        a, b = operands(first)
        if family.kind == "rows":
            weights = [operands(n)[1] for n in family.nodes]
            other = self._of_all(weights, before)
        else:
            other = self._whole(b)
        made: fx.Node = emit(
            before, aten._grouped_mm.default, self._whole(a), other, offs, meta=meta
        )
        self.products[family] = made
        if first.target is aten.addmm.default:
            biases = self._of_all([n.args[0] for n in family.nodes], before)
            made = _plus_bias(made, biases, offs, before)
        return made

    def _of_all(self, weights: list[Any], before: fx.Node) -> fx.Node:
        """The weights, or biases, of all experts in one, under the transposes and casts of one."""
        found = common_stack(weights, self.lanes)
        chain = list(chain_of(weights[0]))
        if found is None:  # casts come before the copy, transposes after it
            chain = list(takewhile(swaps_last_two, chain))
        for _ in chain:
            weights = [w.all_input_nodes[0] for w in weights]
        key = tuple(self.lanes.same.get(w, w) for w in weights)
        if key not in self._made:
            self._made[key] = (
                _stacked(weights, before)
                if found is None
                else _experts(*found, len(weights), before)
            )
        whole = self._made[key]
        for node in reversed(chain):
            key = (self.lanes.same.get(node, node),)
            if key not in self._made:
                again: Any = partial(_callable(node), **node.kwargs)
                args = node.args[1:]
                if swaps_last_two(node):
                    again, args = aten.permute.default, (STACKED,)
                self._made[key] = emit(before, again, whole, *args, meta=meta_of(node))
            whole = self._made[key]
        return whole

    def finish(self) -> None:
        """Hand out the wholes to who reads all lanes, and their parts to who reads one."""
        for family, whole in self.wholes.items():
            if family.base is None and family.kind in SCATTERS:
                for node, made in list(_joined(family, whole)):
                    node.replace_all_uses_with(made)
        stable_topological_sort(self.graph)
        self._erase_dead()
        for family, whole in self.wholes.items():
            if family.base is None and family.kind in SCATTERS:
                self._hand_out(family, whole)
        stable_topological_sort(self.graph)

    def _erase_dead(self) -> None:
        """Erase what nobody reads any more, but for the wholes, of which parts may be read yet."""
        wholes = set(self.wholes.values())
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node not in wholes and not node.is_impure():
                self.graph.erase_node(node)

    def _hand_out(self, family: Family, whole: fx.Node) -> None:
        """Replace the nodes of single lanes that somebody outside the lanes still reads."""
        parts: Any = None
        for lane, node in enumerate(family.nodes):
            readers = [u for u in node.users if u not in self.lanes.at]
            if not readers:
                continue
            if family.kind == "rows" and parts is None:
                sizes = [_size(piece) for piece in family.loop.pieces]
                args = (aten.split_with_sizes.default, whole, sizes)
                parts = emit(whole, *args, meta=meta_of(whole))
            if parts is None:
                part = emit(node, aten.select.int, whole, 0, lane, meta=meta_of(node))
            else:
                part = emit(node, operator.getitem, parts, lane, meta=meta_of(node))
            for reader in readers:
                reader.replace_input_with(node, part)


def _callable(node: fx.Node) -> Callable[..., Any]:
    """The op that a call_function node calls."""
    target: Any = node.target
    return target


def _experts(stack: fx.Node, first: int, num: int, before: fx.Node) -> fx.Node:
    """Experts ``first`` to ``first + num`` of a stack of weights."""
    if num == shape(stack)[0]:
        return stack
    args = (aten.slice.Tensor, stack, 0, first, first + num)
    part: fx.Node = emit(before, *args, meta=meta_of(before))
    return part


def _stacked(weights: list[fx.Node], before: fx.Node) -> fx.Node:
    """Weights in a stack of their own, which the backward makes again, as it does their casts."""
    for weight in weights:
        if weight.target in CASTS:
            weight.meta.setdefault("recompute", CheckpointPolicy.MUST_RECOMPUTE)
    meta = meta_of(weights[0], recompute=CheckpointPolicy.MUST_RECOMPUTE)
    stacked: fx.Node = emit(before, _stack, weights, meta=meta)
    return stacked


def _stack(weights: list[Any]) -> Any:
    return aten.cat.default([aten.unsqueeze.default(w, 0) for w in weights])


def _plus_bias(y: fx.Node, biases: fx.Node, offs: fx.Node, before: fx.Node) -> fx.Node:
    """y[T, N] and, by the group of each row, biases[E, N]."""
    meta = meta_of(y)
    kind = {"dtype": torch.int32, "device": value(y).device, "requires_grad": False}
    with y.graph.inserting_before(before):
        rows = call(y.graph, prims.iota.default, _size(y), start=0, step=1, **kind)
    rows.meta.update(meta)
    added: fx.Node = emit(before, _with_bias, y, biases, rows, offs, meta=meta)
    return added


def _with_bias(y: Any, biases: Any, rows: Any, offs: Any) -> Any:
    group = aten.bucketize.Tensor(rows, offs, right=True)
    return aten.add.Tensor(y, aten.index.Tensor(biases, [group]))


def _joined(family: Family, whole: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
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


def _size(piece: fx.Node) -> Any:
    """The rows of a slice: a number, or a node that makes it."""
    size = shape(piece)[0]
    if isinstance(size, int):
        return size
    return emit(piece, aten.sym_size.int, piece, 0, meta=meta_of(piece))


def _offs(loop: Loop) -> fx.Node:
    """offs[E] int32, where the rows of each expert end.

    From the tensor whose elements the sizes, or the ends, are, if there is one; else put together
    from E numbers, which takes a kernel for each.
    """
    last = max(loop.pieces)
    meta, device = meta_of(last), value(last).device
    ends = list(accumulate(loop.sizes))
    made: fx.Node
    for numbers, are_sizes in ((loop.sizes, True), (ends, False)):
        counts = _elements(last.graph, numbers)
        if counts is not None:
            elsewhere = device if value(counts).device != device else None
            bring = partial(_offs_from, are_sizes=are_sizes, device=elsewhere)
            made = emit(last, bring, counts, meta=meta)
            return made
    make = partial(call, last.graph)
    kind = {"dtype": torch.int32, "device": device}
    with last.graph.inserting_before(last):
        each = [make(aten.scalar_tensor.default, _size(piece), **kind) for piece in loop.pieces]
        rows = [make(aten.unsqueeze.default, number, 0) for number in each]
        sizes = make(aten.cat.default, rows)
        made = make(aten.cumsum.default, sizes, 0, dtype=torch.int32)
    for node in (*each, *rows, sizes, made):
        node.meta.update(meta)
    return made


def _offs_from(counts: Any, are_sizes: bool, device: torch.device | None) -> Any:
    if device is not None:
        counts = prims.device_put.default(counts, device)
    if are_sizes:
        return aten.cumsum.default(counts, 0, dtype=torch.int32)
    return prims.convert_element_type.default(counts, torch.int32)


def _elements(graph: fx.Graph, numbers: Sequence[Any]) -> fx.Node | None:
    """The tensor [E] whose elements these numbers are, brought to the host one by one, or None."""
    found: dict[fx.Node, dict[int, Any]] = defaultdict(dict)
    for node in calls(graph, {aten._local_scalar_dense.default}):
        element = node.all_input_nodes[0]
        index = element.args[2] if element.target is aten.select.int else None
        if isinstance(index, int) and shape(element.all_input_nodes[0]) == (len(numbers),):
            found[element.all_input_nodes[0]][index % len(numbers)] = node.meta["val"]
    for counts, by_index in found.items():
        pairs = [(by_index.get(e), n) for e, n in enumerate(numbers)]
        if all(a is not None and statically_known_true(a == b) for a, b in pairs):
            return counts
    return None
