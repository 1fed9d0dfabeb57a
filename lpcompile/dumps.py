"""Write what the compiler does with a model into a folder that a person, and Python, can read.

    with lpcompile.dump("folder"):                       # or options={"dump": "folder"}
        model(x).sum().backward()                        # whatever compiles in here is written

README.txt in the folder says what each file is. Graphs are Python files that run (``source``).
Caches of compiled code are off while dumping: on a hit no pass runs and there is nothing to write.

Inductor's output is read off what it compiled, and the bytecode through a hook of Dynamo's and
depyf's decompiler. ``depyf.prepare_debug`` would write both too: it patches five functions of
torch, and replaces the code that runs by code that it decompiled.
"""

import difflib
import dis
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import fx
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._guards import CompileContext

from lpcompile import saved, source
from lpcompile.errors import LowPrecisionWarning
from lpcompile.flow import Leaves, is_called, is_tangent
from lpcompile.graph import TRANSPOSES, clean_path, placeholders
from lpcompile.options import Options
from lpcompile.report import Report, Row

README = """\
What lpcompile did with every graph that was compiled, in the order of compiling.

graph_N/
  index.txt             what follows, with counts, and how the graph was compiled
  gemms.txt             every GEMM that was narrowed: its lines before and after. Start here
  report.txt            every GEMM, narrowed or not, with the reason
  joint_0_traced.py     the graph of forward and backward as AOTAutograd traced it, before any pass
  joint_1_<pass>.py     the same after the first pass, and so on: before pass 2 is after pass 1
  joint_1_<pass>.diff   what the pass changed
  forward.py            the two that the joint graph was cut into
  backward.py
  saved.txt             what the forward saves for the backward, and what it would in bf16
  forward_0_post_grad.py, forward_1_<pass>.py, forward_1_<pass>.diff, and backward_...
                        the same two before and after the passes that run on each by itself, in
                        Inductor after its own
  inductor_*.py         what Inductor generated (not with codegen="eager")
  bytecode.py           what Dynamo put in the function's place, decompiled (needs depyf)

A graph that a higher-order op calls (torch.cond, a nested compile region) is passed over by
itself, before the joint graph: its files begin with subgraphN. A graph without a backward has no
forward.py: the last joint_*.py is what is compiled.

Every graph is Python that runs: `python joint_0_traced.py` makes fake inputs of the shapes that
were compiled (symbolic sizes at their hints), runs the graph on them and prints what comes out.
A GEMM that was narrowed keeps its name (mm_3), so that a diff shows the products alone.
"""

_folder: ContextVar["_Target | None"] = ContextVar("folder", default=None)
_awaits_bytecode: dict[Any, "Dump"] = {}  # by the id of the compile: Dynamo makes it afterwards


@dataclass
class _Target:
    path: Path
    dumps: "list[Dump]" = field(default_factory=list)


@contextmanager
def dump(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Write every graph that is compiled inside into ``folder``, and give its path.

    What was compiled before is not compiled again: call ``torch._dynamo.reset()`` first. A
    LowPrecisionWarning says so when nothing was written.
    """
    target = _Target(Path(folder))
    token = _folder.set(target)
    try:
        yield target.path
    finally:
        _folder.reset(token)
    if not target.dumps:
        warnings.warn(
            f"nothing was compiled with lpcompile inside dump({str(folder)!r}), so it is empty: "
            "call the model inside, and torch._dynamo.reset() first if it has run before",
            LowPrecisionWarning,
            stacklevel=3,
        )


def begin(gm: fx.GraphModule, options: Options) -> "Dump | None":
    """The Dump of a Dynamo graph, where ``options`` or ``with dump()`` asks for one."""
    target = _folder.get() if options.dump is None else _Target(Path(options.dump))
    compile_id = CompileContext.current_compile_id()
    _awaits_bytecode.pop(compile_id, None)  # of a compile before a reset that failed
    if target is None:
        return None
    made = Dump(target.path, input_names(gm), repr(options))
    target.dumps.append(made)
    _hook_bytecode()
    _awaits_bytecode[compile_id] = made
    return made


def input_names(gm: fx.GraphModule) -> list[str]:
    """What the inputs of a Dynamo graph are to the user: ``layers.0.w1.weight``, ``x``."""
    names = []
    for node in placeholders(gm.graph):
        found = getattr(node, "_dynamo_source", None)
        name = node.name if found is None else re.sub(r"^L\['(\w*)'\]", r"\1", found.name)
        parts = clean_path(name.removeprefix("self")).split(".")
        names.append(".".join(p for p in parts if p not in ("_parameters", "_buffers")))
    return names


class Dump:
    """The folder of one compiled graph. README.txt of the folder above says what is in it."""

    def __init__(self, folder: Path, names: Sequence[str], made_with: str) -> None:
        self.folder, self.names = _new(folder), names
        (folder / "README.txt").write_text(README)
        self.stems: dict[fx.Graph, str] = {}
        self.parts: Counter[str] = Counter()
        compiled = CompileContext.current_compile_id()
        self._note(f"{made_with}\ntorch {torch.__version__}, Dynamo's compile [{compiled}]\n")

    def graph(self, name: str, graph: fx.Graph, title: str, root: Any = None) -> str:
        """Write a graph as Python, and give the text."""
        text = source.render(graph, title, self.names, root)
        self._write(f"{name}.py", text, f"{title}: {source.count_text(graph)}")
        return text

    def given(self, graph: fx.Graph, how: str) -> None:
        """Write a graph as the passes are given it: "traced" to cut, or cut and "post_grad"."""
        if how == "traced":
            self.stem = f"subgraph{len(self.stems)}" if is_called(graph) else "joint"
            self.stems[graph] = self.stem
        else:
            part = "backward" if any(map(is_tangent, placeholders(graph))) else "forward"
            self.stem = f"{part}{self.parts[part] or ''}"  # several where subgraphs are
            self.parts[part] += 1
        self.num_passed = 0
        self.text = self.graph(f"{self.stem}_0_{how}", graph, "The graph before the passes")

    def passed(self, graph: fx.Graph, name: str, count: int) -> None:
        """Write the graph after a pass that made ``count`` changes, and the difference."""
        self.num_passed += 1
        stem = f"{self.stem}_{self.num_passed}_{name}"
        text = self.graph(stem, graph, f"The graph after pass {name}, {count} changes")
        lines = difflib.unified_diff(
            self.text.splitlines(), text.splitlines(), "before", "after", lineterm=""
        )
        self._write(f"{stem}.diff", "\n".join(lines) + "\n", f"what pass {name} changed")
        self.text = text

    def gemms(self, before: fx.Graph, graph: fx.Graph, rows: Mapping[str, Row]) -> None:
        """Write what became of every GEMM that was found ``before``, given by name."""
        prefix = self._prefix(graph)
        report = str(Report(list(rows.values())))
        self._write(f"{prefix}report.txt", report, "every GEMM, with the reason")
        old = {n.name: n for n in before.nodes}
        new = {n.name: n for n in graph.nodes}
        text = "\n".join(
            self._gemm(row, _prepared(old[name], set()), _prepared(new[name], set(old)))
            for name, row in rows.items()
            if row.rewritten
        )
        self._write(f"{prefix}gemms.txt", text, "the narrowed GEMMs, before and after")

    def cut(
        self,
        joint: fx.Graph,
        forward: fx.GraphModule,
        backward: fx.GraphModule,
        original: fx.GraphModule,
        leaves: Leaves,
        num_outputs: int,
    ) -> None:
        """Write both parts of a joint graph, and what is saved, beside what the original saves."""
        prefix = self._prefix(joint)
        self.graph(f"{prefix}forward", forward.graph, "The forward graph", forward)
        self.graph(f"{prefix}backward", backward.graph, "The backward graph", backward)
        tables = (
            f"{title}\n\n{saved.table(saved.find(part.graph, leaves, num_outputs))}"
            for title, part in (("As rewritten", forward), ("As it was, in bf16", original))
        )
        self._write(f"{prefix}saved.txt", "\n\n".join(tables), "what is saved for the backward")

    def inductor(self, compile_inner: Callable[..., Any]) -> Callable[..., Any]:
        """Inductor's inner compiler, with its output written."""

        def inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
            made = compile_inner(gm, example_inputs, **kwargs)
            part = "backward" if kwargs.get("is_backward") else "forward"
            part = "inference" if kwargs.get("is_inference") else part
            text = getattr(made, "source_code", None)
            if text:  # an empty graph is not compiled
                self._write(f"inductor_{part}.py", text, f"Inductor's output for the {part}")
            return made

        return inner

    def bytecode(self, old: CodeType, new: CodeType) -> None:
        """Write what Dynamo put in a function's place."""
        self._write("bytecode.py", _decompile(old, new), f"Dynamo's code for {old.co_qualname}")

    def _prefix(self, graph: fx.Graph) -> str:
        stem = self.stems[graph]
        return "" if stem == "joint" else f"{stem}_"

    def _gemm(self, row: Row, before: list[fx.Node], after: list[fx.Node]) -> str:
        sizes = ", ".join(f"{k}={getattr(row, k)}" for k in "mnk")
        inputs = {i: None for n in before for i in n.all_input_nodes if i.op == "placeholder"}
        read = (f"{i.name} is {source.role(i.meta.get('desc'), self.names)}" for i in inputs)
        lines = [f"{row.module or '(root)'}  {row.product}  {sizes}  {row.recipe}", *read]
        for name, calls in (("before", before), ("after", after)):
            lines += [f"  {name}", *filter(None, (source.statement(n, "    ") for n in calls))]
        return "\n".join([*lines, ""])

    def _write(self, name: str, text: str, about: str) -> None:
        (self.folder / name).write_text(text)
        self._note(f"{name:28} {about}")

    def _note(self, line: str) -> None:
        with (self.folder / "index.txt").open("a") as index:
            index.write(f"{line}\n")


def _new(folder: Path) -> Path:
    """The first graph_N that is not there: another process may be dumping here too."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        try:
            (folder / f"graph_{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder / f"graph_{number}"


def _prepared(node: fx.Node, known: set[str]) -> list[fx.Node]:
    """A product, after the calls that prepare its operands: transposes, and what a pass made.

    known: the names in the graph before the passes, or nothing for that graph itself.
    """
    calls: list[fx.Node] = []

    def visit(at: fx.Node) -> None:
        for given in at.all_input_nodes:
            is_made = given.op == "call_function" and known and given.name not in known
            if given not in calls and (is_made or given.target in TRANSPOSES):
                visit(given)
        calls.append(at)

    visit(node)
    return calls


@cache
def _hook_bytecode() -> None:
    """Ask Dynamo for its bytecode, once: a hook cannot go away while Dynamo calls them."""

    def hook(code: CodeType, new_code: CodeType) -> CodeType | None:
        made = _awaits_bytecode.pop(CompileContext.current_compile_id(), None)
        if made is not None:
            made.bytecode(code, new_code)
        return None  # as it is

    register_bytecode_hook(hook)


def _decompile(old: CodeType, new: CodeType) -> str:
    where = f"# {old.co_qualname}, {old.co_filename}:{old.co_firstlineno}\n"
    if find_spec("depyf") is None:
        return f"{where}# pip install depyf, and this is Python.\n\n{dis.Bytecode(new).dis()}"
    import depyf

    try:
        return f"{where}\n{depyf.decompile(new)}"
    except Exception as error:
        return f"{where}# depyf cannot decompile it: {error}\n\n{dis.Bytecode(new).dis()}"
