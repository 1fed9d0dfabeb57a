"""The command line of the benchmarks: ``python -m lpcompile bench <what>``."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lpcompile.bench import gemms, kernels, layers, machine, profile, report, training, variants
from lpcompile.bench.machine import CPU_NOTE, describe, watch_clocks
from lpcompile.bench.models import (
    EXPERTS,
    LLAMAS,
    Experts,
    Layer,
    Llama,
    experts_layer,
    llama_layer,
)
from lpcompile.bench.moe import MOES, MoE, moe_layer
from lpcompile.bench.report import Result
from lpcompile.errors import OptionError
from lpcompile.options import parse
from lpcompile.recipes import RECIPES, get_recipe

DEFAULT_RECIPES = ("fp8_rowwise", "fp8_tensorwise")
OPTIONS = """'{"rewrite": "all"}'"""  # for example
# Where low precision starts to pay: tokens on one GPU.
SWEEP = (2048, 4096, 8192, 16384)


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add ``bench``'s subcommands; each sets ``run``, which returns the exit status."""
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="WHAT")
    for part in ("ffn", "block"):
        what = f"forward + backward of one {part}, every way to compile it, interleaved"
        command = _command(commands, part, what, _layer, [*LLAMAS, *MOES])
        _add_variants(command)
        _add_ragged(command)
        _add_cuda_graphs(command)
        command.add_argument("--tp", type=_count, default=1, help="one rank's shard of so many")
    what = "forward + backward of SwiGLU experts, grouped GEMMs"
    command = _command(commands, "experts", what, _layer, list(EXPERTS))
    _add_variants(command)
    _add_ragged(command)
    _add_cuda_graphs(command)
    command = _command(commands, "gemm", "every GEMM of a block, product by product", _gemm)
    _add_recipes(command, [name for name, r in RECIPES.items() if not r.is_bf16])
    command.add_argument(
        "--experts", nargs="*", default=[], choices=list(EXPERTS), help="and grouped GEMMs of these"
    )
    command = _command(commands, "kernels", "every quantize and amax kernel", _kernels)
    what, parts = "ops on their own, and what is fused of layers under --recipes", kernels.PARTS
    command.add_argument("--parts", nargs="+", choices=parts, default=parts, help=what)
    _add_recipes(command, kernels.RECIPES)
    every = list(dict.fromkeys([*LLAMAS, *MOES, *EXPERTS]))
    command = _command(commands, "profile", "one layer's kernels in order", _profile, every)
    _add_variants(command)
    _add_ragged(command)
    command.add_argument("--part", choices=("ffn", "block", "experts"), default="block")
    command.add_argument("--plot", type=Path, help="draw them into this PNG")
    command = _command(commands, "model", "training steps of the whole model", _model)
    _add_variants(command)
    command.add_argument("--layers", type=_count, help="default: 4, or the model's if it has fewer")
    command.add_argument("--passes", type=_count, nargs="+", default=[1, 8], help="of one step")
    command = commands.add_parser("report", help="a Markdown page of results saved with --json")
    command.add_argument("files", type=Path, nargs="+")
    command.set_defaults(run=_report)


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    what: str,
    measure: Callable[[argparse.Namespace, torch.device], list[Result]],
    models: Sequence[str] = tuple(LLAMAS),
) -> argparse.ArgumentParser:
    """A subcommand with the arguments that all of them take."""
    command = commands.add_parser(name, help=what, description=what)
    command.add_argument("--model", nargs="+", choices=models, help=f"default: {models[0]}")
    if models[0] in LLAMAS:
        command.add_argument("--tokens", nargs="+", type=_count, help=f"a sweep: {SWEEP}")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument("--device", type=machine.device, default=default)
    command.add_argument("--repeats", type=int, default=30)
    command.add_argument("--json", type=Path, help="write the results here too")
    command.set_defaults(run=lambda args: _run(measure, args), first=models[0])
    return command


def _add_recipes(command: argparse.ArgumentParser, default: Sequence[str]) -> None:
    command.add_argument("--recipes", nargs="*", default=list(default))


def _add_ragged(command: argparse.ArgumentParser) -> None:
    what = "of experts: also groups of any size, beside those of 16 n rows"
    command.add_argument("--ragged", action="store_true", help=what)


def _add_cuda_graphs(command: argparse.ArgumentParser) -> None:
    what = "every variant by CUDA graphs, so that the host's time does not count"
    command.add_argument("--cuda-graphs", action="store_true", help=what)


def _add_variants(command: argparse.ArgumentParser) -> None:
    _add_recipes(command, DEFAULT_RECIPES)
    command.add_argument("--max-autotune", action="store_true", help="also bf16, GEMMs autotuned")
    command.add_argument("--no-peers", action="store_true", help="no torchao")
    command.add_argument("--options", type=_options, default={}, help=f"of the backend: {OPTIONS}")


def _count(text: str) -> int:
    with suppress(ValueError):
        if (number := int(text)) > 0:
            return number
    raise argparse.ArgumentTypeError(f"it is a number above 0, got {text!r}")


def _options(text: str) -> dict[str, Any]:
    with suppress(json.JSONDecodeError):
        options = json.loads(text)
        if isinstance(options, dict):
            return options
    raise argparse.ArgumentTypeError(f"options are a JSON object, {OPTIONS}, got {text!r}")


def _run(
    measure: Callable[[argparse.Namespace, torch.device], list[Result]], args: argparse.Namespace
) -> int:
    """Measure, print, save; 1 where something of ours failed."""
    device = args.device
    args.model = args.model or ["tiny" if device.type == "cpu" else args.first]
    if args.repeats < 2:
        raise OptionError(f"a median needs repetitions: --repeats is {args.repeats}, make it 30")
    if args.json and not args.json.absolute().parent.is_dir():
        raise OptionError(f"--json {args.json}: there is no such folder, make it first")
    for recipe in getattr(args, "recipes", ()):
        get_recipe(recipe)
    parse(getattr(args, "options", None))
    torch.manual_seed(0)
    with watch_clocks(device) as clocks:
        results = measure(args, device)
    for result in results:
        result.machine |= clocks
        if device.type == "cpu":
            result.notes.insert(0, CPU_NOTE)
        report.show(result)
    _keep(results, args)
    return int(any(result.failed for result in results))


def _keep(results: list[Result], args: argparse.Namespace) -> None:
    """Save what there is: after every model, so that a run that is ended early loses one."""
    if args.json:
        report.save(results, args.json)


def _result(title: str, device: torch.device) -> Result:
    command = f"python -m lpcompile {shlex.join(sys.argv[1:])}"
    return Result(title, command, describe(device))


def _models(args: argparse.Namespace, among: Mapping[str, Any] = LLAMAS) -> list[Any]:
    """Every model asked for, on every number of tokens asked for."""
    ranks = getattr(args, "tp", 1)
    models = []
    for name in args.model:
        if name not in among:
            raise OptionError(f"{name} has no such part: choose among {', '.join(among)}")
        model = among[name]
        if ranks != 1:
            if not isinstance(model, Llama):
                raise OptionError(f"--tp cuts {', '.join(LLAMAS)}, got {name}: leave --tp out")
            model = model.shard(ranks)
        models.append(model)
    tokens = getattr(args, "tokens", None)
    return [m.with_tokens(t) for m in models for t in tokens] if tokens else models


def _layers(part: str, args: argparse.Namespace) -> list[Layer]:
    """That part of every model asked for; of experts, with --ragged, both ways to group."""
    layers = []
    for model in _models(args, EXPERTS if part == "experts" else {**LLAMAS, **MOES}):
        for ragged in (False, True) if args.ragged else (False,):
            if isinstance(model, MoE):
                layers.append(moe_layer(part, model, ragged=ragged))
            elif isinstance(model, Experts):
                layers.append(experts_layer(model, ragged=ragged))
            elif not ragged:
                layers.append(llama_layer(part, model))
    return layers


def _variants(args: argparse.Namespace, device: torch.device) -> list[variants.Variant]:
    part = args.part if args.benchmark == "profile" else args.benchmark
    cuda_graphs = getattr(args, "cuda_graphs", False)
    if cuda_graphs and device.type != "cuda":
        raise OptionError(f"--cuda-graphs needs a GPU, got --device {device}: leave it out")
    # Of experts alone, torchao's ways do not differ: they differ in linears.
    peers = variants.TORCHAO[1:] if part == "experts" else variants.TORCHAO
    chosen = variants.choose(
        args.recipes,
        args.options,
        max_autotune=args.max_autotune,
        cuda_graphs=cuda_graphs,
        peers=() if args.no_peers else peers,
    )
    variants.warm_up(chosen, device)
    return chosen


def _layer(args: argparse.Namespace, device: torch.device) -> list[Result]:
    result = _result(f"{args.benchmark}: forward + backward", device)
    chosen = _variants(args, device)
    for layer in _layers(args.benchmark, args):
        able = [v for v in chosen if v.runs(layer)]
        result.rows += layers.compare(layer, able, device, args.repeats)
        _keep([result], args)
    return [result]


def _gemm(args: argparse.Namespace, device: torch.device) -> list[Result]:
    result = _result("gemm: operands quantized before", device)
    models: list[Llama | Experts] = [*_models(args), *(EXPERTS[name] for name in args.experts)]
    result.rows = gemms.measure(models, args.recipes, device, args.repeats)
    return [result]


def _kernels(args: argparse.Namespace, device: torch.device) -> list[Result]:
    result = _result("kernels: share of copy bandwidth", device)
    alone, recipes = "ops" in args.parts, args.recipes if "fused" in args.parts else ()
    rows, copy = kernels.measure(_models(args), device, args.repeats, alone=alone, recipes=recipes)
    result.rows = rows
    result.notes.append(f"A large copy moves {copy / 1e12:.3f} TB/s, read and written counted.")
    return [result]


def _profile(args: argparse.Namespace, device: torch.device) -> list[Result]:
    chosen, results = _variants(args, device), []
    for layer in _layers(args.part, args):
        seen = profile.measure(layer, [v for v in chosen if v.runs(layer)], device)
        about = f"{layer.model} {args.part}, {layer.tokens} tokens"
        results.append(replace(_result(f"profile: {about}", device), rows=profile.summary(seen)))
        listing = _result(f"profile: every kernel of {about}", device)
        results.append(replace(listing, rows=profile.listing(seen)))
        if args.plot:
            profile.picture(seen, args.plot)
        _keep(results, args)
    return results


def _model(args: argparse.Namespace, device: torch.device) -> list[Result]:
    result, chosen = _result("model: training steps", device), _variants(args, device)
    for model in _models(args):
        num_layers = args.layers or min(model.num_layers, 4)
        rows = training.compare(model, num_layers, chosen, args.passes, device, args.repeats)
        result.rows += rows
        _keep([result], args)
    return [result]


def _report(args: argparse.Namespace) -> int:
    sys.stdout.write(report.markdown(report.load(args.files)))
    return 0
