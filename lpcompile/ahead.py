"""Compile the Triton kernels of a graph's ops in threads, while Inductor compiles the rest.

Left to their first call they compile one after another: 14 kernels of one FFN are 3.0 of the 4.5 s
to the end of its first step, half of them Triton's and half the C compiler's that builds launchers
(H200, torch 2.11, triton 3.6). Each op is launched on fake tensors, where a kernel that would run
is compiled and loaded instead; what cannot be had so compiles at its first call, as before.

A graph from Inductor's cache comes without passes, and needs none of this: Triton has a cache too.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._inductor.async_compile import get_compile_threads
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only
from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction, MockTensor

from lpcompile.graph import hint, is_own
from lpcompile.ops.define import LAUNCHES

log = logging.getLogger("lpcompile")
_lock = threading.Lock()  # of JITFunction.run


def start(graph: fx.Graph) -> list[Future[int]]:
    """Begin to compile what the graph's ops will launch; when done, how many kernels that are.

    Nothing for a graph that runs on the CPU, and where Inductor is told to compile in one thread.
    """
    if not torch.cuda.is_available() or get_compile_threads() == 1:
        return []
    mode = FakeTensorMode()
    launches = [launch for n in graph.nodes if is_own(n) and (launch := _launch(n, mode))]
    return [_begin(mode, launches, torch.cuda.current_device())] if launches else []


def start_all(launches: Iterable[tuple[Any, ...]], device: torch.device) -> Future[int]:
    """The same of launches, each with its arguments and keywords, on tensors of a GPU."""
    mode = FakeTensorMode()
    fakes = [tree_map_only(Tensor, mode.from_tensor, launch) for launch in launches]
    index = torch.cuda.current_device() if device.index is None else device.index
    return _begin(mode, fakes, index)


def _begin(mode: FakeTensorMode, launches: Sequence[tuple[Any, ...]], device: int) -> Future[int]:
    executor = ThreadPoolExecutor(1, "lpcompile-launch")
    made = executor.submit(_compile, mode, launches, device)
    executor.shutdown(wait=False)
    return made


def _launch(node: fx.Node, mode: FakeTensorMode) -> tuple[Any, ...] | None:
    """The function that launches an op's kernels, and arguments of the sizes that are expected."""
    if node.target not in LAUNCHES or not node.all_input_nodes:
        return None
    sizes = {}
    for i in node.all_input_nodes:
        t = i.meta.get("val")
        if not isinstance(t, Tensor) or t.device.type != "cuda":
            return None
        sizes[i] = [hint(s) for s in (*t.shape, *t.stride())]
    if any(None in known for known in sizes.values()):
        return None

    def fake(given: fx.Node) -> Any:
        t, known = given.meta["val"], cast(list[int], sizes[given])
        with mode:
            return torch.empty_strided(
                known[: t.dim()], known[t.dim() :], dtype=t.dtype, device=t.device
            )

    return LAUNCHES[node.target], map_arg(node.args, fake), map_arg(node.kwargs, fake)


def _compile(mode: FakeTensorMode, launches: Sequence[tuple[Any, ...]], device: int) -> int:
    """Compile and load the kernels of every launch."""
    torch.cuda.set_device(device)
    pool = ThreadPoolExecutor(
        get_compile_threads(), "lpcompile", torch.cuda.set_device, initargs=(device,)
    )
    with pool, AsyncCompileMode(pool, ignore_errors=True):
        with _instead_of_running() as kernels, mode:
            for launch, args, kwargs in launches:
                _attempt(launch, *args, **kwargs)
        # Behind what compiles in the pool's queue: each waits for a kernel that has begun.
        loads = [pool.submit(_attempt, _load, kernel) for kernel in dict.fromkeys(kernels)]
    return sum(load.result() for load in loads)


def _attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether a call went through: what failed here fails again, aloud, where it is needed."""
    try:
        function(*args, **kwargs)
    except Exception:  # whatever a compiler raises
        log.debug("not compiled ahead: %s", function, exc_info=True)
        return False
    return True


def _load(kernel: Any) -> None:
    """Build a kernel's launcher and load it onto the device."""
    if hasattr(kernel, "result"):
        kernel = kernel.result()
    kernel.run  # noqa: B018  a property that does both


@contextmanager
def _instead_of_running() -> Iterator[list[Any]]:
    """Collects what this thread launches, compiled and not run; other threads run what they do."""
    kernels, here, run = [], threading.get_ident(), JITFunction.run

    def compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if threading.get_ident() != here:
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)
        mocks = [MockTensor(a.dtype, list(a.shape)) if isinstance(a, Tensor) else a for a in args]
        kernels.append(run(self, *mocks, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    # Where a fake tensor lies is asked for its alignment, and asked in earnest it warns.
    place = patch.object(FakeTensor, "data_ptr", lambda tensor: 0)
    with _lock, place, patch.object(JITFunction, "run", compile):
        yield kernels
