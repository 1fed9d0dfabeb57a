"""A pointwise program: what fused kernels compute before they quantize, as text in an op's schema.

    "full row column; float v0 = i0; float v1 = mul(v0, i1); bf16 v2 = mul(v1, i2); v2"

First how each input broadcasts to [M, C]: full [M, C], wide [M, C] whose rows lie apart (half of
what a fused gate and up projection makes), row [M, 1], column [C], scalar []. Then one statement a
value: its dtype, which it is rounded to, its name, and a call or a plain copy. Last the results;
"v2+v3" is [M, 2 C], the one beside the other. Arithmetic is fp32, as Inductor's and eager's is for
bf16 tensors.

Division is Triton's own, two last places off at most, as it is in what Inductor generates.

One text serves the torch reference (``run``) and the Triton kernel (``to_triton``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

KINDS = ("full", "wide", "row", "column", "scalar")
DTYPES = {"bf16": torch.bfloat16, "float": torch.float32, "bool": torch.bool}

# name -> (torch on fp32 tensors, Triton on fp32 tiles)
OPS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "abs": (torch.abs, "tl.abs({0})"),
    "add": (torch.add, "{0} + {1}"),
    "div": (torch.true_divide, "{0} / {1}"),
    "eq": (torch.eq, "{0} == {1}"),
    "erf": (torch.erf, "tl.erf({0})"),
    "exp": (torch.exp, "tl.exp({0})"),
    "ge": (torch.ge, "{0} >= {1}"),
    "gt": (torch.gt, "{0} > {1}"),
    "le": (torch.le, "{0} <= {1}"),
    "lt": (torch.lt, "{0} < {1}"),
    "mul": (torch.mul, "{0} * {1}"),
    "ne": (torch.ne, "{0} != {1}"),
    "neg": (torch.neg, "{0} * -1.0"),  # Triton's -x is 0 - x, which makes +0 of 0
    "reciprocal": (torch.reciprocal, "1.0 / {0}"),
    "relu": (torch.relu, "tl.where({0} < 0, 0.0, {0})"),
    "rsqrt": (torch.rsqrt, "tl.rsqrt({0})"),
    "sigmoid": (
        torch.sigmoid,
        "1.0 / (1.0 + tl.exp({0} * -1.0))",
    ),  # one exp with x / (1 + exp(-x))
    "sqrt": (torch.sqrt, "tl.sqrt_rn({0})"),
    "sub": (torch.sub, "{0} - {1}"),
    "where": (torch.where, "tl.where({0}, {1}, {2})"),
}


@dataclass(frozen=True)
class Statement:
    """``dtype name = op(args)``; op is empty for a copy."""

    dtype: str
    name: str
    op: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """Kinds of the inputs, statements in order, names of the results."""

    kinds: tuple[str, ...]
    statements: tuple[Statement, ...]
    results: tuple[str, ...]

    @property
    def parts(self) -> list[list[str]]:
        """The names in each result, from left to right."""
        return [result.split("+") for result in self.results]

    @property
    def large(self) -> int:
        """The index of an input of shape [M, C]."""
        return next(i for i, kind in enumerate(self.kinds) if kind in ("full", "wide"))

    def text(self) -> str:
        """The program as the schema carries it; ``parse`` reads it back."""
        lines = [" ".join(self.kinds)]
        for s in self.statements:
            call = f"{s.op}({', '.join(s.args)})" if s.op else s.args[0]
            lines.append(f"{s.dtype} {s.name} = {call}")
        return "; ".join([*lines, " ".join(self.results)])


IDENTITY = Program(("full",), (), ("i0",)).text()


@cache
def parse(text: str) -> Program:
    """A Program from its text."""
    first, *lines, last = text.split("; ")
    statements = []
    for line in lines:
        head, call = line.split(" = ")
        dtype, name = head.split(" ")
        op, _, rest = call.partition("(")
        args = tuple(rest.rstrip(")").split(", ")) if rest else (op,)
        statements.append(Statement(dtype, name, op if rest else "", args))
    return Program(tuple(first.split(" ")), tuple(statements), tuple(last.split(" ")))


def run(program: Program, inputs: list[Tensor]) -> list[Tensor]:
    """The results [M, C] in torch: each value computed in fp32, then rounded to its dtype."""
    values: dict[str, Tensor] = {}
    for i, (kind, x) in enumerate(zip(program.kinds, inputs, strict=True)):
        values[f"i{i}"] = {"row": lambda x: x.view(-1, 1), "column": lambda x: x.view(1, -1)}.get(
            kind, lambda x: x
        )(x)

    def operand(name: str) -> Tensor:
        x = values[name] if name in values else torch.tensor(float(name), device=inputs[0].device)
        return x.float() if x.dtype is torch.bfloat16 else x

    for s in program.statements:
        args = [operand(a) for a in s.args]
        made = OPS[s.op][0](*args) if s.op else args[0]
        values[s.name] = made.to(DTYPES[s.dtype])
    results = [[values[name] for name in parts] for parts in program.parts]
    return [torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in results]


@cache
def keeps_zero(text: str) -> bool:
    """Whether results are zero where all inputs are: of masked loads, no result needs a mask."""
    program = parse(text)
    if "scalar" in program.kinds:
        return False
    zeros = [torch.zeros(1) if kind == "column" else torch.zeros(1, 1) for kind in program.kinds]
    return not any(result.any() for result in run(program, zeros))


def arguments(program: Program, inputs: list[Tensor]) -> list[Any]:
    """What a kernel takes for its inputs: each, and after a wide one from one row to the next."""
    made: list[Any] = []
    for kind, x in zip(program.kinds, inputs, strict=True):
        if kind == "wide":
            x = x if x.stride(1) == 1 else x.contiguous()
            made += [x, x.stride(0)]
        else:
            made.append(x.contiguous())
    return made


def to_triton(program: Program, rounded: bool = True) -> list[str]:
    """Lines that compute, from tiles ``i0``, ``i1``, ..., each value as an fp32 tile ``f_<name>``.

    rounded: also round the results to bf16; a maximum is rounded after it is taken.
    """
    lines = [f"f_i{i} = i{i}.to(tl.float32)" for i in range(len(program.kinds))]
    read = {a for s in program.statements for a in s.args}
    for s in program.statements:
        args = [f"f_{a}" if a[0] in "iv" else a for a in s.args]
        made = OPS[s.op][1].format(*args) if s.op else args[0]
        if s.dtype == "bf16" and (rounded or s.name in read):
            made = f"({made}).to(tl.bfloat16).to(tl.float32)"
        lines.append(f"f_{s.name} = {made}")
    return lines
