"""``bench profile``: the kernels of one forward + backward of a layer, in order, and what each is.

quantize    an op of ours that multiplies nothing: quantize, amax, Hadamard, swizzle
fused       a kernel of Inductor's that quantizes beside other work
GEMM, attention, other
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lpcompile.bench.models import Layer, built, drawn
from lpcompile.bench.report import Row
from lpcompile.bench.timing import synchronize
from lpcompile.bench.variants import Variant, static_shapes
from lpcompile.errors import LowPrecisionError

# The first that is found in "<op that launched it> <kernel>" says what a kernel is.
KINDS = (
    ("attention", r"flash|fmha|attention|sdpa"),
    (
        "GEMM",
        r"lpcompile::scaled|nvjet|gemm|cutlass|xmma|aten::_scaled|aten::mm|aten::addmm|grouped_mm",
    ),
    ("quantize", r"lpcompile::"),
    ("fused", r"quantize|amax_column|amax_tensor"),
    ("other", r""),
)
COLORS = {
    "GEMM": "#4878a8",
    "attention": "#8a6fb0",
    "quantize": "#d1495b",
    "fused": "#e8a33d",
    "other": "#a0a0a0",
}


class Kernel(NamedTuple):
    """One kernel: its name, the op that launched it, and when it ran, in ms."""

    name: str
    op: str
    start: float
    ms: float

    @property
    def kind(self) -> str:
        """What it is, by KINDS."""
        text = f"{self.op} {self.name}".lower()
        return next(kind for kind, pattern in KINDS if re.search(pattern.lower(), text))


def measure(
    layer: Layer, variants: Sequence[Variant], device: torch.device
) -> dict[str, list[Kernel]]:
    """The kernels of one step of each variant, after three steps that are not counted."""
    torch._dynamo.reset()
    inputs = drawn(layer, device)
    dy = torch.randn_like(inputs[0])
    made = {}
    with static_shapes():
        for variant in variants:
            module = variant.apply(built(layer, device))

            def step(module: torch.nn.Module = module) -> None:
                module.zero_grad(set_to_none=True)
                inputs[0].grad = None
                module(*inputs).backward(dy)

            for _ in range(3):
                step()
            made[variant.name] = kernels(step, device)
    return made


def kernels(step: Callable[[], object], device: torch.device) -> list[Kernel]:
    """What ran on the GPU during a step, in order; on a CPU the outermost ops."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    synchronize(device)
    with profile(activities=activities) as seen:
        step()
        synchronize(device)
    events = seen.profiler.kineto_results.events() if seen.profiler else []
    events = [e for e in events if not e.is_user_annotation()]
    ops = {e.correlation_id(): e.name() for e in events if e.linked_correlation_id() == 0}
    if on_gpu:
        ran = [e for e in events if e.device_type() == DeviceType.CUDA]
    else:
        ran = _outermost([e for e in events if e.name().startswith(("aten::", "lpcompile::"))])
    if not ran:
        raise LowPrecisionError(
            "the profiler saw no kernel: on a GPU it needs CUPTI, which comes with torch's wheels"
        )
    begin = min(e.start_ns() for e in ran)
    return [
        Kernel(
            e.name(),
            ops.get(e.linked_correlation_id(), "") if on_gpu else e.name(),
            (e.start_ns() - begin) / 1e6,
            e.duration_ns() / 1e6,
        )
        for e in sorted(ran, key=lambda e: e.start_ns())
    ]


def _outermost(events: list[Any]) -> list[Any]:
    """The events that lie in no other of their thread."""
    kept: list[Any] = []
    for event in sorted(events, key=lambda e: (e.start_thread_id(), e.start_ns(), -e.end_ns())):
        last = kept[-1] if kept else None
        if (
            last is None
            or last.start_thread_id() != event.start_thread_id()
            or last.end_ns() <= event.start_ns()
        ):
            kept.append(event)
    return kept


def summary(seen: dict[str, list[Kernel]]) -> list[Row]:
    """Milliseconds and share of each kind of kernel in each variant."""
    rows: list[Row] = []
    for variant, ran in seen.items():
        total = sum(k.ms for k in ran)
        for kind in COLORS:
            same = [k.ms for k in ran if k.kind == kind]
            head = {"variant": variant, "kind": kind, "kernels": len(same)}
            rows.append(head | {"ms": sum(same, 0.0), "share": sum(same) / total})
        rows.append({"variant": variant, "kind": "all", "kernels": len(ran), "ms": total})
    return rows


def listing(seen: dict[str, list[Kernel]]) -> list[Row]:
    """Every kernel in order."""
    return [
        {"variant": variant, "#": i, "ms": k.ms, "kind": k.kind, "op": k.op, "kernel": k.name}
        for variant, ran in seen.items()
        for i, k in enumerate(ran)
    ]


def picture(seen: dict[str, list[Kernel]], path: Path) -> None:
    """One bar a variant: its kernels one after another, coloured by kind."""
    try:
        from matplotlib import pyplot
        from matplotlib.patches import Patch
    except ImportError as error:
        raise LowPrecisionError(
            "a picture needs matplotlib: pip install 'lpcompile[inspect]'"
        ) from error
    figure, axes = pyplot.subplots(figsize=(12, 1 + 0.7 * len(seen)))
    for row, ran in enumerate(seen.values()):
        at = 0.0
        for kernel in ran:
            axes.barh(row, kernel.ms, 0.7, at, color=COLORS[kernel.kind])
            at += kernel.ms
    axes.set_yticks(range(len(seen)), list(seen))
    axes.invert_yaxis()
    axes.set_xlabel("ms of kernels, forward and backward")
    figure.legend(
        handles=[Patch(color=color, label=kind) for kind, color in COLORS.items()],
        ncols=len(COLORS),
        loc="upper center",
        frameon=False,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
