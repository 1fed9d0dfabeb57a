"""What a cut joint graph saves for its backward, in bytes, weights not counted."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from lpcompile.flow import Flow, Leaves
from lpcompile.graph import module_path, num_bytes


def copy(graph: fx.Graph) -> fx.Graph:
    """A graph of its own nodes, with the same metas, to be cut beside the rewritten one."""
    made = fx.Graph()
    made.output(made.graph_copy(graph, {}))
    old, new = graph.output_node(), made.output_node()
    new.meta = dict(old.meta)
    return made


def nodes(forward: fx.Graph, num_outputs: int) -> list[fx.Node]:
    """The nodes that a forward graph hands to its backward."""
    (outputs,) = forward.output_node().args
    return [n for n in outputs[num_outputs:] if isinstance(n, fx.Node)]  # type: ignore[index,union-attr]


@dataclass(frozen=True)
class Saved:
    """One tensor that the forward hands to its backward; num_bytes of a symbolic size by its hint.

    kind: "activation"; "weight" and "buffer", which cost nothing, nor does the amax of one; "alias"
        of a storage that is counted already; "size" for what is no tensor.
    """

    name: str
    kind: str
    module: str
    dtype: str
    shape: tuple[Any, ...]
    num_bytes: int


def find(forward: fx.Graph, leaves: Leaves, num_outputs: int) -> list[Saved]:
    """What is saved, largest first."""
    flow = Flow(forward, leaves)
    counted: set[StorageWeakRef] = set()
    found = []
    # The largest of a storage is the one that counts.
    for node in sorted(nodes(forward, num_outputs), key=num_bytes, reverse=True):
        made = node.meta.get("val")
        if not isinstance(made, torch.Tensor):
            found.append(Saved(node.name, "size", "", "", (), 0))
            continue
        key = StorageWeakRef(made.untyped_storage())
        if node in flow.weights or node in flow.constants:
            kind = "weight" if node in flow.weights else "buffer"
        else:
            kind = "alias" if key in counted else "activation"
            counted.add(key)
        dtype, size = str(made.dtype).removeprefix("torch."), num_bytes(node)
        found.append(Saved(node.name, kind, module_path(node), dtype, tuple(made.shape), size))
    return found


def total(found: Iterable[Saved]) -> int:
    """The bytes that count: the activations'."""
    return sum(s.num_bytes for s in found if s.kind == "activation")


def table(found: Sequence[Saved]) -> str:
    """A line for each, and the total."""
    rows = [("name", "kind", "dtype", "shape", "bytes", "module")]
    for s in found:
        shape = ", ".join(map(str, s.shape))
        rows.append((s.name, s.kind, s.dtype, f"[{shape}]", f"{s.num_bytes:,}", s.module))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(w) if i == 4 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, f"activations: {total(found):,} bytes", ""])
