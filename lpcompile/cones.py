"""The pointwise producer of a tensor, as a program over tensors that exist.

Walks up from x[M, C] through pointwise ops and reshapes to its leaves, and writes what is between
as a ``lpcompile.ops.pointwise`` program. A bf16 value that somebody else reads too is a leaf, since
it is in memory anyway; an fp32 one never is, since nobody should write it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._prims_common import is_contiguous_or_false
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lpcompile.graph import CASTS, aten, prims, value
from lpcompile.ops.pointwise import Program, Statement

RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
POINTWISE: dict[Any, str] = {
    aten.abs.default: "abs",
    aten.add.Tensor: "add",
    aten.div.Tensor: "div",
    aten.erf.default: "erf",
    aten.exp.default: "exp",
    aten.ge.Scalar: "ge",
    aten.gt.Scalar: "gt",
    aten.le.Scalar: "le",
    aten.lt.Scalar: "lt",
    aten.mul.Tensor: "mul",
    aten.neg.default: "neg",
    aten.reciprocal.default: "reciprocal",
    aten.relu.default: "relu",
    aten.rsqrt.default: "rsqrt",
    aten.sigmoid.default: "sigmoid",
    aten.sqrt.default: "sqrt",
    aten.sub.Tensor: "sub",
    aten.where.self: "where",
    prims.convert_element_type.default: "",
    aten._to_copy.default: "",
}
DEEPEST = 64  # ops, one on the other: more are more than any kernel holds
LARGE = ("full", "wide")  # kinds of inputs as large as the result
NAMES = {torch.bfloat16: "bf16", torch.float32: "float", torch.bool: "bool"}


class TooComplex(Exception):
    """The producer cannot be written as a program."""


def is_pointwise(x: fx.Node) -> bool:
    """Whether x, or all that lies side by side in it, is made by pointwise ops."""
    if x.target is aten.cat.default:
        return all(map(is_pointwise, x.all_input_nodes))
    return x.op == "call_function" and x.target in POINTWISE


@dataclass
class Cone:
    """A producer under construction, of results of one shape [M, C]."""

    rows: Any
    columns: int
    is_private: Callable[[fx.Node], bool]
    leaves: list[tuple[fx.Node, str]] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    names: dict[fx.Node, str] = field(default_factory=dict)
    depth: int = 0  # of the statement that is being added

    def add(self, x: fx.Node) -> str:
        """The name of x in the program. TooComplex where it has none."""
        if x in self.names:
            return self.names[x]
        kind = self._kind(x)
        node = x
        while node.target in RESHAPES and self._kind(node.all_input_nodes[0]) == kind:
            node = node.all_input_nodes[0]
        if kind == "full" and self._is_inside(node):
            name = self._statement(node)
        else:
            name = self.leaf(node, kind)
        self.names[x] = name
        return name

    def program(self, results: list[str]) -> Program:
        """The program that makes the named results."""
        return Program(
            tuple(kind for _, kind in self.leaves), tuple(self.statements), tuple(results)
        )

    def part(self, result: str) -> tuple["Cone", str]:
        """What makes one result alone, and the result's name in it."""
        part, names = Cone(self.rows, self.columns, self.is_private), {}

        def take(name: str) -> str:
            if name[0] in "iv" and name not in names:
                at = int(name[1:])
                if name[0] == "i":
                    names[name] = f"i{len(part.leaves)}"
                    part.leaves.append(self.leaves[at])
                else:
                    made = self.statements[at]
                    args = tuple(map(take, made.args))
                    names[name] = f"v{len(part.statements)}"
                    part.statements.append(replace(made, name=names[name], args=args))
            return names.get(name, name)

        return part, "+".join(map(take, result.split("+")))

    @property
    def num_full(self) -> int:
        """Inputs as large as the result."""
        return sum(kind in LARGE for _, kind in self.leaves)

    def _is_inside(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node.target not in POINTWISE or node.kwargs.get("alpha"):
            return False
        if value(node).dtype not in NAMES:
            return False
        return self.is_private(node) or value(node).dtype is not torch.bfloat16

    def _statement(self, node: fx.Node) -> str:
        dtype, op = NAMES[value(node).dtype], POINTWISE[node.target]
        given = node.args[:1] if node.target in CASTS else node.args
        self.depth += 1
        if self.depth > DEEPEST:
            raise TooComplex(f"more than {DEEPEST} ops, one on the other")
        args = tuple(self.add(a) if isinstance(a, fx.Node) else _number(a) for a in given)
        self.depth -= 1
        name = f"v{len(self.statements)}"
        self.statements.append(Statement(dtype, name, op, args))
        return name

    def leaf(self, node: fx.Node, kind: str) -> str:
        """The name of a tensor that the program reads. TooComplex where it cannot."""
        made = value(node)
        if made.dtype not in (torch.bfloat16, torch.float32):
            raise TooComplex
        if kind == "full" and made.dtype is not torch.bfloat16:
            raise TooComplex
        if not is_contiguous_or_false(made):
            if kind != "full" or not _has_rows(made):
                raise TooComplex
            kind = "wide"
        if node not in self.names:
            self.names[node] = f"i{len(self.leaves)}"
            self.leaves.append((node, kind))
        return self.names[node]

    def _kind(self, node: fx.Node) -> str:
        """How a tensor broadcasts to [M, C]."""
        made = node.meta.get("val")
        if not isinstance(made, torch.Tensor):
            raise TooComplex
        size, last = made.numel(), made.shape[-1] if made.dim() else 1
        if statically_known_true(last == self.columns):
            if statically_known_true(size == self.rows * self.columns):
                return "full"
            if statically_known_true(size == self.columns):
                return "column"
        if statically_known_true(size == 1):
            return "scalar"
        if statically_known_true(last == 1) and statically_known_true(size == self.rows):
            return "row"
        raise TooComplex


def _has_rows(x: torch.Tensor) -> bool:
    """Whether x[..., C] can be read as rows of adjacent elements, as far apart all over."""
    ahead = zip(range(x.dim() - 2), range(1, x.dim() - 1), strict=True)
    return x.dim() > 1 and all(
        statically_known_true(one == other)
        for one, other in (
            (x.stride(-1), 1),
            *((x.stride(i), x.stride(j) * x.shape[j]) for i, j in ahead),
        )
    )


def _number(argument: Any) -> str:
    if isinstance(argument, bool) or not isinstance(argument, (int, float)):
        raise TooComplex
    if not abs(float(argument)) < float("inf"):
        raise TooComplex
    return repr(float(argument))
