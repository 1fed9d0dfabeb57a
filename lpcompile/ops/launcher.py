"""Launch a compiled Triton kernel again, in a few microseconds: what ``kernel[grid](...)`` does.

Every launch of Triton's finds out anew what the kernel was compiled for, and asks the driver about
every pointer. A kernel that is ``cached`` does so once: what Triton compiled is kept under a key of
everything that Triton tells calls apart by, or finer, and a call whose key is known goes to its
launcher at once, pointers as numbers. The key: types; of a tensor its dtype, its device and whether
it begins at a multiple of 16 bytes; of an integer whether it is below 2, divisible by 16, or needs
64 bits; every constant and option by its value; the current device. What is not known here, and
every launch that a hook of Triton's watches, goes Triton's way.

Not seen are knobs of Triton's compiler that change after a kernel was first launched.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from torch.torch_version import TorchVersion as Version
from triton import knobs
from triton.runtime.jit import JITFunction

# What specializes, and how compiled kernels are launched, was read in these; AMD's differs.
KNOWN = Version("3.6") <= Version(triton.__version__) < Version("3.8") and not torch.version.hip

# What of an argument the key has, and what the launcher takes, as Python.
_TENSOR = "{0}.dtype, {0}.get_device(), at_{0} % 16 == 0", "at_{0}"
_PARTS: dict[type, tuple[str, str]] = {
    Tensor: _TENSOR,
    Parameter: _TENSOR,
    int: ("{0} if {0} < 2 else ({0} % 16 == 0, {0} >> 31)", "{0}"),
    type(None): ("None", "None"),
}
# By their text where values are equal that Triton tells apart: 0.0 and -0.0, (1,) and (True,).
_CONSTANT, _TEXT = ("{0}", "{0}"), ("repr({0})", "{0}")
Descriptor: Any = ()  # the type of TMA's, where there is one
if KNOWN:
    from triton.experimental.gluon.nvidia import hopper

    Descriptor = hopper.TensorDescriptor
    _PARTS[Descriptor] = "{0}.base.dtype, *{0}.block_shape, {0}.layout", "{0}"


def cached(kernel: Any) -> Any:
    """The kernel itself, which from now on keeps what is compiled of it."""
    # The interpreter's are none; a generated module that is loaded again is the same module.
    if KNOWN and isinstance(kernel, JITFunction) and not isinstance(kernel, _Kept):
        way: Any = type(kernel)
        kernel.__class__ = _subclass(way)
        kernel._kept = {}
    return kernel


@cache
def _subclass(kernel: Any) -> Any:
    """Triton's class of a kernel, or Gluon's, launched from what is kept."""
    return type(kernel.__name__, (_Kept, kernel), {})


class _Kept:
    """``kernel[grid](*arguments, **options)`` of a kernel that was compiled before."""

    run: Callable[..., Any]  # Triton's way
    params: Any
    pre_run_hooks: Any
    # types of the arguments, names of the options -> what reads them, and by key what to launch
    _kept: dict[tuple[Any, ...], tuple[Callable[..., Any] | None, dict[Any, Any]]]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
        signature = (*map(type, args), *options)
        found = self._kept.get(signature)
        if found is None:
            found = self._kept[signature] = _reader(self.params, tuple(map(type, args))), {}
        read, kept = found
        listener = _thread.listener
        if read is None or is_watched() or self.pre_run_hooks:
            if listener is not None:
                listener.unknown()
            return self.run(*args, grid=grid, warmup=False, **options)
        key, given = read(*args)
        key = key, *options.values()
        launch = kept.get(key)
        device, size = torch._C._cuda_getDevice(), grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        if launch is None or launch[0] != device:
            kernel = self.run(*args, grid=grid, warmup=False, **options)
            if kernel is not None:
                launch = device, kernel.run, kernel.function, kernel.packed_metadata
                kept[key] = launch
        else:
            _, run, function, metadata = launch
            stream = torch._C._cuda_getCurrentRawStream(device)
            kernel = run(*size, stream, function, metadata, None, None, None, *given)
        if listener is not None:
            listener.known(launch, size, args, given) if launch else listener.unknown()
        return kernel


def _reader(params: Any, types: tuple[type, ...]) -> Callable[..., Any] | None:
    """A function of the arguments that returns their part of the key, and what the launcher takes.

    None where an argument is of a type whose specialization is not known here.
    """
    if len(types) != len(params):
        return None
    names, places, keys, given = [f"a{i}" for i in range(len(types))], [], [], []
    for name, param, kind in zip(names, params, types, strict=True):
        parts = _PARTS.get(kind)
        if param.is_constexpr:
            parts = _TEXT if kind in (float, tuple) else _CONSTANT
        if parts is None:
            return None
        if parts is _TENSOR:
            places.append(f"    at_{name} = {name}.data_ptr()")
        keys.append(parts[0].format(name))
        given.append(parts[1].format(name))
    lines = [
        f"def read({', '.join(names)}):",
        *places,
        f"    return ({', '.join(keys)},), ({', '.join(given)},)",
    ]
    made: dict[str, Any] = {}
    exec("\n".join(lines), made)
    return made["read"]


def is_watched() -> Any:
    """Whether somebody is to be told of every launch."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return getattr(enter, "calls", enter) or getattr(leave, "calls", leave)


class _Thread(threading.local):
    """A thread's launches are told to this."""

    listener: Any = None


_thread = _Thread()


@contextmanager
def told(listener: Any) -> Iterator[None]:
    """Tells of this thread's launches: ``known`` ones, and ``unknown`` ones, of which no more."""
    before, _thread.listener = _thread.listener, listener
    try:
        yield
    finally:
        _thread.listener = before


class _Place:
    """A tensor of which nothing is known but where it begins."""

    def __init__(self, at: int) -> None:
        self.at = at

    def data_ptr(self) -> int:
        return self.at


def moved(descriptor: Any, at: int) -> Any:
    """A TensorDescriptor of what lies elsewhere; ``copy`` takes 15 us, and the class checks it."""
    made = object.__new__(type(descriptor))
    made.__dict__.update(descriptor.__dict__, base=_Place(at))
    return made
