"""Quantize x, not the rows that are picked from it: quantize(x[rows]) becomes quantize(x)[rows].

    by rows            every token once, not once for every expert that takes it; then rows of one
                       byte an element are gathered, with their scales
    by groups of rows  (what wgrad contracts) the kernel gathers as it reads x

The bits are those of the gathered rows: no scale of the first kind reaches beyond its row, or it
comes with an amax, which is taken of the gathered rows. Requantizing the gathered codes along
tokens was weighed and lost: it reads half the bytes, but rounds twice, which the eager oracle of
the same recipe does not.

16384 tokens of 2048 channels, each taken by 8 experts, on an H200 (torch 2.11): 229 us by rows,
where Inductor fuses gather and quantize in 537 us (by 2 experts: 153, 197 us). For wgrad 195 us
for the amax and 273 us for the copy, 234 and 290 us of rows gathered before, in another 265 us.

Before partitioning, so that what is saved for the backward is x, which is smaller than what is
gathered and which a router's own gradient needs anyway (``lpcompile.placement``).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from lpcompile import gathers, ops
from lpcompile.gathers import Gather
from lpcompile.graph import aten, calls, emit, is_own, meta_of, value

Pick = Callable[[Any, Any], Any]  # of a whole tensor and rows
BY_GROUPS = {
    ops.amax_column_grouped.op,
    ops.amax_tensor_grouped.op,
    ops.quantize_fp8_grouped_t.op,
    ops.quantize_fp8_block_grouped_t.op,
}


def run(graph: fx.Graph) -> int:
    """Hoist what pays, and return how many quantizes were."""
    count = 0
    for node in calls(graph, BY_GROUPS):
        gather = gathers.find(node.args[0])  # type: ignore[arg-type]
        if gather is not None and all(map(is_own, gather.readers())):
            # By name, so that no other operand changes its place.
            node.update_arg(0, gather.source)
            node.update_kwarg("rows", gather.rows(node))
            count += 1
    for node in calls(graph, PICKS):
        gather = gathers.find(node.args[0])  # type: ignore[arg-type]
        if gather is not None and _pays(node, gather):
            _hoist(node, gather)
            count += 1
    return count


def _pays(node: fx.Node, gather: Gather) -> bool:
    """Whether fewer bytes move, an element of x being two of them and a code one.

    Gathered by the loop that quantizes, x is read twice; unless it is gathered in any case.
    """
    few, many = gather.num_rows
    if few is None or many is None:
        return False
    as_it_is = 5 if all(reader.target in PICKS for reader in gather.readers()) else 3
    again = any(_is_alike(user, node) for user in gather.source.users)
    return 2 * many + (0 if again else 3 * few) < as_it_is * many


def _is_alike(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node quantizes the source as another quantizes what is gathered."""
    return user.target is node.target and user.args[1:] == node.args[1:]


def _hoist(node: fx.Node, gather: Gather) -> None:
    rows = gather.rows(node)
    target: Any = node.target
    whole = emit(node, target, gather.source, *node.args[1:], meta=meta_of(node))
    for user in list(node.users):
        pick = _codes(value(user).dtype) if user.args[1] == 0 else PICKS[target]
        made = emit(user, partial(_part, pick, user.args[1]), whole, rows, meta=meta_of(user))
        user.replace_all_uses_with(made)
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _part(pick: Pick, part: Any, whole: Any, rows: Any) -> Any:
    return pick(whole[part], rows)


def _codes(dtype: torch.dtype) -> Pick:
    """Picks rows of values[T, Cp], in words of four codes (8 experts: 230 us, 295 us by bytes)."""

    def pick(whole: Any, rows: Any) -> Any:
        words = aten.view.dtype(whole, torch.int32)
        return aten.view.dtype(aten.index.Tensor(words, [rows]), dtype)

    return pick


def _rows(whole: Any, rows: Any) -> Any:
    return aten.index.Tensor(whole, [rows])


def _columns(whole: Any, rows: Any) -> Any:
    """The same of a matrix whose rows are adjacent in memory, and are to stay so."""
    picked = aten.index.Tensor(aten.permute.default(whole, [1, 0]), [None, rows])
    return aten.permute.default(picked, [1, 0])


def _one(whole: Any, rows: Any) -> Any:
    return whole


# What picks rows of the scales.
PICKS: dict[Any, Pick] = {
    ops.quantize_fp8_row.op: _rows,
    ops.quantize_fp8_tensor.op: _one,
    ops.quantize_fp8_block.op: _columns,
    ops.quantize_mxfp8.op: _rows,
}
