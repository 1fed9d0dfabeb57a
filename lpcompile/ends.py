"""offs[E], where the rows of each expert of a loop end: what a grouped product takes."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lpcompile.graph import aten, call, calls, emit, meta_of, prims, shape, value
from lpcompile.lanes import Loop


def size_of(piece: fx.Node) -> Any:
    """The rows of a slice: a number, or a node that makes it."""
    size = shape(piece)[0]
    if isinstance(size, int):
        return size
    return emit(piece, aten.sym_size.int, piece, 0, meta=meta_of(piece))


def offs_of(loop: Loop) -> fx.Node:
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
            how = {"are_sizes": are_sizes, "device": elsewhere}
            made = emit(last, _from_tensor, counts, **how, meta=meta)
            return made
    make = partial(call, last.graph)
    kind = {"dtype": torch.int32, "device": device}
    with last.graph.inserting_before(last):
        each = [make(aten.scalar_tensor.default, size_of(piece), **kind) for piece in loop.pieces]
        rows = [make(aten.unsqueeze.default, number, 0) for number in each]
        sizes = make(aten.cat.default, rows)
        made = make(aten.cumsum.default, sizes, 0, dtype=torch.int32)
    for node in (*each, *rows, sizes, made):
        node.meta.update(meta)
    return made


def _from_tensor(counts: Any, are_sizes: bool, device: torch.device | None) -> Any:
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
