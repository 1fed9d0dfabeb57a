"""What a cut joint graph saves for its backward, in bytes, weights not counted."""

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from lpcompile.graph import Flow, Leaves


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


def num_bytes(forward: fx.Graph, leaves: Leaves, num_outputs: int) -> int:
    """Bytes of the saved tensors; of a storage saved twice once, of weights and buffers nothing."""
    flow = Flow(forward, leaves)
    sizes: dict[StorageWeakRef, int] = {}
    for node in nodes(forward, num_outputs):
        made = node.meta.get("val")
        if not isinstance(made, torch.Tensor) or node in flow.weights or node in flow.constants:
            continue
        key = StorageWeakRef(made.untyped_storage())
        sizes[key] = max(sizes.get(key, 0), int(made.numel()) * made.element_size())
    return sum(sizes.values())
