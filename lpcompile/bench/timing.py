"""Times of several functions, interleaved: one round runs each once, so that all of them meet the
same clocks and temperature.

A CUDA function is timed by events around it. Before each, a buffer larger than the L2 cache is
written: it empties the cache, and keeps the GPU busy while the CPU queues what is measured, so that
the time between two launches is not counted. Nothing waits for the GPU until the last round.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

FLUSH_BYTES = 512 * 2**20  # ten times the L2 cache of an H200; about 0.15 ms


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one function, one entry per repetition."""

    samples: tuple[float, ...]

    @property
    def ms(self) -> float:
        """The median."""
        return median(self.samples)

    @property
    def spread(self) -> float:
        """(90th percentile - 10th) / median."""
        if len(self.samples) < 2:
            return 0.0
        cuts = quantiles(self.samples, n=10, method="inclusive")
        return (cuts[-1] - cuts[0]) / self.ms


def interleave(
    functions: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, Timing]:
    """``repeats`` rounds over all functions, after one round that is not counted."""
    measure = _cuda_rounds if device.type == "cuda" else _cpu_rounds
    samples = measure(list(functions.values()), repeats)
    return {name: Timing(tuple(s)) for name, s in zip(functions, samples, strict=True)}


def _order(num: int, rounds: int) -> list[int]:
    """Each round starts elsewhere, so that nobody always runs after the same neighbour."""
    return [(rounds + i) % num for i in range(num)]


def _cuda_rounds(functions: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for function in functions:
        function()
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in functions]
    for i in range(repeats):
        for at in _order(len(functions), i):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            functions[at]()
            end.record()
            events[at].append((begin, end))
    torch.cuda.synchronize()
    return [[begin.elapsed_time(end) for begin, end in pairs] for pairs in events]


def _cpu_rounds(functions: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    for function in functions:
        function()
    samples: list[list[float]] = [[] for _ in functions]
    for i in range(repeats):
        for at in _order(len(functions), i):
            begin = time.perf_counter()
            functions[at]()
            samples[at].append((time.perf_counter() - begin) * 1e3)
    return samples


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, repeats: int, num_bytes: int = 2**29) -> float:
    """Bytes/s of a large copy, bytes read and bytes written counted."""
    source = torch.empty(num_bytes, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, device, repeats)["copy"]
    return 2 * num_bytes / (timing.ms * 1e-3)
