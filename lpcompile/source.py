"""A graph as Python that runs: imports, the calls with their shapes, fake inputs, and a main.

fx prints for its own code generator: a quantize takes three lines, shapes hide the call, and what
the inputs are is lost. Here a pair is unpacked where it is made, shapes stand in trailing comments,
module paths above the calls that come from them, and ``python file.py`` runs the graph on fake
tensors and prints what comes out. Symbolic sizes are at their hints.
"""

import math
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import _get_qualified_name
from torch.utils._dtype_abbrs import dtype_abbrs

from lpcompile.graph import hint, is_own, module_path

UNBACKED = 16  # the number of rows, say, that a mask selects
WIDTH = 88  # the column of the shapes
# Where ops that torch does not load by itself are registered.
REGISTRIES = {
    "lpcompile": "lpcompile.ops",
    "_c10d_functional": "torch.distributed._functional_collectives",
    "fsdp": "torch.distributed.fsdp",
}
MAIN = """
if __name__ == "__main__":
    with FakeTensorMode(shape_env=ShapeEnv()):
        made = forward(**inputs())
    for name, value in zip(OUTPUTS, made, strict=True):
        is_tensor = isinstance(value, torch.Tensor)
        print(name, f"{value.dtype} {list(value.shape)}" if is_tensor else value)
"""


def render(
    graph: fx.Graph, title: str, names: Sequence[str] = (), root: torch.nn.Module | None = None
) -> str:
    """A whole file.

    names: of the Dynamo graph's inputs, as the user knows them; root: holds what get_attr reads.
    """
    constants = {n: _attribute(n, root) for n in graph.nodes if n.op == "get_attr"}
    subgraphs = {n.name: m for n, m in constants.items() if isinstance(m, fx.GraphModule)}
    given = [n for n in graph.nodes if n.op in ("placeholder", "get_attr")]
    given = [n for n in given if n.name not in subgraphs]
    results = _results(graph)
    descs = graph.output_node().meta.get("desc") or [None] * len(results)
    parts = [
        f'"""{title}',
        f"\n{count_text(graph)}\n",
        'python THIS_FILE runs it on fake tensors and prints what comes out.\n"""\n',
        *_imports([graph, *(m.graph for m in subgraphs.values())]),
        *(text for name, m in subgraphs.items() for text in _subgraph(name, m)),
        "\n\ndef forward(",
        *(line(f"    {n.name},", f"{_made(n)}  {role(n.meta.get('desc'), names)}") for n in given),
        "):",
        *body(graph),
        "\n    return (",
        *(
            line(f"        {literal(r)},", f"{_made(r)}  {role(desc, names)}")
            for r, desc in zip(results, descs, strict=True)
        ),
        "    )\n\n",
        f"OUTPUTS = {list(map(literal, results))!r}\n\n",
        "def inputs():\n    return {",
        *(f'        "{n.name}": {_fake(n, constants)},' for n in given),
        "    }\n",
    ]
    return "\n".join(parts) + MAIN


def body(graph: fx.Graph) -> Iterator[str]:
    """The calls, under a comment where another module, or its backward, begins."""
    where = None
    for node in graph.nodes:
        text = statement(node, "    ")
        if not text:
            continue
        at = place(node)
        if at != where:
            yield f"\n    # {at}"
            where = at
        yield text


def place(node: fx.Node) -> str:
    """The module that a call is from, and whether it is of its backward."""
    path = module_path(node) or "(root)"
    return f"{path}, backward" if "fwd_nn_module_stack" in node.meta else path


def statement(node: fx.Node, indent: str = "") -> str:
    """The line of one call and what it makes; empty for what its producer unpacks."""
    if node.op != "call_function" or (node.target is operator.getitem and _unpacks(node.args[0])):
        return ""
    if _unpacks(node):
        items = {u.args[1]: u for u in node.users}
        made = node.meta["val"]
        names = [items[i].name if i in items else "_" for i in range(len(made))]
        name = f"({names[0]},)" if len(names) == 1 else ", ".join(names)
        return line(f"{indent}{name} = {call(node)}", ", ".join(map(describe, made)))
    return line(f"{indent}{node.name} = {call(node)}", describe(node.meta.get("val")))


def call(node: fx.Node) -> str:
    """``aten.mm.default(a, b)``."""
    arguments = [literal(a) for a in node.args]
    arguments += [f"{k}={literal(v)}" for k, v in node.kwargs.items()]
    if node.target is operator.getitem:
        return f"{arguments[0]}[{arguments[1]}]"
    return f"{target_name(node.target)}({', '.join(arguments)})"


def target_name(target: Any) -> str:
    """How the file calls a function; ops of lpcompile have no overloads to name."""
    if isinstance(target, torch._ops.OpOverload):
        packet = f"{target.namespace}.{target.overloadpacket.__name__}"
        return packet if target.namespace == "lpcompile" else f"{packet}.{target._overloadname}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{target._name}"
    return _get_qualified_name(target).removeprefix("_")  # _operator is operator


def literal(value: Any) -> str:
    """A value of a graph as Python: nodes by name, symbolic sizes by their hints."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return repr(_number(value))
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, (list, tuple)):
        items = ", ".join(map(literal, value))
        if isinstance(value, list):
            return f"[{items}]"
        return f"({items},)" if len(value) == 1 else f"({items})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({', '.join(map(literal, (value.start, value.stop, value.step)))})"
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return target_name(value)
    return repr(value)


def _number(size: Any) -> Any:
    """A symbolic size by its hint, an unbacked symbol as UNBACKED."""
    if (known := hint(size)) is not None:
        return known
    env, expr = size.node.shape_env, size.node.expr
    hints = {s: hint(env.create_symintnode(s, hint=None)) for s in expr.free_symbols}
    return int(expr.subs({s: UNBACKED if h is None else h for s, h in hints.items()}))


def describe(made: Any) -> str:
    """``bf16[64, s0]`` for a fake tensor, a symbol for a size."""
    if isinstance(made, Tensor):
        return f"{dtype_abbrs[made.dtype]}[{', '.join(map(str, made.shape))}]"
    if isinstance(made, (tuple, list)):
        return ", ".join(map(describe, made))
    return "" if made is None else str(made)


def count_text(graph: fx.Graph) -> str:
    """``84 calls: 9 aten.mm.default, ...``, the GEMMs and lpcompile's ops named."""
    calls = [n for n in graph.nodes if n.op == "call_function"]
    named = Counter(target_name(n.target) for n in calls if is_own(n) or _multiplies(n))
    text = ", ".join(f"{count} {name}" for name, count in sorted(named.items()))
    return f"{len(calls)} calls" + (f": {text}" if text else "")


def _multiplies(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "").partition(".")[0]
    return name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")


def _unpacks(node: Any) -> bool:
    """Whether a call makes several results, each read by one getitem, nothing else reading them."""
    users = list(node.users)
    made = node.meta.get("val")
    return (
        isinstance(made, (tuple, list))
        and bool(users)
        and all(u.target is operator.getitem for u in users)
        and len({u.args[1] for u in users}) == len(users)
    )


def line(text: str, comment: str) -> str:
    """A line with a comment at its right."""
    comment = comment.strip()
    return f"{text:{WIDTH}}  # {comment}" if comment else text


def _results(graph: fx.Graph) -> list[Any]:
    (results,) = graph.output_node().args
    return list(results) if isinstance(results, (tuple, list)) else [results]


def _made(value: Any) -> str:
    return describe(value.meta.get("val")) if isinstance(value, fx.Node) else ""


def role(desc: Any, names: Sequence[str]) -> str:
    """What an input or an output of AOTAutograd's graph is to the user."""
    kind = type(desc).__name__
    if kind == "TangentAOTInput":
        return f"gradient of {role(desc.output, names)}"
    if kind == "GradAOTOutput":
        return f"gradient of {role(desc.grad_of, names)}"
    if kind == "PlainAOTOutput":
        return f"output {desc.idx}"
    if kind == "SavedForBackwardsAOTOutput":
        return "saved for the backward"
    if hasattr(desc, "base"):
        return role(desc.base, names)
    index = getattr(desc, "idx", len(names))
    return names[index] if index < len(names) else ""


def _attribute(node: fx.Node, root: torch.nn.Module | None) -> Any:
    owner = root if root is not None else node.graph.owning_module
    return None if owner is None else operator.attrgetter(str(node.target))(owner)


def _fake(node: fx.Node, constants: Mapping[fx.Node, Any]) -> str:
    made = constants.get(node, node.meta.get("val"))
    if not isinstance(made, Tensor):
        return literal(made)
    size, stride = literal(tuple(made.shape)), literal(tuple(made.stride()))
    return f'torch.empty_strided({size}, {stride}, dtype={made.dtype}, device="{made.device}")'


def _imports(graphs: Sequence[fx.Graph]) -> Iterator[str]:
    targets = {n.target for g in graphs for n in g.nodes if n.op == "call_function"}
    spaces = {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)}
    functions = [
        target_name(t) for t in targets - {operator.getitem} if not hasattr(t, "namespace")
    ]
    modules = {f.rpartition(".")[0] for f in functions} - {"builtins"}
    modules = {m for m in modules if not m.startswith("torch")}
    yield from (f"import {m}" for m in sorted(modules))
    yield "import torch"
    yield "from torch._subclasses import FakeTensorMode"
    yield "from torch.fx.experimental.symbolic_shapes import ShapeEnv\n"
    for space in sorted(spaces):
        if space in REGISTRIES:
            yield f"import {REGISTRIES[space]}  # registers torch.ops.{space}"
        elif space not in ("aten", "prims"):
            yield f"# torch.ops.{space}: import the module that registers it here"
    yield ""
    yield from (f"{space} = torch.ops.{space}" for space in sorted(spaces))


def _subgraph(name: str, module: fx.GraphModule) -> Iterator[str]:
    """A graph that a higher-order op calls, as a function and the module that the op wants."""
    arguments = ", ".join(n.name for n in module.graph.nodes if n.op == "placeholder")
    yield f"\n\ndef {name}({arguments}):"
    yield from body(module.graph)
    yield f"    return {literal(tuple(_results(module.graph)))}\n\n"
    yield f"{name} = torch.fx.symbolic_trace({name})"
