"""``bench ffn``, ``block`` and ``experts``: forward and backward of one layer, however compiled.

ms          median of one forward + backward, gradients of the input included
host ms     median until it returns, on an idle GPU: with ``ms`` near it, launching bounds the step
spread      (90th percentile - 10th) / median
speedup     bf16's ms / this ms; predicted: the cost model's, from bf16's measured ms
peak GiB    most memory allocated in a step: weights, gradients, what is saved and temporaries;
            not of CUDA graphs, which allocate when they are recorded, in a pool that all share
compile s   to the end of the first forward + backward, with empty caches
dw error    |dw - dw of bf16| / |dw of bf16|, all weights: 0 where nothing was narrowed
"""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from lpcompile.bench.models import Layer, built, drawn
from lpcompile.bench.report import Row
from lpcompile.bench.timing import host_ms, interleave, synchronize
from lpcompile.bench.variants import Variant, static_shapes
from lpcompile.cost import H200
from lpcompile.errors import RuleError
from lpcompile.explain import explain

WARM_STEPS = 3


@dataclass
class Candidate:
    """One variant, compiled: a step to time, and what was seen before timing."""

    variant: Variant
    step: Callable[[], object]
    peak_gib: float | None
    compile_s: float
    dw: list[Tensor]
    dw_error: float = 0.0


def compare(
    layer: Layer, variants: Sequence[Variant], device: torch.device, repeats: int
) -> list[Row]:
    """One row a variant; the first variant is the baseline.

    A variant that raises gives a row that says so: the others' numbers are not lost.
    """
    torch._dynamo.reset()
    inputs = drawn(layer, device)
    dy = torch.randn_like(inputs[0])
    ready: list[Candidate] = []
    failures: dict[str, Row] = {}
    with static_shapes():
        for variant in variants:
            try:
                ready.append(_prepare(variant, built(layer, device), inputs, dy))
                ready[-1].dw_error = _distance(ready[-1].dw, ready[0].dw)
                if len(ready) > 1:
                    ready[-1].dw.clear()
            except Exception as error:  # whatever a compiler raises
                failures[variant.name] = failure(variant, error)
        if not ready or ready[0].variant is not variants[0]:
            raise RuntimeError(f"the baseline does not run: {failures[variants[0].name]}")
        timings = interleave({c.variant.name: c.step for c in ready}, device, repeats)
    base, before = ready[0], timings[ready[0].variant.name].ms
    rows = {}
    for candidate in ready:
        name = candidate.variant.name
        rows[name] = {
            "ms": timings[name].ms,
            "host ms": host_ms(candidate.step, device),
            "spread": timings[name].spread,
            "speedup": before / timings[name].ms,
            "predicted speedup": None,
            "peak GiB": candidate.peak_gib,
            "peak ratio": ratio(candidate.peak_gib, base.peak_gib),
            "compile s": candidate.compile_s,
            "compile ratio": candidate.compile_s / base.compile_s,
            "dw error": candidate.dw_error,
        }
    for candidate in ready:  # last: it forgets what was compiled
        with suppress(RuleError):  # of a rule for another layer: explain refuses it
            expected = predicted(layer, candidate.variant, before)
            rows[candidate.variant.name]["predicted speedup"] = expected
    head = {"model": layer.model, "tokens": layer.tokens}
    return [head | {"variant": v.name} | (rows | failures)[v.name] for v in variants]


def failure(variant: Variant, error: Exception) -> Row:
    """The row of a variant that raised; a peer's does not make the benchmark fail."""
    column = "peer failed" if variant.is_peer else "failed"
    return {column: f"{type(error).__name__}: {error}"[:200]}


def ratio(part: float | None, whole: float | None) -> float | None:
    """part / whole where both are known."""
    return part / whole if part and whole else None


def predicted(layer: Layer, variant: Variant, bf16_ms: float) -> float | None:
    """The speedup that the cost model expects of a layer that takes bf16_ms; None without a recipe.

    On the H200, which emulates what pays on another target. What is not a GEMM, and a GEMM that
    stays bf16, takes as long as before. Not to be called between steps of compiled modules:
    ``explain`` forgets them.
    """
    if not variant.recipe:
        return None
    options = variant.compile["options"]
    meta = torch.device("meta")
    module, inputs = built(layer, meta), drawn(layer, meta)
    decided = timed = explain(module, *inputs, options=options)
    if decided.target != H200.name:
        timed = explain(module, *inputs, options={**options, "target": H200.name})
    saved_us = 0.0
    for row, same in zip(decided.rows, timed.rows, strict=True):
        if row.rewritten and same.estimate is not None:
            saved_us += same.estimate.bf16_us - same.estimate.lowprec_us
    return bf16_ms / max(bf16_ms - saved_us / 1e3, 0.1 * bf16_ms)


def _distance(made: list[Tensor], expected: list[Tensor]) -> float:
    """|made - expected| / |expected| over all tensors together."""
    apart = sum((a.float() - b.float()).square().sum() for a, b in zip(made, expected, strict=True))
    return float((apart / sum(b.float().square().sum() for b in expected)) ** 0.5)


def _prepare(
    variant: Variant, module: nn.Module, inputs: tuple[Tensor, ...], dy: Tensor
) -> Candidate:
    """Compile with empty caches, and measure the memory of one step."""
    x, allocates = inputs[0], dy.device.type == "cuda" and not variant.cuda_graphs
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    module, skips = variant.apply(module), _counted_skips()
    x.grad = None

    def step() -> None:
        if variant.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(*inputs).backward(dy)

    with fresh_cache():
        start = time.perf_counter()
        step()
        synchronize(x.device)
        seconds = time.perf_counter() - start
        for _ in range(WARM_STEPS - 1):
            step()
    peak = None
    if allocates:
        module.zero_grad(set_to_none=True)
        x.grad = None
        gc.collect()  # what compiling left behind, here and before, is in no step
        synchronize(x.device)
        before = torch.cuda.memory_allocated() - weights
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    missing = [name for name, p in module.named_parameters() if p.grad is None]
    if missing or x.grad is None:
        raise RuntimeError(f"{variant.name} made no gradient of {missing or 'the input'}")
    if variant.cuda_graphs and (skipped := _counted_skips() - skips):
        raise RuntimeError(f"{variant.name}: Inductor recorded none of {skipped} graphs")
    # Of their own: what a CUDA graph made, the next one overwrites.
    dw = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad(set_to_none=True)
    x.grad = None
    return Candidate(variant, step, peak, seconds, dw)


def _counted_skips() -> int:
    """How many graphs Inductor has not recorded, of those it was to record as CUDA graphs."""
    return int(counters["inductor"]["cudagraph_skips"])
