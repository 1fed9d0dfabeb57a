"""GEMMs that stay in bf16 for what they are, found by structure and not by name.

A router: its output reaches topk, or it gates experts through a softmax. An LM head: it feeds a
softmax or a cross-entropy, or an embedding reads the same weight; or, where the loss is computed
elsewhere and at inference, it has a row for each row of the largest embedding, more of them than
columns, and nothing but functions of its output come out of the graph. Quantizing either changes
which expert a token goes to, or the loss itself, for a GEMM or two of the whole model.

Inductor's decompositions (torch 2.11 to 2.13) leave no softmax in the joint graph: it is
``exp(x - amax(x))`` there, for softmax, log_softmax and cross-entropy alike.
"""

from collections.abc import Iterable

import torch
from torch import fx

from lpcompile.graph import CASTS, aten, hint, root, shape
from lpcompile.sites import MATMULS, Site

SELECTIONS = {aten.topk.default, aten.sort.default, aten.sort.stable}
SOFTMAXES = {
    aten._softmax.default,
    aten._log_softmax.default,
    torch.ops.prims.prepare_softmax_online.default
    if hasattr(torch.ops.prims, "prepare_softmax_online")
    else None,
} - {None}
EMBEDDINGS = {aten.embedding.default, aten._embedding_bag.default}


def find(graph: fx.Graph, sites: list[Site]) -> dict[fx.Node, str]:
    """The forward GEMMs of linears that stay bf16 by structure, with the reason."""
    forward = {s.node: s for s in sites if s.is_linear and s.product == "fprop"}
    reasons: dict[fx.Node, str] = {}
    nodes = list(graph.nodes)
    for node in _behind(n for n in nodes if n.op == "call_function" and n.target in SELECTIONS):
        if node in forward:
            reasons[node] = "a router: its output reaches a top-k"
    for node in _behind(n for n in nodes if _is_softmax(n)):
        if node in forward:
            reasons.setdefault(node, "an LM head or a gate: its output feeds a softmax")
    tables = {
        root(n.args[0])
        for n in nodes
        if n.op == "call_function" and n.target in EMBEDDINGS and isinstance(n.args[0], fx.Node)
    }
    for node, site in forward.items():
        if site.weight is not None and root(site.weight) in tables:
            reasons.setdefault(node, "an LM head: an embedding reads the same weight")
    rows = max((hint(shape(table)[0]) or 0 for table in tables), default=None)
    tall = {n for n, s in forward.items() if s.n == rows and s.n and s.k and s.n > s.k}
    for node in _coming_out(graph, tall):
        reasons.setdefault(node, "an LM head: it has a row for each row of an embedding")
    return reasons


def _coming_out(graph: fx.Graph, products: set[fx.Node]) -> Iterable[fx.Node]:
    """Those products of which an output of the graph is a function, and of nothing else.

    So a block that adds to its input is none, nor what attention reads.
    """
    only_of = {node: node for node in products}
    for node in graph.nodes:
        if node.op == "output":
            return [only_of[n] for n in node.all_input_nodes if n in only_of]
        # Sizes are no data: under dynamic shapes a view reads them.
        inputs = [n for n in node.all_input_nodes if not _is_size(n)]
        if inputs and node not in only_of:
            sources = {only_of.get(n) for n in inputs}
            if len(sources) == 1 and (source := sources.pop()) is not None:
                only_of[node] = source
    return []


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def _is_softmax(node: fx.Node) -> bool:
    """A softmax, or exp(x - amax(x)), which it decomposes into."""
    if node.op != "call_function":
        return False
    if node.target in SOFTMAXES:
        return True
    if node.target is not aten.exp.default:
        return False
    inner = node.all_input_nodes[0]
    if inner.target is not aten.sub.Tensor or len(inner.all_input_nodes) != 2:
        return False
    x, shift = inner.args[:2]
    while isinstance(shift, fx.Node) and shift.target in CASTS:
        shift = shift.all_input_nodes[0]
    return (
        isinstance(shift, fx.Node)
        and shift.target is aten.amax.default
        and shift.all_input_nodes[0] is x
    )


def _behind(nodes: Iterable[fx.Node]) -> Iterable[fx.Node]:
    """The matrix products that the nodes read with no other product between."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in seen or node.op != "call_function":
                continue
            seen.add(node)
            if node.target in MATMULS or _is_barrier(node):
                yield node
            else:
                stack.append(node)


def _is_barrier(node: fx.Node) -> bool:
    """Mixes tokens or features in ways of its own: attention, convolution, a grouped product."""
    name = str(node.target)
    return any(part in name for part in ("attention", "convolution", "grouped_mm", "embedding"))
