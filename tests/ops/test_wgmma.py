"""The GEMM on warpgroups, compiled and assembled for sm_90a without a GPU; tests of it run are
those of ``scaled_grouped_mm``."""

import re
import subprocess

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from lpcompile.ops import device, grouped_gemm, wgmma

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


def compiled(monkeypatch, *args):
    """``fill``'s kernel for these arguments, compiled instead of launched."""
    made = []

    class Compiler:
        def __getitem__(self, grid):
            return self.compile

        def compile(self, *values, num_warps):
            signature, constants, attributes = {}, {}, {}
            for i, (parameter, value) in enumerate(zip(KERNEL.params, values, strict=True)):
                name = parameter.name
                divisible = [["tt.divisibility", 16]]
                if isinstance(value, wgmma.TensorDescriptor):
                    block = ", ".join(map(str, value.block_shape))
                    of = TYPES[value.base.dtype]
                    signature[name] = f"tensordesc<{of}[{block}],{value.layout!r}>"
                elif isinstance(value, torch.Tensor):
                    signature[name] = "*" + TYPES[value.dtype]
                    attributes[(i,)] = divisible
                elif (
                    parameter.is_constexpr or value is None or value == 1 and name not in ("E", "M")
                ):
                    signature[name], constants[(i,)] = "constexpr", value
                else:
                    signature[name] = "i32"
                    if value % 16 == 0 and name not in "EM":
                        attributes[(i,)] = divisible
            source = GluonASTSource(KERNEL, signature, constants, attributes)
            target = GPUTarget("cuda", 90, 32)
            made.append(triton.compile(source, target=target, options={"num_warps": num_warps}))

    monkeypatch.setattr(device, "processors", lambda x: 132)
    monkeypatch.setattr(wgmma, "kernel", Compiler())
    wgmma.fill(*args)
    return made[0]


KERNEL = wgmma.kernel
E, T, N, K = 3, 512, 256, 384


def values(*shape, dtype=E4M3):
    return torch.zeros(*shape, dtype=torch.uint8 if dtype == E4M3 else dtype).view(dtype)


def ones(*shape):
    return torch.ones(*shape)


def offs():
    return torch.tensor([128, 128, 512], dtype=torch.int32)


def rows(**more):
    """fprop: row scales."""
    return values(T, K), ones(T), values(E, N, K), ones(E, N), offs()


def columns(n=N):
    """wgrad: a scale for every group and row."""
    return values(N, T), ones(E * N), values(n, T), ones(E * n), offs()


CASES = {
    "rows, fast": (*rows(), values(T, N, dtype=BF16), True),
    "rows": (*rows(), values(T, N, dtype=BF16), False),
    "rows, fast, and an addend": (
        *(*rows(), values(T, N, dtype=BF16), True),
        values(T, N, dtype=BF16),
    ),
    "rows and an addend": (*rows(), values(T, N, dtype=BF16), False, values(T, N, dtype=BF16)),
    "columns": (*columns(), values(E, N, N, dtype=BF16), False),
    "columns, narrow": (*columns(384), values(E, N, 384, dtype=BF16), False),
    "columns into fp32": (*columns(), values(E, N, N, dtype=torch.float32), False),
    "one row, one column": (
        *(values(1, K), ones(1), values(1, 1, K), ones(1, 1)),
        *(offs()[:1], values(1, 1, dtype=BF16), True),
    ),
    "squares": (
        *(values(T, K), ones(K // 128, T).t(), values(E, N, K), ones(E, N // 128, K // 128)),
        *(offs(), values(T, N, dtype=BF16), False),
    ),
    "blocks": (
        *(values(N, T), ones(T // 128, N).t(), values(N, T), ones(T // 128, N).t()),
        *(offs(), values(E, N, N, dtype=BF16), False),
    ),
    "blocks of experts": (
        *(values(T, K), ones(K // 128, T).t(), values(E, 384, K), ones(E, K // 128, 384).mT),
        *(offs(), values(T, 384, dtype=BF16), False),
    ),
    "squares, narrow": (
        *(values(T, K), ones(K // 128, T).t(), values(E, 384, K), ones(E, 3, K // 128)),
        *(offs(), values(T, 384, dtype=BF16), False),
    ),
    "blocks of a matrix": (
        *(values(N, T), ones(T // 128, N).t(), values(384, T), ones(T // 128, 384).t()),
        *(None, values(N, 384, dtype=BF16), False),
    ),
    "a result that TMA cannot store": (
        *(values(T, K), ones(T), values(E, 252, K), ones(E, 252)),
        *(offs(), values(T, 252, dtype=BF16), False),
    ),
    "bf16, columns as tokens lie": (
        *(values(T, N, dtype=BF16).t(), ones(1), values(T, N, dtype=BF16).t(), ones(1)),
        *(offs(), values(E, N, N, dtype=BF16), True),
    ),
    "bf16, narrow columns, one as its tokens lie": (
        *(values(N, T, dtype=BF16), ones(1), values(T, 384, dtype=BF16).t(), ones(1)),
        *(offs(), values(E, N, 384, dtype=BF16), True),
    ),
    "bf16, rows and weights as they lie": (
        *(values(T, K, dtype=BF16), ones(1), values(E, K, N, dtype=BF16).mT, ones(E)),
        *(offs(), values(T, N, dtype=BF16), True),
    ),
    "bf16, a matrix": (
        *(values(T, K, dtype=BF16), ones(1), values(N, K, dtype=BF16), ones(1)),
        *(None, values(T, N, dtype=BF16), True),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sm90_sums_stay_in_registers(name, monkeypatch, tmp_path):
    ptx, made = tmp_path / "wgmma.ptx", compiled(monkeypatch, *CASES[name])
    assert made.metadata.shared <= 227 * 1024
    ptx.write_text(made.asm["ptx"])
    command = [triton.knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", ptx, "-o", tmp_path / "cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    # Of 64x128 in fp32 a thread holds 256 bytes; what is spilled is addresses, outside the loop.
    assert int(re.search(r"(\d+) bytes stack frame", said)[1]) < 128
    assert "serialized" not in said  # while one product is multiplied another is added
    assert "wgmma.mma_async" in ptx.read_text()


@pytest.mark.parametrize("name", ["rows, fast", "columns", "squares"])
def test_sm90_every_warp_carries_its_next_tile_from_group_to_group(name, monkeypatch):
    """Triton drops it from a for loop, and then programs do each other's tiles."""
    ir = compiled(monkeypatch, *CASES[name]).asm["ttgir"]
    carried = [names.count("=") for names in re.findall(r"scf\.while \(([^)]*)\)", ir)]
    assert carried == [3, 3, 3]  # by each of three kinds of warps: the step, the group, the tile


def test_only_what_tma_reads_is_for_warpgroups(monkeypatch):
    monkeypatch.setattr(device, "capability", lambda x: (9, 0))
    a, a_scale, b, b_scale, *_ = CASES["squares"]
    suits = grouped_gemm.suits_warpgroups
    assert suits(a, a_scale, b, b_scale)
    assert not suits(a[:, 8:], a_scale, b, b_scale)  # not at a multiple of 16 bytes
    assert not suits(values(T, 392)[:, :K], a_scale, b, b_scale)
    assert not suits(a, a_scale, b.mT.contiguous().mT, b_scale)
    assert not suits(a, a_scale, b[:, :128], b_scale[:, :1])  # a stack with gaps
    a, a_scale, b, b_scale, *_ = CASES["blocks of experts"]
    assert suits(a, a_scale, b, b_scale)
    assert not suits(a, a_scale, b, b_scale.contiguous())  # a step's scales are apart
    odd = values(E, 386, K), ones(E, K // 128, 386).mT
    assert not suits(a, a_scale, *odd)  # a group's line of scales begins anywhere
    assert suits(a, ones(T), odd[0], ones(E, 386))
    x, w = values(T, K, dtype=BF16), values(E, K, N, dtype=BF16).mT
    assert suits(x, ones(1), w, ones(E))  # bf16 may lie the other way round
    assert suits(values(K, T, dtype=BF16).t(), ones(1), w[0], ones(1))
    assert not suits(x[:, :200], ones(1), values(E, 200, N, dtype=BF16).mT, ones(E))
    assert not suits(x, ones(1), values(E, K, 250, dtype=BF16).mT, ones(E))
    monkeypatch.setattr(device, "capability", lambda x: (10, 0))
    assert not suits(a, a_scale, b, b_scale)
