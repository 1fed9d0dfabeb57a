"""``lpcompile.switch(model, recipe)``: another recipe for what is compiled, between two steps.

Bf16 warm-up and the forward-in-bf16 end of an NVFP4 run are one line in a training loop. Nothing
but the compiled call changes: parameters, optimizer state, FSDP2's hooks and checkpoint wrappers
are those of before, so a checkpoint from either side of a switch loads into either.

Every compiled module is compiled by ``torch.compile`` anew, with its own settings and the other
recipe. Dynamo keeps what it compiled by the backend and its options, compared by value, so blocks
that are alike share a compile as they did before, and switching back finds what is there.

Exchanging the recipe inside one compiled call lost: the backend is asked once for each graph, and
a guard on a recipe would have to stand in every user's traced code.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

from lpcompile.api import SWITCHED, not_skipped
from lpcompile.backend import lowprec, lowprec_eager
from lpcompile.convert import Linear
from lpcompile.errors import LowPrecisionError, check_module
from lpcompile.experts import Experts
from lpcompile.recipes import Recipe, get_recipe

OURS = (lowprec, lowprec_eager)
_RECOMPILES = dynamo_config.recompile_limit
_switched_to: set[Recipe | str] = set()


@dataclass(frozen=True)
class Settings:
    """How ``torch.compile`` was asked to compile something by one of our backends."""

    backend: Callable[..., Any]
    fullgraph: bool
    dynamic: bool | None
    options: dict[str, Any] = field(default_factory=dict)
    mode: str | None = None

    def compile(self, what: Any, recipe: str | Recipe) -> Any:
        """``what`` compiled so, with another recipe. torch takes no mode beside options."""
        options = {**self.options, "recipe": recipe}
        if self.mode is not None:
            options = {**torch._inductor.list_mode_options(self.mode), **options}
        return torch.compile(
            what,
            backend=self.backend,
            options=options,
            fullgraph=self.fullgraph,
            dynamic=self.dynamic,
        )


def switch(model: nn.Module, recipe: str | Recipe) -> list[str]:
    """Change the recipe of every module of ``model`` that lpcompile compiled or converted.

    Takes model.compile, torch.compile(model), compile_blocks, instances of decorated classes, and
    ``convert``; rules stay in force, so that ``recipe`` is for what no rule names. To be called
    between two steps: not between a forward and its backward. Returns the paths of what changed.
    LowPrecisionError where there is nothing to switch.
    """
    check_module("switch", model)
    get_recipe(recipe)
    changed = [name for name, module in model.named_modules() if _switch(module, recipe)]
    if not changed:
        raise LowPrecisionError(
            f"nothing to switch in {type(model).__name__}: no module of it is compiled with "
            "backend='lowprec' or converted; call its compile(), lpcompile.compile_blocks or "
            "lpcompile.convert before"
        )
    if recipe not in _switched_to:
        # Dynamo counts the recompiles of a function over all backends: each recipe gets the number
        # that torch grants one.
        _switched_to.add(recipe)
        dynamo_config.recompile_limit += _RECOMPILES
    return changed


def _switch(module: nn.Module, recipe: str | Recipe) -> bool:
    changed = False
    if isinstance(module, (Linear, Experts)) and not module.is_named:
        vars(module).update(recipe=get_recipe(recipe))
        changed = True
    if hasattr(type(module).forward, "_lpcompile_compiles"):
        setattr(module, SWITCHED, recipe)
        changed = True
    if isinstance(module, OptimizedModule):
        settings = _settings(module.dynamo_ctx)
        if settings is not None:
            module.dynamo_ctx = settings.compile(module._orig_mod, recipe).dynamo_ctx
            module._initialize()
            changed = True
    elif module._compiled_call_impl is not None:
        settings = _settings(_context(module._compiled_call_impl))
        if settings is not None:
            module._compiled_call_impl = settings.compile(not_skipped(module._call_impl), recipe)
            changed = True
    return changed


def _context(compiled: Callable[..., Any]) -> Any:
    """What torch.compile made a callable of: kept in a closure alone (torch 2.11 to 2.13)."""
    asks = getattr(compiled, "get_compiler_config", None)
    return inspect.getclosurevars(asks).nonlocals.get("self") if asks else None


def _settings(context: Any) -> Settings | None:
    """The settings of what one of our backends compiles, or None."""
    if context is None:
        return None
    wrapper = innermost_backend(context.callback)
    backend = getattr(wrapper, "compiler_fn", wrapper)
    if backend not in OURS:
        return None
    given: dict[str, Any] = getattr(wrapper, "kwargs", {})
    return Settings(
        backend,
        context.fullgraph,
        context._dynamic,
        dict(given.get("options", {})),
        given.get("mode"),
    )
