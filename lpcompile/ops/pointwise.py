"""A pointwise program: what fused kernels compute before they quantize, as text in an op's schema.

    "full row column; float v0 = i0; float v1 = mul(v0, i1); bf16 v2 = mul(v1, i2); v2"

First how each input broadcasts to [M, C]: full [M, C], wide [M, C] whose rows lie apart (half of
what a fused gate and up projection makes), row [M, 1], column [C], scalar []. Then one statement a
value: its dtype, which it is rounded to, its name, and a call or a plain copy. Last the results;
"v2+v3" is [M, 2 C], the one beside the other. Arithmetic is fp32, as Inductor's and eager's is for
bf16 tensors.

Division is Triton's own, two last places off at most, as it is in what Inductor generates; by
exp(..) + 1 it is a product with the reciprocal, 0 where that is below 2^-126. exp and sigmoid are
the hardware's without the instructions around it that serve results below 2^-126: those are 0. The
gradient of SwiGLU's gate is cast both ways in 0.315 ms so, and in 0.36 with them (98304 x 1408 in
64 groups, one H200).

One text serves the torch reference (``run``) and the Triton kernel (``to_triton``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

KINDS = ("full", "wide", "row", "column", "scalar")
DTYPES = {"bf16": torch.bfloat16, "float": torch.float32, "bool": torch.bool}

# name -> (torch on fp32 tensors, Triton on fp32 tiles)
OPS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "abs": (torch.abs, "tl.abs({0})"),
    "add": (torch.add, "{0} + {1}"),
    "div": (torch.true_divide, "{0} / {1}"),
    "eq": (torch.eq, "{0} == {1}"),
    "erf": (torch.erf, "tl.erf({0})"),
    "exp": (torch.exp, "pointwise.exp({0})"),
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
    "sigmoid": (torch.sigmoid, "pointwise.sigmoid({0})"),
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

    @cached_property
    def parts(self) -> list[list[str]]:
        """The names in each result, from left to right."""
        return [result.split("+") for result in self.results]

    @cached_property
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


def join(parts: Sequence[tuple[Program, Sequence[Any]]]) -> tuple[Program, list[Any]]:
    """The results of several programs by one, and its inputs; what they share is computed once."""
    known: dict[Any, str] = {}
    kinds: list[str] = []
    inputs: list[Any] = []
    statements: list[Statement] = []
    results: list[str] = []
    for program, given in parts:
        names: dict[str, str] = {}
        for i, key in enumerate(zip(program.kinds, given, strict=True)):
            if key not in known:
                known[key] = f"i{len(inputs)}"
                kinds.append(key[0])
                inputs.append(key[1])
            names[f"i{i}"] = known[key]
        for s in program.statements:
            args = tuple(names.get(a, a) for a in s.args)
            made = replace(s, name=f"v{len(statements)}", args=args)
            if (alike := (s.dtype, s.op, args)) not in known:
                known[alike] = made.name
                statements.append(made)
            names[s.name] = known[alike]
        results += ["+".join(names[name] for name in of) for of in program.parts]
    return Program(tuple(kinds), tuple(statements), tuple(results)), inputs


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
    """Whether results are zero where all inputs are: of masked loads, no result needs a mask.

    An input of rows or of columns is not zero past the last column or row.
    """
    program = parse(text)
    if set(program.kinds) - {"full", "wide"}:
        return False
    with unset_fake_temporarily():  # kernels are compiled ahead on fake tensors
        zeros = [torch.zeros(1, 1, device="cpu") for _ in program.kinds]
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
    exps = {s.name for s in program.statements if s.op == "exp"}
    from_one = {
        s.name
        for s in program.statements
        if s.op == "add" and "1.0" in s.args and exps & set(s.args)
    }
    for s in program.statements:
        args = [f"f_{a}" if a[0] in "iv" else a for a in s.args]
        made = OPS[s.op][1].format(*args) if s.op else args[0]
        if s.op == "div" and s.args[1] in from_one:
            made = f"{args[0]} * pointwise.reciprocal({args[1]})"
        if s.dtype == "bf16" and (rounded or s.name in read):
            made = f"pointwise.rounded({made})"
        lines.append(f"f_{s.name} = {made}")
    return lines


@triton.jit
def exp(x):
    """e^x of an fp32 tile; 0 below 2^-126."""
    return _instruction(x * 1.4426950408889634, "ex2")


@triton.jit
def reciprocal(x):
    """1 / x of an fp32 tile with |x| from 1 up, a last place off at most; 0 above 2^126."""
    return _instruction(x, "rcp")


@triton.jit
def sigmoid(x):
    """Of an fp32 tile; what it computes of exp(-x) is shared with x / (exp(-x) + 1)."""
    return reciprocal(exp(x * -1.0) + 1.0)


@triton.jit
def _instruction(x, NAME: tl.constexpr):
    return tl.inline_asm_elementwise(
        NAME + ".approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def rounded(x):
    """An fp32 tile rounded to bf16, as fp32: two by one conversion, which ptxas does not see."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 two; cvt.rn.bf16x2.f32 two, $3, $2; "
        "shl.b32 $0, two, 16; and.b32 $1, two, 0xffff0000; }",
        "=r,=r,r,r",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def narrowed(x):
    """An fp32 tile in bf16: two by one conversion, where ``to`` has a slow one for each."""
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
    )
