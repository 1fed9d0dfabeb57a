"""Reading and writing joint graphs: what a node is, and new nodes in place.

In the joint graph of AOTAutograd (torch 2.11 to 2.13) every forward node and the backward nodes of
it share ``meta["seq_nr"]``, and the module path stands in ``nn_module_stack`` (forward) or
``fwd_nn_module_stack`` (backward).
"""

import operator
import re
from collections.abc import Callable, Container
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

aten = torch.ops.aten
prims = torch.ops.prims

TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default}
CASTS = {aten._to_copy.default, prims.convert_element_type.default}
# The same elements in another shape, so that identity is kept through them.
VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.expand.default,
}

# The tag of a node that the partitioner must place in the backward.
BACKWARD = "must_be_in_backward"

# What a new node takes over from the GEMM that it replaces: the placement, a user's checkpoint
# policy, and where it came from.
META = (
    "recompute",
    "ac_graph_id",
    "seq_nr",
    "partitioner_tag",
    "autograd_backward",
    "nn_module_stack",
    "fwd_nn_module_stack",
    "stack_trace",
    "custom",
)


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of a graph."""
    return [n for n in graph.nodes if n.op == "placeholder"]


def swaps_last_two(node: fx.Node) -> bool:
    """Whether a node only exchanges the last two dimensions of its input."""
    if node.op != "call_function" or node.target not in TRANSPOSES:
        return False
    dim = len(shape(node))
    args: Any = node.args
    if node.target is aten.t.default:
        return dim == 2
    if node.target is aten.transpose.int:
        return {d % dim for d in args[1:3]} == {dim - 2, dim - 1}
    return [d % dim for d in args[1]] == [*range(dim - 2), dim - 1, dim - 2]


def peel(node: fx.Node) -> tuple[fx.Node, bool]:
    """The node under transposes of the last two dimensions, and whether they leave one."""
    transposed = False
    while swaps_last_two(node):
        node, transposed = node.all_input_nodes[0], not transposed
    return node, transposed


def is_view(node: fx.Node) -> bool:
    """Whether a node is a view, a transpose or a copy: the same elements."""
    return node.target in VIEWS or node.target in TRANSPOSES


def base(node: fx.Node) -> fx.Node:
    """The node under views, transposes and copies."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def root(node: fx.Node) -> fx.Node:
    """The node under views, transposes, copies and casts."""
    while is_view(node) or node.target in CASTS:
        node = node.all_input_nodes[0]
    return node


def value(node: fx.Node) -> torch.Tensor:
    """The fake tensor that a node makes."""
    return node.meta["val"]


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The shape of what a node makes; sizes may be symbolic."""
    return tuple(value(node).shape)


def alike(a: Any, b: Any, *, strides: bool) -> bool:
    """Whether two fake values have one dtype, device and size; only tensors are compared.

    Two sizes that depend on symbols are told apart by their hints where nothing is known of them:
    rounded up to 16 and then to 32 is rounded up to 32, which sympy does not see.
    """
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return isinstance(a, torch.Tensor) == isinstance(b, torch.Tensor)
    if a.dtype != b.dtype or a.device != b.device or a.dim() != b.dim():
        return False
    pairs = [*zip(a.shape, b.shape, strict=True)]
    pairs += zip(a.stride(), b.stride(), strict=True) if strides else []
    return all(statically_known_true(x == y) or _hinted_alike(x, y) for x, y in pairs)


def _hinted_alike(x: Any, y: Any) -> bool:
    return not isinstance(x, int) and not isinstance(y, int) and hint(x) == hint(y) is not None


def hint(size: Any) -> int | None:
    """A size as a number: the hint of a symbolic one, None for an unbacked one. Adds no guard."""
    if isinstance(size, int):
        return size
    return size.node.hint if size.node.has_hint() else None


def num_bytes(node: fx.Node) -> int:
    """Bytes of the tensor that a node makes, by the hints of its sizes; 0 for anything else."""
    made = node.meta.get("val")
    if not isinstance(made, torch.Tensor):
        return 0
    return (hint(made.numel()) or 0) * made.element_size()


def module_path(node: fx.Node) -> str:
    """The path of the module that a node is from, without wrappers; empty for the root."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return clean_path(list(stack.values())[-1][0]) if stack else ""


_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "__self__"}


def clean_path(path: str) -> str:
    """``L['self']._modules['layers'].0._orig_mod.w`` -> ``layers.0.w``."""
    path = re.sub(r"^L\['[^']*'\]", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    parts = [p for p in path.split(".") if p and p != "_modules"]
    return ".".join(p for p in parts if p not in _WRAPPERS)


def meta_of(node: fx.Node, **changed: Any) -> dict[str, Any]:
    """The part of a node's meta that its replacement takes over, with changes."""
    kept = {k: node.meta[k] for k in META if k in node.meta}
    return {**kept, **changed}


class _Emitter(fx.proxy.GraphAppendingTracer):
    """Records calls as nodes that have a fake value and the meta of what they replace."""

    def __init__(self, graph: fx.Graph, meta: dict[str, Any]) -> None:
        super().__init__(graph)
        self.meta, self.fake_mode = meta, fake_mode(graph)

    def create_node(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: Any = None,
        type_expr: Any = None,
    ) -> fx.Node:
        name = _name(target, args) or name
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta = dict(self.meta)
        with self.fake_mode:
            given = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            node.meta["val"] = node.target(*given[0], **given[1])  # type: ignore[operator]
        return node


def fake_mode(graph: fx.Graph) -> Any:
    """The mode of a graph's fake tensors."""
    made = (node.meta.get("val") for node in graph.nodes)
    return next(t.fake_mode for t in made if isinstance(t, FakeTensor))


def emit(
    before: fx.Node, call: Callable[..., Any], /, *args: Any, meta: dict[str, Any], **kwargs: Any
) -> Any:
    """Trace ``call`` into the graph in front of a node: nodes in, nodes out."""
    tracer = _Emitter(before.graph, meta)
    with before.graph.inserting_before(before):
        given: Any = map_arg((args, kwargs), partial(fx.Proxy, tracer=tracer))  # type: ignore[arg-type]
        return _nodes(call(*given[0], **given[1]))


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node at the graph's insertion point, with its fake value."""
    node = graph.call_function(target, args, kwargs)
    with fake_mode(graph):
        node.meta["val"] = target(*map_arg(args, lambda n: n.meta["val"]), **kwargs)
    return node


def replace(node: fx.Node, made: fx.Node) -> None:
    """Put ``made`` in a node's place, under its name, so that a diff shows what changed alone."""
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    made.name = node.name


def _name(target: Any, args: Any) -> str | None:
    """``scaled_mm``, ``values``, ``scales``, where fx says scaled_mm_default and getitem."""
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    if target is operator.getitem and is_own(args[0]) and args[1] < 2:
        return ("values", "scales")[args[1]]
    return None


def _nodes(made: Any) -> Any:
    if isinstance(made, fx.Proxy):
        return made.node
    if isinstance(made, tuple) and hasattr(made, "_fields"):
        return type(made)(*map(_nodes, made))
    return type(made)(map(_nodes, made)) if isinstance(made, (tuple, list)) else made


def calls(graph: fx.Graph, targets: Container[Any]) -> list[fx.Node]:
    """The calls of any of the targets, in graph order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target in targets]


def is_own(node: fx.Node) -> bool:
    """Whether a node calls one of lpcompile's ops."""
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "lpcompile"
