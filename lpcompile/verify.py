"""Check a graph between two passes, and the two that it is cut into. VerifyError says what broke.

    after a pass     every node makes what its op makes of its inputs, to the dtype and size (ops of
                     lpcompile: to the stride); the graph's outputs stay what they were; no quantize
                     that nobody reads; a product has the meta of the GEMM that it replaced; what
                     quantizes a weight for the backward is placed there
    after the cut    no copy of a weight is saved that a quantize made, or a cast for a quantize

A weight that the model computes (weight norm, a merged adapter) may be saved, as in bf16: min-cut
weighs it against computing it again, and lpcompile adds nothing to it. What it adds is narrow
copies and readers of a master weight's cast, and those it makes again in the backward. The amax of
a weight is no copy: it may be saved, and is, when CSE finds that forward and backward both take it.
"""

import operator
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg
from torch.multiprocessing.reductions import StorageWeakRef

from lpcompile import ops, saved
from lpcompile.errors import VerifyError
from lpcompile.flow import Flow, Leaves
from lpcompile.graph import BACKWARD, META, TRANSPOSES, alike, aten, is_own, is_view, root
from lpcompile.ops.define import PRODUCTS

# Their fake outputs are new symbols at every call.
UNREPEATABLE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
# Between a quantize and its product: which part of it, and which rows of that.
THROUGH = {operator.getitem, aten.index.Tensor, aten.view.dtype, *TRANSPOSES}
# May be taken in the forward for the backward, and are saved then.
OF_WEIGHTS = {ops.amax_column.op, ops.amax_tensor.op}
# In the meta of an op that the user called, as ``lpcompile.linear`` does: no pass placed it.
GIVEN = "lowprec_given"
# A quantize has these of the product that it is for; when it runs may differ.
PLACEMENT = {"partitioner_tag", "recompute"}


@dataclass(frozen=True)
class Before:
    """What a pass must keep: the metas of calls by name, the outputs, and what calls were made of.

    A call that is still that is as right as it was, and is not made again: to make all of them
    again after every pass took as long as the passes.
    """

    metas: dict[str, dict[str, Any]]
    outputs: list[Any]
    calls: dict[fx.Node, list[Any]]

    @classmethod
    def of(cls, graph: fx.Graph) -> "Before":
        """Taken before the pass runs."""
        calls = {n: _parts(n) for n in graph.nodes if n.op == "call_function"}
        return cls({n.name: dict(n.meta) for n in calls}, _outputs(graph), calls)

    def __contains__(self, node: fx.Node) -> bool:
        """Whether the graph had this call, of the same arguments and fake values."""
        pairs = zip(_parts(node), self.calls.get(node, ()), strict=False)
        return node in self.calls and all(part is was for part, was in pairs)


def begin(graph: fx.Graph) -> None:
    """Tell apart, before any pass, the ops that the user called from those that passes make."""
    for node in filter(is_own, graph.nodes):
        node.meta[GIVEN] = True


def passed(graph: fx.Graph, name: str, before: Before, leaves: Leaves | None = None) -> None:
    """Check a graph after pass ``name``.

    leaves: of a joint graph, or of a forward without a backward before code generation. After that
    Inductor has had its way with the metas of its own ops, so lpcompile's alone are checked.
    """
    changed = [node for node in graph.nodes if node not in before]
    problems = [_wrong_values(changed, own=leaves is None), _wrong_outputs(graph, before)]
    problems.append(_dead(graph))
    if leaves is not None:
        problems += [_lost_metas(graph, before), _misplaced(graph, Flow(graph, leaves))]
    for problem in chain(*problems):
        raise _error(f"after pass {name!r}", problem)


def cut(forward: fx.Graph, backward: fx.Graph, leaves: Leaves, num_outputs: int) -> None:
    """Check a forward graph of ``num_outputs`` outputs of the user's, and its backward."""
    for graph, name in ((forward, "forward"), (backward, "backward")):
        # Inductor has passes of its own before the cut, which leave metas of its ops behind.
        for problem in (*_wrong_values(graph.nodes, own=True), *_dead(graph)):
            raise _error(f"in the {name} graph", problem)
    for problem in _weight_copies(forward, backward, leaves, num_outputs):
        raise _error("after partitioning", problem)


def _error(where: str, problem: str) -> VerifyError:
    return VerifyError(
        f"{where}: {problem}. This is a bug of lpcompile: please report it, with the files that "
        "options={'dump': 'folder'} writes"
    )


def _wrong_values(nodes: Iterable[Any], own: bool) -> Iterator[str]:
    """Nodes, or lpcompile's own, whose fake value is not what their op makes of their inputs'."""
    for node in nodes:
        if node.target is operator.getitem and is_own(node.args[0]):
            made = _flat(_fake(node.args[0]))[node.args[1]]
            if not alike(_fake(node), made, strides=True):
                yield f"{node.name} is {_show(_fake(node))}, and is part of {_show(made)}"
        if not _is_repeatable(node) or (own and not is_own(node)):
            continue
        try:
            made = _remade(node)
        except Exception as error:
            yield f"{node.format_node()} does not take its inputs: {error}"
            continue
        for is_, should in zip(_flat(_fake(node)), _flat(made), strict=True):
            if not alike(is_, should, strides=is_own(node)):
                yield f"{_call(node)} is {_show(is_)}, and its op makes {_show(should)}"


def _remade(node: fx.Node) -> Any:
    """What a call makes of the fake values of its inputs. Adds no guard."""
    mode = next((t.fake_mode for t in _tensors(_fake(node)) if hasattr(t, "fake_mode")), None)
    args, kwargs = map_arg((node.args, node.kwargs), _fake)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if mode is not None:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_repeatable(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace in ("aten", "prims", "lpcompile")
        and not node.target._schema.is_mutable
        and not UNREPEATABLE & set(node.target.tags)
        and "val" in node.meta
        and not _makes_sizes(node)
    )


def _makes_sizes(node: fx.Node) -> bool:
    """Whether a call makes a new symbol for a size that it does not know, at every call another.

    Slices between such sizes do (torch 2.11).
    """
    made = [free_unbacked_symbols(t) for t in _tensors(_fake(node))]
    given = [free_unbacked_symbols(_fake(i)) for i in node.all_input_nodes if "val" in i.meta]
    return bool(set().union(*made) - set().union(*given))


def _wrong_outputs(graph: fx.Graph, before: Before) -> Iterator[str]:
    outputs = _outputs(graph)
    if len(outputs) != len(before.outputs):
        yield f"the graph has {len(outputs)} outputs, it had {len(before.outputs)}"
        return
    for i, (is_, was) in enumerate(zip(outputs, before.outputs, strict=True)):
        if not alike(is_, was, strides=False):
            yield f"output {i} of the graph is {_show(is_)}, it was {_show(was)}"


def _dead(graph: fx.Graph) -> Iterator[str]:
    """Calls of lpcompile's ops that nobody reads; min-cut may save the values, not the scales."""
    for node in filter(is_own, graph.nodes):
        several = isinstance(node.meta.get("val"), (tuple, list))
        if not any(u.users for u in node.users) if several else not node.users:
            yield f"nobody reads what {_call(node)} makes"


def _lost_metas(graph: fx.Graph, before: Before) -> Iterator[str]:
    """Products without the meta of the GEMM they replaced; quantizes without that of a product."""
    own = list(filter(is_own, graph.nodes))
    for node in own:
        lost = _differing(node.meta, before.metas.get(node.name, node.meta), set())
        if lost:
            yield f"{_call(node)} has another {lost} than the call that it replaced"
    for node in filter(_is_made, own):
        products = [] if node.target in PRODUCTS else list(_products(node))
        losses = [_differing(node.meta, p.meta, PLACEMENT) for p in products]
        if losses and all(losses):
            yield f"{_call(node)} has another {losses[0]} than {products[0].name}, its product"


def _differing(meta: dict[str, Any], other: dict[str, Any], but: set[str]) -> str:
    return ", ".join(k for k in META if k not in but and meta.get(k) != other.get(k))


def _misplaced(graph: fx.Graph, flow: Flow) -> Iterator[str]:
    """Quantizes of a weight that run in the other direction than the products they are for."""
    late: set[fx.Node] = set()  # tagged, or computed from what is
    for node in graph.nodes:
        tag = node.meta.get("partitioner_tag")
        if tag == BACKWARD or any(i in late for i in node.all_input_nodes):
            late.add(node)
        if not _is_made(node) or node not in flow.weights or node.target in OF_WEIGHTS:
            continue
        products = list(_products(node))
        if products and all(p in flow.gradients for p in products) and node not in late:
            yield (
                f"{_call(node)} narrows a weight for the backward alone, its partitioner_tag is "
                f"{tag!r} where {BACKWARD!r} is needed"
            )
        if any(p not in flow.gradients for p in products) and node in late:
            yield f"{_call(node)} narrows a weight for the forward and is tagged {BACKWARD!r}"


def _products(node: fx.Node) -> Iterator[fx.Node]:
    """The products that a quantize, or a part of one, is for."""
    for user in node.users:
        if user.target in PRODUCTS:
            yield user
        elif user.kwargs.get("columns") is node:
            continue  # an amax is for those who narrow under it
        elif user.target in THROUGH or is_own(user):
            yield from _products(user)


def _weight_copies(
    forward: fx.Graph, backward: fx.Graph, leaves: Leaves, num_outputs: int
) -> Iterator[str]:
    flow = Flow(forward, leaves)
    inputs = {_storage(n) for n in forward.nodes if n.op == "placeholder"} - {None}
    received = {n.name: n for n in backward.nodes if n.op == "placeholder"}
    for node in saved.nodes(forward, num_outputs):
        if node not in flow.weights or _storage(node) in inputs:
            continue
        if node.target is operator.getitem and _is_made(node.all_input_nodes[0]):
            if node.args[1] == 0:
                yield (
                    f"{node.name} is saved for the backward, and {_call(node.all_input_nodes[0])} "
                    "made it of a weight"
                )
        elif root(node).op == "placeholder" and _feeds_own(received.get(node.name)):
            yield (
                f"{node.name} = {_call(node)} is saved for a quantize in the backward, and is a "
                f"copy of the weight {root(node).name}"
            )


def _feeds_own(node: fx.Node | None) -> bool:
    """Whether one of lpcompile's ops reads a node, through views of it."""
    if node is None:
        return False
    return any(_is_made(u) or (is_view(u) and _feeds_own(u)) for u in node.users)


def _is_made(node: fx.Node) -> bool:
    """Whether a pass of lpcompile made a node."""
    return is_own(node) and GIVEN not in node.meta


def _storage(node: fx.Node) -> StorageWeakRef | None:
    made = node.meta.get("val")
    return StorageWeakRef(made.untyped_storage()) if isinstance(made, Tensor) else None


def _outputs(graph: fx.Graph) -> list[Any]:
    (outputs,) = graph.output_node().args
    return [_fake(n) if isinstance(n, fx.Node) else n for n in outputs]  # type: ignore[union-attr]


def _parts(node: fx.Node) -> list[Any]:
    """What a call is: its op and arguments, and the fake values that it makes and reads."""
    return [node.target, node.args, node.kwargs, _fake(node), *map(_fake, node.all_input_nodes)]


def _fake(node: fx.Node) -> Any:
    return node.meta.get("val")


def _flat(made: Any) -> list[Any]:
    return list(made) if isinstance(made, (tuple, list)) else [made]


def _tensors(made: Any) -> list[Tensor]:
    return [t for t in _flat(made) if isinstance(t, Tensor)]


def _show(made: Any) -> str:
    if not isinstance(made, Tensor):
        return type(made).__name__
    return f"{made.dtype} {list(made.shape)} of strides {list(made.stride())}"


def _call(node: fx.Node) -> str:
    return f"{node.name} = {node.target}"
