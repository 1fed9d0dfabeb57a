"""One token, or one channel: kernels compiled for sm_90a as they are launched, without a GPU.

ptxas 12.8 miscompiles a word whose halves are one conversion (``fp8.narrow``), as all are in the
padding beside a single element, if Triton compiles a size of 1 as a constant.
"""

import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from lpcompile import ops
from lpcompile.ops import blocks, device, fp8

TARGET = GPUTarget("cuda", 90, 32)
CONVERSION = re.compile(r"cvt\.rn\.satfinite\.e[45]m[23]x2\.f32\s+(\S+), (\S+, \S+);")
WORD = re.compile(r"mov\.b32\s+\S+, \{(\S+), (\S+)\};")
NARROWING = [m for m in ops.ALL if re.search(r"\.(quantize|fused_quantize|fused_cast)", m.__name__)]


@pytest.fixture
def launched(monkeypatch):
    """What is launched while the test runs is compiled for sm_90a, and listed."""
    made, backend = [], make_backend(TARGET)

    def run(kernel, *args, grid, warmup, **options):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*args, **options)
        options, *source = kernel._pack_args(backend, options, bound, specialization, options)
        made.append(triton.compile(ASTSource(kernel, *source), TARGET, options.__dict__))

    monkeypatch.setattr(fp8, "runs_triton", lambda x: True)
    monkeypatch.setattr(blocks, "runs_native", lambda x: False)
    monkeypatch.setattr(device, "processors", lambda x: 132)
    monkeypatch.setattr(device, "shared_memory", lambda x: 2**17)
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    return made


def is_single(args):
    """Whether what an op is given, or the first of its inputs, is one token or one channel."""
    x = args[0][0] if isinstance(args[0], list) else args[0]
    return 1 in x.shape[-2:] and x.numel() > 0


def repeated(ptx):
    """Words whose halves are one conversion, or two of the same."""
    words, of = [], {}
    for line in ptx.splitlines():
        for half, operands in CONVERSION.findall(line):
            of[half] = operands
        for low, high in WORD.findall(line):
            if low in of and of[low] == of.get(high):
                words.append(line)
    return words


@pytest.mark.parametrize("module", NARROWING, ids=lambda m: m.__name__.rpartition(".")[2])
def test_no_word_is_of_one_conversion_beside_a_single_token_or_channel(module, launched):
    single = [args for args in module.samples("cpu") if is_single(args)]
    for args in single:
        module.launch(*args)
    assert launched
    assert [word for kernel in launched for word in repeated(kernel.asm["ptx"])] == []
