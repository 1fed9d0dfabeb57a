"""Who is a weight and who a gradient: what every node of a graph depends on.

In the joint graph of AOTAutograd (torch 2.11 to 2.13) a placeholder's ``meta["desc"]`` says which
input of the Dynamo graph it came from. A graph that a higher-order op calls (a nested compile
region, a branch of ``torch.cond``) has no such thing: its inputs are known by their order, and it
by their sizes. Looking at the graph that calls it was tried and lost: Inductor's passes run on the
inner graph first, and it does not know its caller.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from lpcompile.graph import hint, module_path, placeholders, value

Sizes = tuple[tuple[tuple[int | None, ...], torch.dtype], ...]


@dataclass(frozen=True)
class Called:
    """What a graph that a higher-order op calls is told by, and what its inputs are everywhere.

    sizes: of its tensor inputs. AOTAutograd describes the inputs of the whole graph alone, and
        names those of a called one anew, but keeps their order (torch 2.11 to 2.13).
    modules: the paths of those that read an input, by its index.
    """

    sizes: Sizes
    parameters: frozenset[int]
    buffers: frozenset[int]
    modules: tuple[tuple[int, str], ...]

    @property
    def priority(self) -> int:
        """The most inputs first: a backward takes those of its forward, then the tangents."""
        return -len(self.sizes)


@dataclass(frozen=True)
class Leaves:
    """Which inputs of the Dynamo graph, by index, are parameters and which buffers.

    called: the same of every graph that a higher-order op in it calls.
    guessed: no input is a Parameter, so that matrices which require grad are taken for some.
    """

    parameters: frozenset[int]
    buffers: frozenset[int] = frozenset()
    called: tuple[Called, ...] = ()
    guessed: bool = False

    @classmethod
    def of(cls, gm: fx.GraphModule, example_inputs: Iterable[Any]) -> "Leaves":
        """Read off a Dynamo graph and its example inputs.

        With no Parameter among them, as under functional_call, matrices that require grad are
        taken for parameters: those that nothing made, if there are any, since others are made by
        the layers before.
        """
        inputs = list(example_inputs)
        parameters = {i for i, x in enumerate(inputs) if isinstance(x, torch.nn.Parameter)}
        if guessed := not parameters:
            matrices = {
                i
                for i, x in enumerate(inputs)
                if isinstance(x, torch.Tensor) and x.requires_grad and x.dim() in (2, 3)
            }
            parameters = {i for i in matrices if inputs[i].is_leaf} or matrices
        buffers = {
            i
            for i, n in enumerate(placeholders(gm.graph))
            if "_dynamo_static_input_type" in n.meta.get("tensor_dict", {}) and i not in parameters
        }
        found: dict[Sizes, Called] = {}
        _find_called(gm, parameters, buffers, found)
        called = tuple(sorted(found.values(), key=lambda c: c.priority))
        return cls(frozenset(parameters), frozenset(buffers), called, guessed)


def _find_called(
    gm: fx.GraphModule,
    parameters: Container[int],
    buffers: Container[int],
    found: dict[Sizes, Called],
) -> None:
    """Follow parameters and buffers from a Dynamo graph into those that its nodes call."""
    weights: set[fx.Node] = set()
    constants: set[fx.Node] = set()
    for i, node in enumerate(placeholders(gm.graph)):
        if i in parameters:
            weights.add(node)
        elif i in buffers:
            constants.add(node)
    for node in gm.graph.nodes:
        given = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if given and all(n in weights or n in constants for n in given):
            (weights if any(n in weights for n in given) else constants).add(node)
        bodies = [
            getattr(gm, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"
        ]
        for body in (b for b in bodies if isinstance(b, fx.GraphModule)):
            _enter(body, node, weights, constants, found)


def _enter(
    body: fx.GraphModule,
    call: fx.Node,
    weights: set[fx.Node],
    constants: set[fx.Node],
    found: dict[Sizes, Called],
) -> None:
    inputs = placeholders(body.graph)
    operands: list[fx.Node] = []  # with repeats; a condition may stand before what the body takes
    map_arg(call.args, lambda n: operands.append(n) if n.op != "get_attr" else None)
    operands = operands[-len(inputs) :] if inputs else []
    if len(operands) != len(inputs):
        return
    _find_called(
        body,
        {i for i, n in enumerate(operands) if n in weights},
        {i for i, n in enumerate(operands) if n in constants},
        found,
    )
    tensors = [
        (n, o)
        for n, o in zip(operands, inputs, strict=True)
        if isinstance(o.meta.get("example_value"), torch.Tensor)
    ]
    sizes = _sizes(o.meta["example_value"] for _, o in tensors)
    of_weights = frozenset(i for i, (n, _) in enumerate(tensors) if n in weights)
    of_buffers = frozenset(i for i, (n, _) in enumerate(tensors) if n in constants)
    modules = {i: module_path(user) for i, (_, o) in enumerate(tensors) for user in o.users}
    if sizes in found:  # a weight is one wherever graphs of these sizes are called
        of_weights &= found[sizes].parameters
        of_buffers &= found[sizes].buffers
        modules |= dict(found[sizes].modules)
    found[sizes] = Called(sizes, of_weights, of_buffers, tuple(modules.items()))


def _sizes(tensors: Iterable[torch.Tensor]) -> Sizes:
    return tuple((tuple(map(hint, t.shape)), t.dtype) for t in tensors)


class Flow:
    """What every node of a graph depends on: a tangent, parameters alone, neither."""

    def __init__(self, graph: fx.Graph, leaves: Leaves) -> None:
        self.guessed = leaves.guessed
        self.gradients: set[fx.Node] = set()
        self.weights: set[fx.Node] = set()
        self.constants: set[fx.Node] = set()  # of buffers and nothing else: they decide nothing
        self.modules: dict[fx.Node, str] = {}  # that read an input of a called graph
        if is_called(graph):
            self._enter(graph, leaves)
        for node in graph.nodes:
            inputs = node.all_input_nodes
            if node.op == "placeholder":
                index = input_index(node)
                if is_tangent(node):
                    self.gradients.add(node)
                elif index in leaves.parameters:
                    self.weights.add(node)
                elif index in leaves.buffers:
                    self.constants.add(node)
            elif any(i in self.gradients for i in inputs):
                self.gradients.add(node)
            elif all(i in self.weights or i in self.constants for i in inputs):
                of_weights = any(i in self.weights for i in inputs)
                (self.weights if of_weights else self.constants).add(node)

    def _enter(self, graph: fx.Graph, leaves: Leaves) -> None:
        """Tell apart the inputs of a called graph by those of the Dynamo graph's, in order."""
        given = [n for n in placeholders(graph) if isinstance(n.meta.get("val"), torch.Tensor)]
        primals = [n for n in given if not is_tangent(n)]
        sizes = _sizes(map(value, primals))
        named = len(primals) < len(given)  # the tangents are; those of a cond's branch are not
        for called in leaves.called:
            count = len(called.sizes)
            if sizes[:count] == called.sizes and (count == len(sizes) or not named):
                self.weights |= {primals[i] for i in called.parameters}
                self.constants |= {primals[i] for i in called.buffers}
                self.gradients |= set(primals[count:])
                self.modules = {primals[i]: path for i, path in called.modules}
                return


def input_index(placeholder: fx.Node) -> int | None:
    """The index, among the inputs of the Dynamo graph, of what this placeholder is (part) of."""
    return getattr(_origin(placeholder), "idx", None)


def _origin(placeholder: fx.Node) -> Any:
    """AOTAutograd's description of the input that a placeholder is (part) of, or None."""
    desc: Any = placeholder.meta.get("desc")
    while hasattr(desc, "base"):
        desc = desc.base
    return desc


def is_called(graph: fx.Graph) -> bool:
    """Whether a graph is one that a higher-order op calls: AOTAutograd describes its own inputs."""
    return any("desc" not in n.meta for n in placeholders(graph))


def is_tangent(placeholder: fx.Node) -> bool:
    """Whether a placeholder is a gradient that comes in."""
    desc = _origin(placeholder)
    return type(desc).__name__ == "TangentAOTInput" or (
        desc is None and "tangents" in str(placeholder.target)
    )
