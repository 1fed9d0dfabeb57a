"""What a launch calls, called again: allocations, kernels, and what is left to aten, in order.

A launch decides in Python what it calls, from sizes, strides and types; deciding takes longer than
the calls do. So the second call of an op with arguments like earlier ones is recorded, and from
the third on its tape is called: a function of the calls alone, whose source is generated. It
allocates tensors as they lay, gives kernels places as numbers, and makes a view of what is viewed
at once. Alike are arguments that are equal in all that a launch reads of them: constants by value,
tensors by size, stride, dtype and device, with every one at a multiple of 16 bytes.

What a tape cannot say, such as a tensor that is no argument, is launched as if there were none.
Not seen are hooks that are added to one kernel after it was recorded; those of all kernels are.
"""

import inspect
import logging
from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd, _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lpcompile.ops import launcher

log = logging.getLogger("lpcompile")
MOST = 1024  # of one op: where sizes change at every step, tapes are of the last

aten = torch.ops.aten
ZEROS = {aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default}
ALLOCATED = ZEROS | {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
FILLED = {aten.zero_.default: "{}.zero_()", aten._foreach_zero_.default: "zero_all({})"}
ALIGN = 16  # bytes: what Triton tells places apart by


class Call(NamedTuple):
    """A line of the function; what it makes, if it is there for that; what it reads: names."""

    line: str
    makes: str
    reads: set[str]


class Root(NamedTuple):
    """A tensor that is no view of another, and its name."""

    name: str
    tensor: Tensor


class Tape(TorchDispatchMode):
    """Writes down what a launch calls while it runs with ``args``."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.num_args = len(args)
        self.refused = ""  # why there is no function
        self.calls: list[Call] = []
        self.constants: dict[str, Any] = {}
        self.names: dict[Tensor, str] = {}
        self.roots: dict[Tensor, Root] = {}
        self.placed: set[str] = set()  # the names of those whose place is needed
        self.head: list[str] = []
        for i, arg in enumerate(args):
            if isinstance(arg, Tensor):
                self.know(arg, f"a{i}")
            elif isinstance(arg, list) and any(isinstance(x, Tensor) for x in arg):
                self.head.append(f"{', '.join(f'a{i}_{j}' for j in range(len(arg)))}, = a{i}")
                for j, x in enumerate(arg):
                    self.know(x, f"a{i}_{j}")
        self.inputs = list(self.names.values())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with launcher.told(None):  # an op that launches kernels is a call of an op
            made = func(*args, **(kwargs or {}))
        reads: set[str] = set()
        if func in FILLED:
            self.calls.append(Call(FILLED[func].format(self.value(args[0], reads)), "", reads))
        elif func._overloadname == "out" and made is (kwargs or {}).get("out"):
            self.calls.append(Call(self.called(func, args, kwargs, reads), "", reads))
        elif func._schema.is_mutable or not isinstance(made, Tensor):
            self.refuse(f"it calls {func}")
        elif func in ALLOCATED:
            name = self.know(made)
            of = f"{tuple(made.shape)}, {made.stride()}, {self.constant(made.dtype)}"
            self.calls.append(Call(f"{name} = empty_{made.device.type}({of})", name, reads))
            if func in ZEROS:
                self.calls.append(Call(f"{name}.zero_()", "", {name}))
        elif made not in self.names:  # as a composite op that returns what it is given
            self.compute(func, args, kwargs or {}, made)
        return made

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any], made: Tensor) -> None:
        """A call that makes a tensor from others, or a view of one."""
        memory, reads = made.untyped_storage()._cdata, set[str]()
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if made.device.type == "cpu" and any(x.device.type != "cpu" for x in given):
            self.refuse("it reads a tensor on the host")  # what ``tolist`` reads of it is unseen
        roots = [self.roots.get(x) for x in given if x.untyped_storage()._cdata == memory]
        root = roots[0] if roots else None
        name = self.know(made, root=root)
        if root is not None and root.tensor.dtype is made.dtype:
            reads.add(root.name)
            offset = made.storage_offset() - root.tensor.storage_offset()
            line = f"{name} = view({root.name}, {tuple(made.shape)}, {made.stride()}, {offset})"
        else:
            line = self.called(func, args, kwargs, reads, f"{name} = ")
        self.calls.append(Call(line, name, reads))

    def called(self, func: Any, args: Any, kwargs: Any, reads: set[str], to: str = "") -> str:
        """A call of an op; of aten's by torch's own binding, if there is one: that is faster."""
        way = func
        if func.namespace == "aten" and func._overloadname in ("default", "out"):
            bound = getattr(torch, func._overloadpacket.__name__, None)
            way = bound if isinstance(bound, BuiltinFunctionType) else func
        written = [self.value(x, reads) for x in args]
        written += [f"{key}={self.value(x, reads)}" for key, x in kwargs.items()]
        return f"with below_autograd(): {to}{self.constant(way)}({', '.join(written)})"

    def known(self, kept: tuple[Any, ...], grid: tuple[int, ...], args: Any, given: Any) -> None:
        """A kernel is launched that the launcher has kept."""
        _, run, function, metadata = kept
        reads: set[str] = set()
        passed = []
        for x, number in zip(args, given, strict=True):
            if isinstance(x, Tensor):
                passed.append(self.place(x, reads))
            elif isinstance(x, launcher.Descriptor):
                nowhere = self.constant(launcher.moved(x, 0))
                passed.append(f"moved({nowhere}, {self.place(x.base, reads)})")
            else:
                passed.append(self.constant(number))
        size = ", ".join(map(str, grid))
        of = f"{self.constant(function)}, {self.constant(metadata)}, None, None, None"
        line = f"{self.constant(run)}({size}, stream, {of}, {', '.join(passed)})"
        self.calls.append(Call(line, "", reads))

    def unknown(self) -> None:
        """A kernel is launched by Triton."""
        self.refuse("it launches a kernel by way of Triton")

    def refuse(self, why: str) -> None:
        """There will be no function."""
        self.refused = self.refused or why

    def know(self, x: Tensor, name: str = "", root: Root | None = None) -> str:
        """The name of a tensor from now on."""
        name = self.names[x] = name or f"v{len(self.names)}"
        self.roots[x] = root or Root(name, x)
        return name

    def value(self, x: Any, reads: set[str]) -> str:
        """An argument of what aten does."""
        if isinstance(x, (list, tuple)):
            return f"[{', '.join(self.value(y, reads) for y in x)}]"
        if not isinstance(x, Tensor):
            return self.constant(x)
        if x not in self.names:
            self.refuse("it reads a tensor that is no argument")
            return "None"
        reads.add(self.names[x])
        return self.names[x]

    def place(self, x: Tensor, reads: set[str]) -> str:
        """Where a tensor begins, as a number."""
        if x not in self.roots:
            self.refuse("it reads a tensor that is no argument")
            return "None"
        name, root = self.roots[x]
        reads.add(name)
        self.placed.add(name)
        offset = x.data_ptr() - root.data_ptr() if x.numel() else 0
        return f"p_{name} + {offset}" if offset else f"p_{name}"

    def constant(self, value: Any) -> str:
        """The text of a value, or a name for it."""
        if value is None or type(value) in (bool, int):
            return repr(value)
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def function(self, made: Any, device: int) -> Callable[..., Any]:
        """What makes ``made`` again, of arguments like those; None where one lies elsewhere."""
        reads: set[str] = set()
        results = [self.value(x, reads) for x in ([made] if isinstance(made, Tensor) else made)]
        shown = "[{}]" if isinstance(made, list) else "({},)" if isinstance(made, tuple) else "{}"
        lines = [f"return {shown.format(', '.join(results))}"]
        for line, makes, read in reversed(self.calls):
            if makes and makes not in reads:
                continue  # a view whose place alone is read
            if over := sorted(read - reads):  # read here for the last time
                lines.append(f"del {', '.join(over)}")
            reads |= read
            if makes in self.placed:
                lines.append(f"p_{makes} = {makes}.data_ptr()")
            lines.append(line)
        places = [f"p_{name}" for name in self.inputs]
        head = [
            *self.head,
            *(f"p_{name} = {name}.data_ptr()" for name in self.inputs),
            f"if ({' | '.join(places)}) % {ALIGN}:",
            "    return None",
            f"stream = torch._C._cuda_getCurrentRawStream({device})",
        ]
        parameters = ", ".join(f"a{i}" for i in range(self.num_args))
        return _made("play", parameters, [*head, *reversed(lines)], KNOWN | self.constants)


def played(op: Any, launch: Callable[..., Any]) -> Callable[..., Any]:
    """What Inductor's code calls for an op on a GPU: its launch, and after two calls its tape.

    The op itself while somebody looks at the ops that run, and no tape while at the kernels.
    """
    tapes: dict[Any, Callable[..., Any] | None] = {}
    arguments = op._schema.arguments
    names = ", ".join(a.name for a in arguments)
    defaults = inspect.signature(launch).parameters.values()
    parameters = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in defaults]
    body = [
        "if _is_profiled() or _len_torch_dispatch_stack():",
        f"    return _op({names})",
        f"_key = torch._C._cuda_getDevice(), {', '.join(map(_key, arguments))}",
        "_play = _tapes.get(_key)",
        "if _play is not None and not _is_watched():",
        f"    _made = _play({names})",
        "    if _made is not None:",
        "        return _made",
        f"return _without(_key, {names})",
    ]

    def without(key: Any, *args: Any) -> Any:
        with _AutoDispatchBelowAutograd():
            known = tapes.get(key, _nothing)
            if known is None and not launcher.is_watched():
                made, tapes[key] = record(launch, args, key[0])
                return made
            if key not in tapes:
                if len(tapes) >= MOST:
                    tapes.clear()
                tapes[key] = None
            return launch(*args)

    with_op = KNOWN | {"_op": op, "_tapes": tapes, "_without": without}
    return _made("call", ", ".join(parameters), body, with_op)


def record(
    launch: Callable[..., Any], args: tuple[Any, ...], device: int
) -> tuple[Any, Callable[..., Any] | None]:
    """What a launch makes, and the function of its tape.

    None where arguments are not where tapes need them; what cannot be said is a function that
    makes nothing.
    """
    given = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    if not launcher.KNOWN:  # Triton launches kernels by itself, and tells nobody
        return launch(*args), _nothing
    if any(x.data_ptr() % ALIGN for x in given):
        return launch(*args), None
    # Each a tensor of its own: what is given twice now may be two tensors then.
    args = tree_map_only(Tensor, Tensor.detach, args)
    tape = Tape(args)
    with tape, launcher.told(tape):
        made = launch(*args)
    play = tape.function(made, device)
    if tape.refused:
        log.debug("no tape of %s: %s", launch, tape.refused)
        play = _nothing
    return made, play


def _key(argument: Any) -> str:
    """The source of an argument's part of a key."""
    name, kind = argument.name, str(argument.type)
    of = "({0}.shape, {0}.stride(), {0}.dtype, {0}.get_device())"
    if kind == "Tensor":
        return of.format(name)
    if kind == "Optional[Tensor]":
        return f"{name} if {name} is None else {of.format(name)}"
    if kind == "List[Tensor]":
        return f"tuple([{of.format('x')} for x in {name}])"
    return f"tuple({name})" if kind.startswith("List") else name


def _nothing(*args: Any) -> None:
    """The function of a tape that cannot be."""


def _made(name: str, parameters: str, body: list[str], known: dict[str, Any]) -> Any:
    """The function of that name, from its source."""
    made = dict(known)
    exec("\n    ".join([f"def {name}({parameters}):", *body]), made)
    return made[name]


# What the source of functions names. Those of Inductor's code, which its stubs have not:
_guards: Any = torch._C._dynamo.guards
KNOWN = {
    "torch": torch,
    "below_autograd": _AutoDispatchBelowAutograd,
    "empty_cpu": _guards._empty_strided_cpu,
    "empty_cuda": _guards._empty_strided_cuda,
    "moved": launcher.moved,
    "view": _guards._reinterpret_tensor,
    "zero_all": torch._foreach_zero_,
    "_is_profiled": _profiler_enabled,
    "_is_watched": launcher.is_watched,
    "_len_torch_dispatch_stack": _len_torch_dispatch_stack,
}
