"""The work of all lanes done at once: a node for each family, and what reads them put right.

Every product of a weight for each expert becomes ``aten._grouped_mm``. See ``lpcompile.lanes``.
"""

import operator
from collections.abc import Callable
from itertools import takewhile
from typing import Any

import torch
from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx.node import map_arg
from torch.utils.checkpoint import CheckpointPolicy

from lpcompile.ends import offs_of, size_of
from lpcompile.graph import (
    CASTS,
    aten,
    call,
    emit,
    meta_of,
    prims,
    shape,
    swaps_last_two,
    value,
)
from lpcompile.joins import SCATTERS, joined
from lpcompile.lanes import LINEARS, Family, Lanes, Loop, chain_of, stack_of
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
            args = map_arg(first.args, self._whole)
            again = emit(before, _callable(first), *args, **first.kwargs, meta=meta)
            self.wholes[family] = again

    def _whole(self, node: Any) -> fx.Node:
        return self.wholes[self.lanes.at[node][0]] if node in self.lanes.at else node

    def _product(self, family: Family, before: fx.Node) -> fx.Node:
        first, loop = family.nodes[0], family.loop
        if loop not in self._offs:
            self._offs[loop] = offs_of(loop)
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
                again, args, kwargs = _callable(node), node.args[1:], node.kwargs
                if swaps_last_two(node):
                    again, args, kwargs = aten.permute.default, (STACKED,), {}
                self._made[key] = emit(before, again, whole, *args, **kwargs, meta=meta_of(node))
            whole = self._made[key]
        return whole

    def finish(self) -> None:
        """Hand out the wholes to who reads all lanes, and their parts to who reads one."""
        for family, whole in self.wholes.items():
            if family.base is None and family.kind in SCATTERS:
                for node, made in list(joined(family, whole)):
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
                sizes = [size_of(piece) for piece in family.loop.pieces]
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
        rows = call(y.graph, prims.iota.default, size_of(y), start=0, step=1, **kind)
    rows.meta.update(meta)
    added: fx.Node = emit(before, _with_bias, y, biases, rows, offs, meta=meta)
    return added


def _with_bias(y: Any, biases: Any, rows: Any, offs: Any) -> Any:
    group = aten.bucketize.Tensor(rows, offs, right=True)
    return aten.add.Tensor(y, aten.index.Tensor(biases, [group]))
