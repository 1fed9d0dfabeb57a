"""Rows picked from a tensor, as the routing of tokens to experts spells it: x[T, C] -> [R, C].

x[rows], torch.index_select(x, 0, rows), torch.gather(x, 0, rows[:, None].expand(-1, C)); rows of
any shape, if what is picked is then seen as a matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._prims_common import is_contiguous_or_false
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lpcompile.cones import RESHAPES
from lpcompile.graph import TRANSPOSES, aten, emit, hint, meta_of, shape, value

SCALINGS = ("fp32", "pow2")  # of formats whose quantizers of groups gather as they read


@dataclass(frozen=True)
class Gather:
    """``node`` is source[index], row by row.

    index: integers of any shape, or [R, 1] as ``torch.gather`` has them before they are expanded.
    """

    node: fx.Node
    source: fx.Node
    index: fx.Node

    @property
    def num_rows(self) -> tuple[int | None, int | None]:
        """Rows of the source and rows that are picked, by their hints."""
        return hint(shape(self.source)[0]), hint(value(self.index).numel())

    def rows(self, before: fx.Node) -> fx.Node:
        """rows[R], in front of a node."""
        if len(shape(self.index)) == 1:
            return self.index
        rows: fx.Node = emit(before, aten.view.default, self.index, [-1], meta=meta_of(self.node))
        return rows

    def readers(self) -> Iterator[fx.Node]:
        """Who reads what is picked, through views of it."""
        return _readers(self.node)


def find(x: fx.Node) -> Gather | None:
    """The Gather that makes the matrix x, or None."""
    node, columns = x, shape(x)[-1]
    while node.target in RESHAPES and statically_known_true(shape(node)[-1] == columns):
        node = node.all_input_nodes[0]
    found = _picks(node) if node.op == "call_function" else None
    if found is None:
        return None
    source, index = found
    is_matrix = len(shape(source)) == 2 and statically_known_true(shape(source)[1] == columns)
    of_rows = value(index).dtype in (torch.int64, torch.int32)
    if is_matrix and of_rows and is_contiguous_or_false(value(index)):
        return Gather(node, source, index)
    return None


def _picks(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What a call picks rows from, and which."""
    args = node.args
    if node.target is aten.index.Tensor:
        indices: Any = args[1]
        return (args[0], indices[0]) if len(indices) == 1 else None  # type: ignore[return-value]
    if node.target is aten.index_select.default and args[1] == 0:
        return args[0], args[2]  # type: ignore[return-value]
    if node.target is aten.gather.default and args[1] in (0, -2):
        index = args[2]
        if isinstance(index, fx.Node) and index.target is aten.expand.default:
            rows = index.all_input_nodes[0]
            if len(shape(rows)) == 2 and statically_known_true(shape(rows)[1] == 1):
                return args[0], rows  # type: ignore[return-value]
    return None


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if user.target in RESHAPES or user.target in TRANSPOSES:
            yield from _readers(user)
        else:
            yield user
