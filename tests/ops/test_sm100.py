"""The MXFP8 and NVFP4 kernels, compiled and assembled for sm_100a and sm_90a without a GPU.

Each launch runs as it stands, on CPU tensors, but for the kernel: it is compiled for the target
with the arguments of that launch, and ptxas makes a cubin of it. It is never run.
"""

import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lpcompile import ops
from lpcompile.ops import blocks, fp8, hadamard, quantize_nvfp4

KERNELS = (
    ops.amax_group,
    ops.quantize_mxfp8,
    ops.quantize_mxfp8_grouped_t,
    ops.quantize_nvfp4,
    ops.quantize_nvfp4_grouped_t,
    ops.hadamard,
    ops.swizzle,
    ops.swizzle_grouped,
    ops.swizzle_grouped_t,
    ops.dequantize,
    ops.wide_mm,
)
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def is_one(parameter, value):
    """Whether Triton compiles a size of 1 as a constant: not where its type is given."""
    return value == 1 and not parameter.annotation_type


class Assembler:
    """In a kernel's place: compiles it for ``capability`` instead of launching it."""

    def __init__(self, kernel, capability):
        self.kernel, self.capability, self.made = kernel, capability, []

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **options):
        signature, constants, attributes = {}, {}, {}
        for i, (parameter, value) in enumerate(zip(self.kernel.params, args, strict=True)):
            name = parameter.name
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif parameter.is_constexpr or value is None or is_one(parameter, value):
                signature[name], constants[(i,)] = "constexpr", value
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        target = GPUTarget("cuda", self.capability, 32)
        self.made.append(triton.compile(source, target=target, options=options))


@pytest.fixture
def assemble(monkeypatch):
    """assemble(capability, module, *args): the one kernel that module's launch runs, compiled."""

    def run(capability, module, *args):
        monkeypatch.setattr(fp8, "runs_triton", lambda x: True)
        monkeypatch.setattr(blocks, "runs_native", lambda x: capability == 100)
        monkeypatch.setattr(blocks, "compares_pairs", lambda x: True)
        assemblers = [Assembler(m.kernel, capability) for m in KERNELS]
        with monkeypatch.context() as patch:
            for m, assembler in zip(KERNELS, assemblers, strict=True):
                patch.setattr(m, "kernel", assembler)
            module.launch(*args)
        (made,) = [made for assembler in assemblers for made in assembler.made]
        return made

    return run


X = torch.zeros(256, 512, dtype=torch.bfloat16)
ODD = torch.zeros(37, 203, dtype=torch.bfloat16)
AMAX, AMAXES = torch.ones(1), torch.ones(3)
SIGNS = hadamard.SIGNS
SEED = torch.ones(1, dtype=torch.int64)
SCALES = torch.zeros(256, 32, dtype=torch.uint8)
OFFS = torch.tensor([100, 100, 256], dtype=torch.int32)
E4M3 = torch.float8_e4m3fn
RCEIL, FLOOR, NEAREST, STOCHASTIC = (E4M3, False), (E4M3, True), (AMAX, None, 0), (AMAX, SEED, 3)

NO_CONVERSION = ""
E8M0 = "cvt.rp.satfinite.ue8m0x2.f32"
E2M1 = "cvt.rn.satfinite.e2m1x2.f32"
E2M1_STOCHASTIC = "cvt.rs.satfinite.e2m1x4.f32"

# module, arguments, the conversion that only Blackwell has
CASES = {
    "mxfp8": (ops.quantize_mxfp8, (X, *RCEIL), E8M0),
    "mxfp8_odd": (ops.quantize_mxfp8, (ODD, *RCEIL), E8M0),
    "mxfp8_floor": (ops.quantize_mxfp8, (X, *FLOOR), NO_CONVERSION),
    "mxfp8_t": (ops.quantize_mxfp8_t, (X, *RCEIL), E8M0),
    "mxfp8_square": (ops.quantize_mxfp8_square, (X, *RCEIL), E8M0),
    "mxfp8_square_t": (ops.quantize_mxfp8_square_t, (X, *RCEIL), E8M0),
    "nvfp4": (ops.quantize_nvfp4, (X, *NEAREST), E2M1),
    "nvfp4_odd": (ops.quantize_nvfp4, (ODD, *NEAREST), E2M1),
    "nvfp4_t": (ops.quantize_nvfp4_t, (X, *NEAREST), E2M1),
    "nvfp4_square": (ops.quantize_nvfp4_square, (X, *NEAREST), E2M1),
    "nvfp4_square_t": (ops.quantize_nvfp4_square_t, (X, *NEAREST), E2M1),
    "nvfp4_stochastic": (ops.quantize_nvfp4, (X, *STOCHASTIC), E2M1_STOCHASTIC),
    "nvfp4_stochastic_odd": (ops.quantize_nvfp4, (ODD, *STOCHASTIC), E2M1_STOCHASTIC),
    "nvfp4_stochastic_t": (ops.quantize_nvfp4_t, (X, *STOCHASTIC), E2M1_STOCHASTIC),
    "mxfp8_experts": (ops.quantize_mxfp8_square, (X.view(2, 128, 512), *RCEIL), E8M0),
    "nvfp4_experts": (ops.quantize_nvfp4_square_t, (X.view(1, 256, 512), *NEAREST), E2M1),
    "mxfp8_grouped_t": (ops.quantize_mxfp8_grouped_t, (X, OFFS, *RCEIL), E8M0),
    "mxfp8_grouped_t_floor": (ops.quantize_mxfp8_grouped_t, (X, OFFS, *FLOOR), NO_CONVERSION),
    "nvfp4_grouped_t": (ops.quantize_nvfp4_grouped_t, (X, AMAXES, OFFS, None, None, 0), E2M1),
    "nvfp4_grouped_h": (ops.quantize_nvfp4_grouped_t, (X, AMAXES, OFFS, SIGNS, None, 0), E2M1),
    "nvfp4_grouped_h_stochastic": (
        ops.quantize_nvfp4_grouped_t,
        (X, AMAXES, OFFS, SIGNS, SEED, 3),
        E2M1_STOCHASTIC,
    ),
    "mxfp8_grouped_strided": (ops.quantize_mxfp8_grouped_t, (ODD.t(), OFFS, *RCEIL), E8M0),
    "amax_group": (ops.amax_group, (X, OFFS, None), NO_CONVERSION),
    "amax_group_h": (ops.amax_group, (X, OFFS, SIGNS), NO_CONVERSION),
    "amax_group_both": (ops.amax_group_both, (X, OFFS, SIGNS), NO_CONVERSION),
    "hadamard": (ops.hadamard, (X, SIGNS), NO_CONVERSION),
    "hadamard_strided": (ops.hadamard, (ODD.t(), SIGNS), NO_CONVERSION),
    "swizzle": (ops.swizzle, (SCALES,), NO_CONVERSION),
    "swizzle_experts": (ops.swizzle_experts, (SCALES.view(2, 128, 32),), NO_CONVERSION),
    "swizzle_grouped": (ops.swizzle_grouped, (SCALES, OFFS), NO_CONVERSION),
    "swizzle_grouped_t": (ops.swizzle_grouped_t, (SCALES.t(), OFFS), NO_CONVERSION),
    "dequantize_mxfp8": (ops.dequantize, ops.quantize_mxfp8.reference(X, *RCEIL), NO_CONVERSION),
    "dequantize_nvfp4": (ops.dequantize, quantize_nvfp4.reference(X, *NEAREST), NO_CONVERSION),
}
CASES |= {
    f"{name}_swizzled": (ops.dequantize, (values, ops.swizzle.reference(scales)), NO_CONVERSION)
    for name in ("dequantize_mxfp8", "dequantize_nvfp4")
    for values, scales in [CASES[name][1]]
}
ONLY_BLACKWELL = re.compile(r"cvt\.\S*(?:e2m1|ue8m0)\S*")


# A power of two times 1.5 * 2^22 or 2^20, exact, added and subtracted (``fp4.to_grid``); and of the
# two steps that make a quotient of an approximation (``fp4.reciprocal``), the remainder.
ASKED = re.compile(r"fma\.rn\.f32[^;]*0f(?:[4C]AC00000|[4C]9C00000|3F800000)")


def is_ieee(ptx):
    """No subnormal is flushed, no division approximated, no product kept unrounded.

    But for what is asked for: those, and a ceiling (Triton's flushes) of what is 0 or at least
    2^-124. For sm_100 LLVM makes pairs (f32x2) of some of them.
    """
    others = re.sub(r"cvt\.rpi\.ftz\.f32", "", ASKED.sub("", ptx))
    steps = 2 * others.count("rcp.approx.ftz.f32")
    others = others.replace("rcp.approx.ftz.f32", "")
    unasked = len(re.findall(r"fma\.rn\.f32\s", others)) - steps
    return unasked <= 0 and not re.search(r"\.ftz|div\.(?:full|approx)|rcp\.approx", others)


@pytest.mark.parametrize("name", CASES)
def test_sm100_kernels_assemble_and_use_the_conversions_of_blackwell(name, assemble):
    module, args, conversion = CASES[name]
    made = assemble(100, module, *args)
    ptx = made.asm["ptx"]
    assert re.search(r"\.target sm_100a", ptx)
    assert made.asm["cubin"][:4] == b"\x7fELF"
    assert set(ONLY_BLACKWELL.findall(ptx)) == ({conversion} if conversion else set())
    assert is_ieee(ptx)


@pytest.mark.parametrize("name", CASES)
def test_sm90_kernels_assemble_without_the_conversions_of_blackwell(name, assemble):
    module, args, _ = CASES[name]
    made = assemble(90, module, *args)
    ptx = made.asm["ptx"]
    assert re.search(r"\.target sm_90a", ptx)
    assert made.asm["cubin"][:4] == b"\x7fELF"
    assert ONLY_BLACKWELL.findall(ptx) == []
    assert is_ieee(ptx)


@pytest.mark.parametrize("name", [n for n, (module, *_) in CASES.items() if "nvfp4" in n])
def test_a_scale_is_not_converted_back(name, assemble):
    """Of a conversion to e4m3 and one back ptxas 12.8 may put the second first."""
    module, args, _ = CASES[name]
    ptx = assemble(90, module, *args).asm["ptx"]
    assert ("f16x2.e4m3x2" in ptx) == (module is ops.dequantize)  # which reads scales


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_sm100_and_sm90_scale_of_the_accumulator_assembles(out_dtype, capability, monkeypatch):
    assembler = Assembler(ops.wide_mm.kernel, capability)
    monkeypatch.setattr(ops.wide_mm, "kernel", assembler)
    ops.wide_mm.fill(torch.ones(64, 48), AMAX, AMAX, torch.empty(64, 48, dtype=out_dtype))
    (made,) = assembler.made
    assert made.asm["cubin"][:4] == b"\x7fELF"
    assert is_ieee(made.asm["ptx"])
