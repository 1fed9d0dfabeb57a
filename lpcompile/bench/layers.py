"""``bench ffn`` and ``bench block``: forward and backward of one layer, each way to compile it.

ms          median of one forward + backward, gradients of the input included
spread      (90th percentile - 10th) / median
speedup     bf16's ms / this ms; predicted: the cost model's, from bf16's measured ms
peak GiB    most memory allocated in a step: weights, gradients, what is saved and temporaries
compile s   to the end of the first forward + backward, with empty caches
dx error    |dx - dx of bf16| / |dx of bf16|: 0 would mean that nothing was narrowed
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from lpcompile import cost
from lpcompile.bench import models
from lpcompile.bench.models import Llama
from lpcompile.bench.report import Row
from lpcompile.bench.timing import interleave, synchronize
from lpcompile.bench.variants import Variant
from lpcompile.recipes import PRODUCTS, get_recipe

WARM_STEPS = 3


@dataclass
class Candidate:
    """One variant, compiled: a step to time, and what was seen before timing."""

    variant: Variant
    step: Callable[[], object]
    peak_gib: float | None
    compile_s: float
    dx: Tensor


def compare(
    part: str, model: Llama, variants: Sequence[Variant], device: torch.device, repeats: int
) -> list[Row]:
    """One row a variant for an "ffn" or a "block" of the model; the first variant is the baseline.

    A variant that raises gives a row that says so: the others' numbers are not lost.
    """
    torch._dynamo.reset()
    shape = (model.batch, model.sequence, model.dim)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    ready: list[Candidate] = []
    failures: dict[str, Row] = {}
    # Every variant compiles the same code object, so Dynamo's limit of 8 would be met.
    with torch._dynamo.config.patch(recompile_limit=64):
        for variant in variants:
            torch.manual_seed(0)
            try:
                ready.append(_prepare(variant, models.build(part, model, device), x, dy))
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
            "spread": timings[name].spread,
            "speedup": before / timings[name].ms,
            "predicted speedup": predicted(part, model, candidate.variant.recipe, before),
            "peak GiB": candidate.peak_gib,
            "peak ratio": ratio(candidate.peak_gib, base.peak_gib),
            "compile s": candidate.compile_s,
            "compile ratio": candidate.compile_s / base.compile_s,
            "dx error": float((candidate.dx - base.dx).norm() / base.dx.norm()),
        }
    head = {"model": model.name, "tokens": model.tokens}
    return [head | {"variant": v.name} | (rows | failures)[v.name] for v in variants]


def failure(variant: Variant, error: Exception) -> Row:
    """The row of a variant that raised; a peer's does not make the benchmark fail."""
    column = "peer failed" if variant.is_peer else "failed"
    return {column: f"{type(error).__name__}: {error}"[:200]}


def ratio(part: float | None, whole: float | None) -> float | None:
    """part / whole where both are known."""
    return part / whole if part and whole else None


def predicted(part: str, model: Llama, recipe: str, bf16_ms: float) -> float | None:
    """The speedup that the cost model expects of a layer that takes bf16_ms; None without a recipe.

    What is not a GEMM, and a GEMM that does not pay, takes as long as before.
    """
    if not recipe:
        return None
    saved_us = 0.0
    for linear in models.linears(model, part):
        # x is the lhs of fprop and the rhs of wgrad.
        readers = {"fprop": (linear.readers, 1), "dgrad": (1, 1), "wgrad": (1, linear.readers)}
        for product in PRODUCTS:
            gemm = get_recipe(recipe).gemm(product)
            if gemm is not None:
                shape, target = (model.tokens, linear.n, linear.k), cost.target_for(gemm)
                e = cost.gain(product, gemm, *shape, target, readers=readers[product])
                saved_us += max(0.0, e.bf16_us - e.lowprec_us)
    return bf16_ms / max(bf16_ms - saved_us / 1e3, 0.1 * bf16_ms)


def _prepare(variant: Variant, module: nn.Module, x: Tensor, dy: Tensor) -> Candidate:
    """Compile with empty caches, and measure the memory of one step."""
    on_gpu = x.device.type == "cuda"
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    module = variant.apply(module)
    x.grad = None

    def step() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(x).backward(dy)

    before = torch.cuda.memory_allocated() - weights if on_gpu else 0
    with fresh_cache():
        start = time.perf_counter()
        step()
        synchronize(x.device)
        seconds = time.perf_counter() - start
        for _ in range(WARM_STEPS - 1):
            step()
    peak = None
    if on_gpu:
        synchronize(x.device)
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    if x.grad is None:
        raise RuntimeError(f"{variant.name} made no gradient of its input")
    dx = x.grad.float()
    module.zero_grad(set_to_none=True)
    x.grad = None
    return Candidate(variant, step, peak, seconds, dx)
