"""Triton's interpreter in a third of its time, and what stands for inline assembly in it.

What it does at every call is done once: it patches the language for each call of a function, folds
a tile one element after another where it does not know the combination, looks at every sum for an
overflow, and writes a table of dtypes for each tensor (triton 3.6 and 3.7).
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter


def hurry():
    """Exchange those parts of the interpreter, for the rest of the process."""
    patch, patched = interpreter._patch_lang, set()
    find, found = interpreter._get_np_dtype, {}

    def patch_once(function):
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            patch(function)
        return SimpleNamespace(restore=lambda: None)

    def find_once(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = find(dtype)
        return found[name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, find_once
    interpreter.ReduceOps.generic_reduce = fold
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


def fold(self, inputs):
    """What ``tl.reduce`` makes of one tensor along an axis, by slices across it."""
    (x,) = inputs
    slices = np.moveaxis(x.handle.data, self.axis, 0)
    total, *others = (self.to_tensor(s, x.dtype) for s in slices)
    for other in others:
        total = self.combine_fn.fn(total, other)
    made = total.handle.data.reshape(slices.shape[1:])
    return [self.to_tensor(np.expand_dims(made, self.axis) if self.keep_dims else made, x.dtype)]


@triton.jit
def rounded(x):
    """``pointwise.rounded`` without inline assembly, which the interpreter has not."""
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def narrow4(a, b, c, d, ELEMENT: tl.constexpr):
    """``fp8.narrow4`` likewise, of what is exact, which it narrows rightly."""
    word = tl.zeros(a.shape, tl.int32)
    for i, x in enumerate((a, b, c, d)):
        byte = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        word = word | (byte.to(tl.int32) << 8 * i)
    return word


@triton.jit
def widened(x):
    """``turned.widened`` without inline assembly, which the interpreter has not."""
    return x.to(tl.float32)


@triton.jit
def narrowed(x):
    """``pointwise.narrowed`` likewise."""
    return x.to(tl.bfloat16)


@triton.jit
def larger(a, b):
    """``turned.larger`` likewise, but for its sign."""
    return tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def column_words(a, b, c, d):
    """``transpose_fp8.column_words`` likewise."""
    made = ()
    for k in tl.static_range(4):
        word = (a >> 8 * k & 0xFF) | (b >> 8 * k & 0xFF) << 8
        made = made + (word | (c >> 8 * k & 0xFF) << 16 | (d >> 8 * k & 0xFF) << 24,)
    return made
