"""What is compared: plain Inductor, every recipe, and compiled torchao where it can be imported."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from lpcompile.backend import lowprec
from lpcompile.bench.machine import version_of
from lpcompile.bench.models import (
    EXPERTS,
    LLAMAS,
    GroupedSwiGLU,
    Layer,
    built,
    drawn,
    experts_layer,
    llama_layer,
)
from lpcompile.errors import OptionError

BASELINE = "bf16"
TORCHAO = ("tensorwise", "rowwise")


@dataclass(frozen=True)
class Variant:
    """A way to compile. ``convert`` may change the modules; ``compile`` has Module.compile's keys.

    is_peer: another library, whose failure is a row and not an error. cuda_graphs: recorded once,
    replayed at every step.
    """

    name: str
    compile: dict[str, Any]
    recipe: str = ""
    convert: Callable[[nn.Module], nn.Module] = lambda module: module
    is_peer: bool = False
    cuda_graphs: bool = False

    def in_cuda_graphs(self) -> "Variant":
        """The same by Inductor's CUDA graphs, which leave the host nothing to launch but them."""
        options = {**self.compile.get("options", {}), "triton.cudagraphs": True}
        how, name = self.compile | {"options": options}, f"{self.name}, CUDA graphs"
        return replace(self, name=name, compile=how, cuda_graphs=True)

    def apply(self, module: nn.Module) -> nn.Module:
        """The module, compiled in place."""
        module = self.convert(module)
        module.compile(**self.compile)
        return module

    def runs(self, layer: Layer) -> bool:
        """Whether it is known to run: torchao 0.18 takes groups of multiples of 16 rows alone.

        The weight gradient of others trips an assertion on the device, which ends the process.
        """
        return not (self.is_peer and layer.is_ragged)


def choose(
    recipes: Sequence[str],
    options: dict[str, Any],
    *,
    max_autotune: bool,
    cuda_graphs: bool = False,
    peers: Sequence[str],
) -> list[Variant]:
    """The baseline first, then what was asked for. ``options`` are the backend's, for the recipes.

    With codegen="eager" among the options nothing goes through Inductor: the baseline is aot_eager.
    peers: torchao's recipes, of TORCHAO.
    """
    if options.get("codegen") == "eager":
        if cuda_graphs:
            raise OptionError('CUDA graphs need Inductor, got codegen="eager": leave one out')
        variants = [Variant(BASELINE, {"backend": "aot_eager", "fullgraph": True})]
    else:
        variants = [Variant(BASELINE, {"fullgraph": True})]
    if max_autotune:
        autotuned = {"fullgraph": True, "options": {"max_autotune_gemm": True}}
        variants.append(Variant("bf16 max-autotune", autotuned))
    for recipe in recipes:
        settings = {**options, "recipe": recipe}
        how = {"backend": lowprec, "fullgraph": True, "options": settings}
        variants.append(Variant(recipe, how, recipe=recipe))
    if version_of("torchao"):
        variants += [_torchao(recipe) for recipe in peers]
    return [variant.in_cuda_graphs() for variant in variants] if cuda_graphs else variants


def _torchao(recipe: str) -> Variant:
    """Its conversion of linears, routers left alone, and of experts, for which it has row-wise."""

    def convert(module: nn.Module) -> nn.Module:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name(recipe)
        module = convert_to_float8_training(module, config=config, module_filter_fn=_is_no_router)
        has_experts = any(isinstance(m, GroupedSwiGLU) for m in module.modules())
        return _torchao_experts(module) if has_experts else module

    name = f"torchao {version_of('torchao')} {recipe}"
    return Variant(name, {"fullgraph": True}, convert=convert, is_peer=True)


def _is_no_router(module: nn.Module, path: str) -> bool:
    return not path.endswith("gate")


def _torchao_experts(module: nn.Module) -> nn.Module:
    from torchao.prototype.moe_training.config import Float8TrainingOpConfig, Float8TrainingRecipe
    from torchao.quantization.quant_api import quantize_

    config = Float8TrainingOpConfig.from_recipe(Float8TrainingRecipe.FP8_ROWWISE)
    quantize_(module, config=config, filter_fn=lambda m, path: isinstance(m, GroupedSwiGLU))
    return module


def static_shapes() -> AbstractContextManager[None]:
    """Every variant and size compiles for itself: of one code object, in one process.

    Otherwise Dynamo makes sizes dynamic that it has seen change, and stops at eight compiles.
    """
    patches = {"recompile_limit": 64, "automatic_dynamic_shapes": False}
    return cast(AbstractContextManager[None], torch._dynamo.config.patch(patches))


def warm_up(variants: Sequence[Variant], device: torch.device) -> None:
    """Compile a small block with Inductor's and our backend, so that no time has imports.

    Peers convert small experts, which imports what they need.
    """
    layer = llama_layer("block", LLAMAS["tiny"])
    with static_shapes():
        for variant in [*variants[:1], *[v for v in variants if v.recipe][:1]]:
            variant.apply(built(layer, device))(*drawn(layer, device)).sum().backward()
    experts = experts_layer(EXPERTS["tiny"], ragged=False)
    for variant in variants:
        if variant.is_peer:
            with suppress(Exception):  # it is a row of the comparison that says so
                variant.convert(built(experts, device))
