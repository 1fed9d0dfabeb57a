"""``bench model``: training steps of a Llama cut to the layers that fit, on one GPU.

Each block is compiled by itself; the embedding, the head and fused AdamW are eager, bf16 and the
same for everybody. A step is a number of forward + backward passes and one update. MFU counts the
model's FLOPs (6 a weight and token; half of the attention matrix, as it is causal), nothing that is
recomputed, over the datasheet's bf16 peak. Peak memory holds gradients and optimizer state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lpcompile.bench.layers import failure, ratio
from lpcompile.bench.models import Llama, Transformer, linears
from lpcompile.bench.report import Row
from lpcompile.bench.timing import interleave, synchronize
from lpcompile.bench.variants import Variant, static_shapes

# Dense bf16 FLOP/s in the datasheets, by what the device's name holds.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "GB200": 2.5e15, "B200": 2.25e15}


@dataclass
class Run:
    """A model in training; a call takes one step of ``num_passes`` forwards and backwards."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    tokens: Tensor
    targets: Tensor
    peak_gib: float | None = None

    def step(self, num_passes: int) -> None:
        """Accumulate the gradient of as many passes, update, forget the gradient."""
        for _ in range(num_passes):
            (self.model(self.tokens, self.targets) / num_passes).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def flops_per_token(model: Llama, num_layers: int) -> float:
    """Of forward and backward. The embedding is a look-up, the head a GEMM."""
    weights = num_layers * sum(linear.n * linear.k for linear in linears(model, "block"))
    weights += model.dim * model.vocabulary
    attention = 6 * num_layers * model.sequence * model.num_heads * model.head_dim
    return 6 * weights + attention


def compare(
    model: Llama,
    num_layers: int,
    variants: Sequence[Variant],
    passes: Sequence[int],
    device: torch.device,
    repeats: int,
) -> list[Row]:
    """One row a variant and number of passes a step; the first variant is the baseline."""
    torch._dynamo.reset()
    shape = (model.batch, model.sequence)
    data = [torch.randint(model.vocabulary, shape, device=device) for _ in range(2)]
    failures: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    with static_shapes():
        for variant in variants:
            torch.manual_seed(0)
            try:
                runs[variant.name] = _prepare(variant, model, num_layers, data)
            except Exception as error:  # whatever a compiler raises
                failures[variant.name] = failure(variant, error)
        base = variants[0].name
        if base not in runs:
            raise RuntimeError(f"the baseline does not run: {failures[base]}")
        rows = []
        for num in passes:
            steps = {name: partial(run.step, num) for name, run in runs.items()}
            timings = interleave(steps, device, max(repeats // num, 5))
            for variant in variants:
                head = {"model": f"{model.name}, {num_layers} layers", "tokens": model.tokens}
                row: Row = head | {"passes a step": num, "variant": variant.name}
                if variant.name in runs:
                    ms = timings[variant.name].ms
                    row |= _rates(model, num_layers, ms / num, device)
                    row["speedup"] = timings[base].ms / ms
                    row["peak GiB"] = runs[variant.name].peak_gib
                    row["peak ratio"] = ratio(runs[variant.name].peak_gib, runs[base].peak_gib)
                rows.append(row | failures.get(variant.name, {}))
    return rows


def _rates(model: Llama, num_layers: int, pass_ms: float, device: torch.device) -> Row:
    rate = model.tokens / (pass_ms * 1e-3)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((flops for part, flops in PEAKS.items() if part in name), None)
    mfu = rate * flops_per_token(model, num_layers) / peak if peak else None
    return {"ms a pass": pass_ms, "tokens/s": rate, "MFU share": mfu}


def _prepare(variant: Variant, model: Llama, num_layers: int, data: list[Tensor]) -> Run:
    """Build and compile a model, take three steps, and measure the memory of another."""
    device = data[0].device
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    with torch.device(device):
        module = Transformer(model, num_layers).to(torch.bfloat16)
    for layer in module.layers:
        variant.apply(layer)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
    run = Run(module, optimizer, data[0], data[1])
    for _ in range(3):
        run.step(1)
    if on_gpu:
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        run.step(1)
        run.peak_gib = (torch.cuda.max_memory_allocated() - before) / 2**30
    return run
