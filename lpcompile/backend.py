"""``torch.compile(model, backend="lowprec")``: Inductor, with lpcompile's passes in it.

Found by the entry points of this package, so that nothing need be imported. A checkout that is only
on the path has none: there, importing it registers what they would name. Never both:
``register_backend`` fails with "duplicate name" in a process that comes by the entry point (torch
2.11 to 2.13).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from typing import Any

from torch import fx
from torch._dynamo import register_backend
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

import lpcompile.lowerings  # noqa: F401
from lpcompile import dumps
from lpcompile.flow import Leaves
from lpcompile.options import Options, parse
from lpcompile.pipeline import Compile, JointPass, Partition, PostPass, graph_key, register
from lpcompile.recipes import name_of
from lpcompile.report import summarize

log = logging.getLogger("lpcompile")


def lowprec(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its linears in low precision; see ``lpcompile.Options``.

    ``mode`` is Inductor's; ``options`` takes lpcompile's and Inductor's keys side by side.
    """
    return compile_graph(gm, example_inputs, parse(options, mode))


def lowprec_eager(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """``lowprec`` with ``codegen="eager"``: the rewritten graphs, run op by op."""
    return compile_graph(gm, example_inputs, replace(parse(options, mode), codegen="eager"))


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> Callable[..., Any]:
    """Run AOTAutograd, the passes and the code generation that ``options`` names."""
    leaves = Leaves.of(gm, example_inputs)
    compile = Compile(options, leaves, graph_key(gm, leaves))
    register(compile)
    compile.dump = dumps.begin(gm, options)
    compile.measures |= compile.dump is not None
    after_the_cut = PostPass(compile)
    patches: dict[str, Any] = {
        **dict(options.inductor),
        "joint_custom_pre_pass": JointPass(compile),
        "post_grad_custom_post_pass": after_the_cut,
    }
    if compile.watches_cut:
        patches["custom_partitioner_fn"] = Partition(compile)
    if compile.measures:
        patches["force_disable_caches"] = True  # on a hit no pass runs
    inner: Any = compile_fx_inner
    if options.codegen == "eager":
        inner = partial(run_op_by_op, passes=after_the_cut)
        patches["force_disable_caches"] = True  # there is no artifact to cache
    elif compile.dump is not None:
        inner = compile.dump.inductor(inner)
    inner = partial(with_kernels, inner=inner, compile=compile)
    with functorch_config.patch(_for_memory_budget()):
        compiled: Any = compile_fx(gm, example_inputs, inner_compile=inner, config_patches=patches)
    announce(compile)
    return compiled


def run_op_by_op(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, passes: PostPass, **kwargs: Any
) -> Any:
    """An inner compiler that runs a partitioned graph as it is, after the last passes."""
    passes(gm.graph)
    gm.recompile()

    def run(args: list[Any]) -> Any:
        given = list(args)
        args.clear()  # boxed: the graph alone keeps its inputs alive
        return gm(*given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def with_kernels(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    inner: Callable[..., Any],
    compile: Compile,
    **kwargs: Any,
) -> Any:
    """An inner compiler that is done when the kernels that a pass began to compile are.

    Where that failed they compile at their first call.
    """
    made = inner(gm, example_inputs, **kwargs)
    while compile.kernels:
        ahead = compile.kernels.pop()
        if error := ahead.exception():
            log.debug("kernels not compiled ahead", exc_info=error)
        else:
            log.debug("kernels compiled ahead: %d", ahead.result())
    return made


def announce(compile: Compile) -> None:
    """One log line per graph; a WARNING where nothing was rewritten and something was asked for.

    Nothing is asked for where the user's rules leave every GEMM in bf16.
    """
    label = name_of(compile.options.recipe)
    if not compile.has_run:
        log.info("lpcompile: %s: from cache", label)
        return
    for pattern in compile.unmatched:
        log.warning("lpcompile: rule %r matched no GEMM of this graph", pattern)
    rows = compile.rows
    asked = compile.asks if rows else label != "bf16" or compile.options.rules
    nothing = asked and not any(row.rewritten for row in rows)
    level = logging.WARNING if nothing else logging.INFO
    log.log(level, "lpcompile: %s: %s", label, summarize(rows))


def _for_memory_budget() -> dict[str, Any]:
    """AOT's activation memory budget counts only built-in ops unless told to count all.

    Without this every op of ours is recomputed under a budget below 1 (torch 2.11 to 2.13).
    """
    return {"is_non_builtin_to_include": functorch_config.activation_memory_budget < 1}


for _compiler in (lowprec, lowprec_eager):
    if _compiler.__name__ not in entry_points(group="torch_dynamo_backends").names:
        register_backend(_compiler)
