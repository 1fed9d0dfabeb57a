"""``lpcompile.explain``: what the backend would do with a model, without running or allocating it.

The model's parameters are exchanged for fake ones while Dynamo and AOTAutograd trace it, so a 70B
model on the meta device takes seconds and no memory.
"""

import gc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import networkx
import torch
import torch.distributed as dist
from networkx.algorithms.flow import boykov_kolmogorov
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.nn.utils import stateless
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lpcompile.backend import compile_graph
from lpcompile.errors import LowPrecisionError, RuleError, check_module
from lpcompile.options import Options, overlaid, parse
from lpcompile.pipeline import Compile, observe
from lpcompile.recipes import Recipe, get_recipe
from lpcompile.report import Report, SavedBytes


def explain(
    model: nn.Module,
    *args: Any,
    recipe: str | Recipe | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """The Report of ``model(*args, **kwargs)``: one row per GEMM, forward and backward.

    model: on any device, meta included; nothing is computed and nothing of it changes.
    recipe: short for ``options={"recipe": recipe}``; options as for the backend.
    The backward is traced when a parameter or an input requires grad, so call it under no_grad to
    see inference. A parameter that is a DTensor shows the sizes of this rank's shard. RuleError for
    a rule that matched nothing. What torch.compile has made in this process is forgotten
    (``torch._dynamo.reset``): call it before a run, not in its midst.
    """
    check_module("explain", model)
    _refuse_fsdp(model)
    chosen = parse(overlaid(options, recipe=recipe))
    chosen = replace(chosen, codegen="eager")
    compiles = trace(model, args, kwargs, chosen)
    if not any(c.has_run for c in compiles):
        raise LowPrecisionError(
            f"{type(model).__name__} compiled to no graph: is it wrapped in torch.compiler.disable?"
        )
    unmatched = set.intersection(*(set(c.unmatched) for c in compiles))
    if unmatched:
        raise RuleError(
            f"rule {sorted(unmatched)[0]!r} matched no GEMM of {type(model).__name__}; its modules "
            f"with GEMMs: {_some(sorted({r.module for c in compiles for r in c.rows}))}"
        )
    saved = [c.saved_bytes for c in compiles if c.saved_bytes is not None]
    return Report(
        [row for c in compiles for row in c.rows],
        SavedBytes(sum(s.before for s in saved), sum(s.after for s in saved)) if saved else None,
        chosen.target_of(get_recipe(chosen.recipe)),
    )


def _refuse_fsdp(model: nn.Module) -> None:
    """FSDP2 keeps weights of its own beside the module's, and gathers those: it cannot be faked."""
    if not dist.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(m, FSDPModule) for m in model.modules()):
        raise LowPrecisionError(
            f"explain takes a model before fully_shard, got a {type(model).__name__} after it: "
            "explain it first. FSDP gathers whole weights for every GEMM, so sizes are the same, "
            "with the batch of one rank"
        )


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> list[Compile]:
    """Compile every graph of a call on fake tensors, and give back what the passes found."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    device = _device(args, kwargs)

    def fake(x: Any) -> Any:
        return _fake(x, mode, device)

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with mode:
        fakes = {name: fake(t) for name, t in tensors.items()}
        given, named = pytree.tree_map(fake, (args, kwargs))

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_graph(gm, inputs, options)

    torch._dynamo.reset()
    try:
        with (
            _hurried(),
            observe(measures=True) as seen,
            mode,
            _uncompiled(model),
            stateless._reparametrize_module(model, fakes, tie_weights=True),
        ):
            torch.compile(model, backend=backend)(*given, **named)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, LowPrecisionError):
            raise error.inner_exception from None
        raise
    except (DataDependentOutputException, GuardOnDataDependentSymNode) as error:
        raise LowPrecisionError(
            f"{type(model).__name__} decides by the value of a tensor, and explain has none "
            f"({str(error).splitlines()[0]}): explain a module of it that does not, or compile it "
            "and read the log"
        ) from error
    finally:
        torch._dynamo.reset()
    return seen


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Without what ``compile`` made of the model's modules, which would run on the fake tensors."""
    with ExitStack() as stack:
        for module in model.modules():
            if module._compiled_call_impl is not None:
                stack.enter_context(patch.object(module, "_compiled_call_impl", None))
        yield


@contextmanager
def _hurried() -> Iterator[None]:
    """A third less time for the same report: no garbage collection, and a quicker minimum cut.

    Every maximum flow leaves the same nodes that reach the sink, so the cut is the same whichever
    algorithm finds it; networkx's default takes five times as long on these graphs.
    """
    quick = partial(networkx.minimum_cut, flow_func=boykov_kolmogorov)
    collects = gc.isenabled()
    gc.disable()
    try:
        with patch.object(networkx, "minimum_cut", quick):
            yield
    finally:
        if collects:
            gc.enable()


def _fake(x: Any, mode: FakeTensorMode, device: torch.device) -> Any:
    """A fake tensor like x, on ``device`` if x is on the meta device."""
    if not isinstance(x, torch.Tensor):
        return x
    made: Any
    if is_traceable_wrapper_subclass(x):  # a DTensor: its shard is what is narrowed
        names, context = x.__tensor_flatten__()
        inner = {name: _fake(getattr(x, name), mode, device) for name in names}
        made = type(x).__tensor_unflatten__(inner, context, x.size(), x.stride()).detach()
    else:
        where = device if x.device.type == "meta" else x.device
        with mode:
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=where)
    if isinstance(x, nn.Parameter):
        return nn.Parameter(made, requires_grad=x.requires_grad)
    return made.requires_grad_(x.requires_grad)


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """The device to trace meta tensors on: that of the first input which has one, else the CPU."""
    for x in pytree.tree_leaves((args, kwargs)):
        if isinstance(x, torch.Tensor) and x.device.type != "meta":
            return x.device
    return torch.device("cpu")


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:8])
    return f"{shown}, and {len(names) - 8} more" if len(names) > 8 else shown
