"""``python -m lpcompile doctor``: versions, what runs natively here, and a self-test of the ops.

The self-test gives every op samples of its own and compares what this device makes with the
reference or, where an op has one, with the exact product; then one linear through the compiler with
the eager one. A failure here means wrong training, so the exit status is 1.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lpcompile import ahead, functional, ops
from lpcompile.backend import lowprec_eager
from lpcompile.bench import machine
from lpcompile.cost import kind
from lpcompile.ops.define import same_bits
from lpcompile.recipes import DEFAULT, PRODUCTS, RECIPES, Gemm

TESTED = ("2.11", "2.13")  # torch
NUM_SAMPLES = 6  # of each op: all of them are a thousand kernels

# What multiplies each family of formats in hardware, by compute capability; the rest is emulated.
NATIVE: dict[str, Callable[[tuple[int, int]], bool]] = {
    "fp8": lambda capability: capability >= (8, 9),
    "mxfp8": lambda capability: capability[0] == 10,
    "nvfp4": lambda capability: capability[0] == 10,
}


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``doctor`` to the command line."""
    what = "versions, what runs natively, and a self-test"
    command = commands.add_parser("doctor", help=what, description=what)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument("--device", type=machine.device, default=default)
    command.set_defaults(run=lambda args: examine(args.device, Console()))


def examine(device: torch.device, console: Console) -> int:
    """Print what there is to know; 1 when an op does not compute what it should."""
    for name, value in machine.describe(device).items():
        console.print(f"{name}: {value}", markup=False, highlight=False)
    if not torch.__version__.startswith(TESTED):
        console.print(f"torch {torch.__version__} is not among the tested: {', '.join(TESTED)}")
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        console.print("lpcompile has been run on capability 9.0 and on CPUs, on nothing else")
    console.print(_recipes(device))
    problems = {name: problem for name, problem in self_test(device).items() if problem}
    for name, problem in problems.items():
        console.print(f"WRONG {name}: {problem}", markup=False)
    if not problems:
        checked = f"{len(ops.ALL)} ops and a compiled linear compute what they should"
        console.print(f"self-test on {device.type}: {checked}")
    return int(bool(problems))


def natively(gemm: Gemm | None, device: torch.device) -> str:
    """How a product runs on the device: "native", "emulated", or "bf16" if it is not narrowed."""
    if gemm is None:
        return "bf16"
    family, _ = kind(gemm)
    is_gpu = device.type == "cuda"
    runs = is_gpu and NATIVE[family](torch.cuda.get_device_capability(device))
    return "native" if runs else "emulated"


def _recipes(device: torch.device) -> Table:
    table = Table(title="How each recipe's GEMMs run here", title_justify="left")
    for column in ("recipe", *PRODUCTS):
        table.add_column(column)
    for name, recipe in RECIPES.items():
        table.add_row(name, *(natively(recipe.gemm(p), device) for p in PRODUCTS))
    return table


def self_test(device: torch.device) -> dict[str, str]:
    """What is wrong with each op, and with a compiled linear; empty strings where nothing is."""
    torch.manual_seed(0)
    found: dict[str, str] = {}
    samples = [(module, args) for module in ops.ALL for args in _samples(module, device)]
    kernels = []
    if device.type == "cuda":  # left to their first calls, kernels compile one after another
        launches: list[tuple[Any, ...]] = [(module.launch, args, {}) for module, args in samples]
        kernels = [ahead.start_all(launches, device)]
    expected = [_expectation(module, args) for module, args in samples]  # meanwhile
    wait(kernels)
    for (module, args), expectation in zip(samples, expected, strict=True):
        name = module.__name__.rpartition(".")[2]
        found[name] = found.get(name) or _compare(module, args, expectation)
    found["compiled linear"] = _compiled_linear(device)
    return found


def _samples(module: Any, device: torch.device) -> list[tuple[Any, ...]]:
    """About NUM_SAMPLES of what an op's tests take, from all of it: each may be another kernel."""
    every = module.samples(device.type)
    return list(every[:: max(1, len(every) // NUM_SAMPLES)])


def _expectation(module: Any, args: tuple[Any, ...]) -> Any:
    """What the op should make of a sample, or the error that computing it raised."""
    try:
        return getattr(module, "exact", module.reference)(*args)
    except Exception as error:
        return error


def _compare(module: Any, args: tuple[Any, ...], expectation: Any) -> str:
    try:
        if isinstance(expectation, Exception):
            raise expectation
        return str(module.agrees(module.op(*args), expectation))
    except Exception as error:  # a kernel that does not compile is a finding too
        return f"{type(error).__name__}: {error}"


def _compiled_linear(device: torch.device) -> str:
    """Output and gradients of one linear through the backend against the eager functions."""
    w = torch.nn.Parameter(torch.randn(64, 96, device=device, dtype=torch.bfloat16))
    x = torch.randn(48, 96, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(48, 64, device=device, dtype=torch.bfloat16)
    # A function of ours: Dynamo skips the forward of a bare nn.Linear, which is torch's own file.
    compiled = torch.compile(
        lambda x, w: torch.nn.functional.linear(x, w),
        backend=lowprec_eager,
        fullgraph=True,
        options={"recipe": DEFAULT, "rewrite": "all"},
    )
    made = []
    for y in (compiled(x, w), functional.linear(x, w, recipe=DEFAULT)):
        made.append((y.detach(), *torch.autograd.grad(y, (x, w), dy)))
    return same_bits(*made)
