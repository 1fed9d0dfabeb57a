"""Train one model under many recipes, seeds and exceptions, on every GPU of the machine at once.

    python examples/convergence.py --out runs
    python examples/convergence.py --out runs --runs bf16,bf16-seed1,nvfp4 --minutes 30
    python examples/convergence.py --list

A run is the name of a variant, and a seed where it is not 0. Runs start in the order given, each in
a process of its own on the first device that is free, so name the slow ones first. Losses are
written as they come; with --minutes everything stops in time, and the same command goes on from
there. At the end curves.py compares what there is.
"""

import argparse
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import corpus
import curves
import torch
from training import LAP, SIZES, Plan, Run, Variant, train

from lpcompile import RECIPES, Operand, Recipe, Rule

NVFP4 = RECIPES["nvfp4"]
_ENVIRONMENT = Lock()  # one process at a time is started in it


def altered(recipe: Recipe, change: Callable[[Operand], Operand]) -> Recipe:
    """The recipe with every operand changed."""
    gemms = {p: getattr(recipe, p) for p in ("fprop", "dgrad", "wgrad")}
    return replace(
        recipe,
        **{p: replace(g, lhs=change(g.lhs), rhs=change(g.rhs)) for p, g in gemms.items() if g},
    )


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("bf16", None, 0),
        *(Variant(name, name, 0) for name in RECIPES if name != "bf16"),
        Variant("nvfp4_last_blocks_bf16", "nvfp4", 0, rules=(Rule("*", "bf16", last=0.15),)),
        Variant("nvfp4_ending_fprop_bf16", "nvfp4", 0, ending=replace(NVFP4, fprop=None)),
        Variant("nvfp4_no_hadamard", altered(NVFP4, lambda o: replace(o, hadamard=0)), 0),
        Variant("nvfp4_no_stochastic", altered(NVFP4, lambda o: replace(o, rounding="nearest")), 0),
        Variant("nvfp4_weights_1x16", altered(NVFP4, lambda o: replace(o, block=(1, 16))), 0),
    )
}

# What the comparison needs first, and of that the slow ones first; the ablations last.
RUNS = (
    "nvfp4,nvfp4_ending_fprop_bf16,nvfp4_last_blocks_bf16,mxfp8,fp8_rowwise,fp8_tensorwise,bf16,"
    "bf16-seed1,nvfp4-seed1,fp8_rowwise-seed1,"
    "nvfp4_no_hadamard,nvfp4_no_stochastic,nvfp4_weights_1x16,fp8_blockwise"
)


def main(argv: list[str] | None = None) -> curves.Curves | None:
    args = arguments(argv)
    if args.list:
        print("\n".join(VARIANTS))
        return None
    deadline = time.monotonic() + 60 * args.minutes
    kind = args.devices[0].partition(":")[0]
    plan = SIZES[args.size].plan(
        kind,
        args.codegen,
        args.steps,
        validate_every=args.validate_every,
        save_every=args.save_every,
    )
    waiting, failed = deque(args.runs), []

    def serve(device: str) -> None:
        while waiting and time.monotonic() < deadline:
            try:
                variant = waiting.popleft()
            except IndexError:  # another device took the last
                return
            process = start(device, train_one, variant, plan, args.corpus, args.out, deadline)
            process.join()
            if process.exitcode:
                failed.append(variant.file)

    servers = [Thread(target=serve, args=(device,)) for device in args.devices]
    for server in servers:
        server.start()
    for server in servers:
        server.join()
    if waiting:
        print(f"Not started after {args.minutes} minutes: {', '.join(v.file for v in waiting)}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    return curves.main([str(args.out)])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpus = ",".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    add = parser.add_argument
    add("--runs", default=RUNS, help="such as bf16,bf16-seed1,nvfp4 (default: all that is told of)")
    add("--list", action="store_true", help="print the variants' names and stop")
    add("--out", type=Path, default=Path("runs"), help="the folder of losses and checkpoints")
    add("--size", choices=SIZES, default="medium")
    add("--steps", type=int, help="training steps (default: the size's own)")
    add("--corpus", default="all", help="stdlib, all (every installed package), or a folder")
    add("--devices", default=gpus or "cpu", help="with commas between (default: every GPU)")
    add("--minutes", type=float, default=math.inf, help="stop after so long")
    add("--validate-every", type=int, default=150, help="steps")
    add("--save-every", type=int, default=1000, help="steps between checkpoints")
    add("--codegen", choices=["inductor", "eager"], default="inductor", help="as in lpcompile")
    args = parser.parse_args(argv)
    for name in ("steps", "validate_every", "save_every"):
        num = getattr(args, name)
        if num is not None and (num < LAP or num % LAP):
            flag = name.replace("_", "-")
            parser.error(f"--{flag} is a multiple of {LAP}, at which losses are read: got {num}")
    args.devices = args.devices.split(",")
    if bad := [d for d in args.devices if not re.fullmatch(r"cpu|cuda:\d+", d)]:
        parser.error(f"--devices are cpu or cuda:0, cuda:1, ...: got {', '.join(bad)}")
    if bad := [d for d in args.devices if d != "cpu" and d not in gpus.split(",")]:
        parser.error(f"--devices: there is no {', '.join(bad)} here, only {gpus or 'the CPU'}")
    if len({d.partition(":")[0] for d in args.devices}) > 1:
        parser.error("--devices are all GPUs or all CPUs: losses of both cannot be compared")
    try:
        args.runs = [variant_of(run) for run in args.runs.split(",")]
    except ValueError as error:
        parser.error(str(error))
    return args


def variant_of(run: str) -> Variant:
    """ "nvfp4-seed1" -> the variant "nvfp4" with seed 1."""
    name, _, seed = run.partition("-seed")
    if name not in VARIANTS or not (seed or "0").isdecimal():
        raise ValueError(
            f"no run {run!r}: name one of {', '.join(VARIANTS)}, and -seed1 for a seed"
        )
    return replace(VARIANTS[name], seed=int(seed or 0))


def start(device: str, target: Callable[..., None], *args: Any) -> BaseProcess:
    """A process that sees that device alone, so that what one compiles serves all the others.

    It has the variable from its first moment: torch counts the GPUs as soon as it is imported, and
    what is set after that moves nothing.
    """
    kind, _, index = device.partition(":")
    process = get_context("spawn").Process(target=target, args=args)
    with _ENVIRONMENT:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        if kind == "cuda":
            os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[int(index)] if seen else index
        process.start()
        if seen is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = seen
        else:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return process


def train_one(variant: Variant, plan: Plan, which: str, out: Path, deadline: float) -> None:
    """One run, told of at every validation."""
    num_told = 0

    def tell(run: Run) -> None:
        nonlocal num_told
        if len(run.validations) > num_told:
            num_told = len(run.validations)
            print(
                f"{variant.file}: {len(run.losses)} of {plan.steps} steps, training "
                f"{run.tail:.4f}, validation {run.validations[-1]:.4f}",
                flush=True,
            )

    began = time.monotonic()
    run = train(variant, plan, corpus.load(which), tell, out, deadline)
    state = "finished" if run.is_finished else "stopped"
    rate = f", {run.tokens_per_second:,.0f} tokens/s" if run.tokens_per_second else ""
    print(f"{variant.file}: {state} after {time.monotonic() - began:.0f} s{rate}", flush=True)


if __name__ == "__main__":
    main()
