"""Times of several functions, interleaved: one round runs each once, so that all of them meet the
same clocks and temperature.

A CUDA function is timed by events around it. Before each, a buffer larger than the L2 cache is read
and then as many bytes of it are written as the function writes: the cache holds nothing that it
reads, and as much that is still to be written back as it leaves behind itself. (After writing the
whole buffer, 16384 x 4096 elements were read in 47 us; after reading it in 39 us, of which 3 are
the events'.) It also keeps the GPU busy while the CPU queues what is measured, so that the time
between two launches is not counted. Nothing waits for the GPU until the last round.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

CACHE_BYTES = 50 * 2**20  # the L2 cache of an H200
FLUSH_BYTES = 512 * 2**20  # about 0.15 ms


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
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    written: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """``repeats`` rounds over all functions, after one round that is not counted.

    written: bytes that each writes; without it, as much as the cache can hold.
    """
    if device.type == "cuda":
        dirty = [FLUSH_BYTES if written is None else written[name] for name in functions]
        samples = _cuda_rounds(list(functions.values()), repeats, dirty)
    else:
        samples = _cpu_rounds(list(functions.values()), repeats)
    return {name: Timing(tuple(s)) for name, s in zip(functions, samples, strict=True)}


def _order(num: int, rounds: int) -> list[int]:
    """Each round starts elsewhere, so that nobody always runs after the same neighbour."""
    return [(rounds + i) % num for i in range(num)]


def _cuda_rounds(
    functions: list[Callable[[], object]], repeats: int, written: list[int]
) -> list[list[float]]:
    flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")
    for function in functions:
        function()
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in functions]
    for i in range(repeats):
        for at in _order(len(functions), i):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.amax()
            flush[: min(written[at], CACHE_BYTES) // 4].zero_()
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


def host_ms(function: Callable[[], object], device: torch.device, repeats: int = 9) -> float:
    """Median milliseconds until a function returns, the GPU being idle when it is called.

    What only launches kernels does not wait for them: this is what launching costs.
    """
    samples = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        function()
        samples.append((time.perf_counter() - begin) * 1e3)
    return median(samples)


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
