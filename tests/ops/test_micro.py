"""Fused and grouped MXFP8 and NVFP4 kernels without a GPU: interpreted, and assembled."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lpcompile import ops
from lpcompile.ops import pointwise, wide_source
from lpcompile.ops.micro_source import Form, parse_form

SWIGLU = (
    "full full; float v0 = i0; float v1 = sigmoid(v0); float v2 = mul(v0, v1); bf16 v3 = v2;"
    " bf16 v4 = mul(v3, i1); v4"
)
BIASED = "full column; bf16 v0 = add(i0, i1); v0"
FORMS = {
    "mx n": (("0 n 1 rceil swizzled",), "ue8m0x2"),
    "mx n floor": (("0 n 1 floor plain",), ""),
    "mx t": (("0 t 1 rceil plain",), "ue8m0x2"),
    "nv n": (("0 n 1 nearest swizzled",), "cvt.rn.satfinite.e2m1x2"),
    "nv n stochastic": (("0 n 1 draw4 swizzled",), "cvt.rs.satfinite.e2m1x4"),
    "nv h": (("0 h 1 nearest swizzled",), "cvt.rn.satfinite.e2m1x2"),
    "nv h stochastic": (("0 h 1 draw5 plain",), "cvt.rs.satfinite.e2m1x4"),
    "nv t and h": (("0 t 1 nearest plain", "0 h 1 nearest plain"), "cvt.rn.satfinite.e2m1x2"),
    "nv square t": (("0 t 16 nearest swizzled",), "cvt.rn.satfinite.e2m1x2"),
}
TYPES = {"i": "*bf16", "a": "*fp32", "q": "*u8", "s": "*u8", "seed_ptr": "*i64"}
TYPES |= {"w": "*i16", "place_ptr": "*i32"}


def assembled(kernel, capability, tile, types=None, num_warps=4, **more):
    """The kernel compiled for a capability, with pointers of these types, and ``more`` sizes."""
    signature, constants = {}, {}
    attributes = {}
    sizes = dict(zip(("BM", "BC", "NATIVE", "EVEN"), tile, strict=True), ROWS=256, **more)
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in sizes:
            signature[name], constants[(i,)] = "constexpr", sizes[name]
        elif name.endswith("_ptr"):
            signature[name] = {**TYPES, **(types or {})}.get(name) or TYPES[name[0]]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name == "C":
                attributes[(i,)] = [["tt.divisibility", 16]]
    source, target = (
        ASTSource(kernel, signature, constants, attributes),
        GPUTarget("cuda", capability, 32),
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize(("capability", "even"), [(90, True), (100, True), (100, False)])
@pytest.mark.parametrize("name", FORMS)
def test_a_cast_assembles_for_hopper_and_blackwell_with_its_conversions(name, capability, even):
    forms, conversion = FORMS[name]
    parsed = [parse_form(f) for f in forms]
    native = capability == 100
    kernel = ops.fused_cast_micro.kernel(SWIGLU, forms, even)
    types = {f"q{i}_ptr": "*fp8e4nv" for i, f in enumerate(parsed) if f.size == 32}
    types |= {f"s{i}_ptr": "*fp8e4nv" for i, f in enumerate(parsed) if f.size == 16}
    tile = ops.fused_cast_micro.tile(parsed[0])
    made = assembled(kernel, capability, (*tile, native, even), types)
    assert made.asm["cubin"][:4] == b"\x7fELF"
    found = re.findall(r"cvt\.\S*(?:e2m1|ue8m0)\S*", made.asm["ptx"])
    assert bool(found) == (native and bool(conversion))
    assert all(conversion in f for f in found)
    assert ".local" not in made.asm["ptx"]


@pytest.mark.parametrize("program", [SWIGLU, BIASED], ids=["SwiGLU", "biased"])
@pytest.mark.parametrize(
    "forms",
    [
        ("0 n 1 rceil plain", "0 t 1 rceil plain"),
        ("0 n 1 rceil plain", "0 g 1 rceil plain"),
        ("0 h 1 nearest plain",),
        ("0 n 1 draw0 plain",),
        ("0 gh 1 draw0 plain",),
    ],
)
def test_wide_copies_assemble_for_hopper_and_no_maximum_leaves_its_warp(forms, program):
    parsed = [parse_form(f) for f in forms]
    tile = ops.fused_wide_micro._tile(parsed, program)
    grouped = wide_source.is_grouped(parsed)
    kernel = ops.fused_wide_micro.kernel(program, forms, not grouped)
    sizes = {"COLUMNS": tile.columns, "STAGES": tile.stages}
    hopper = tile.BM, tile.BC, True, not grouped
    made = assembled(kernel, 90, hopper, num_warps=tile.warps, **sizes)
    assert made.asm["cubin"][:4] == b"\x7fELF"
    assert ".local" not in made.asm["ptx"]
    assert made.metadata.shared == 0 or tile.warps > 1


@pytest.mark.parametrize("wants", [("tensor0",), ("hadamard0",), ("tensor0", "hadamard0")])
def test_an_amax_assembles_for_hopper(wants):
    kernel = ops.fused_amax_micro.kernel(SWIGLU, wants, True)
    types = {f"{want}_ptr": "*i32" for want in wants}
    tile = (ops.fused_amax_micro.BM, ops.fused_amax_micro.BC, False, True)
    assert assembled(kernel, 90, tile, types).asm["cubin"][:4] == b"\x7fELF"


def test_every_kernel_gives_its_references_bits_in_the_interpreter():
    script = Path(__file__).with_name("interpret_micro.py")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(run.stdout.split()[0]) >= 55


def test_a_form_reads_its_own_text_back():
    for form in (Form(1, "h", 1, "draw3", True), Form(0, "n", 32, "floor", False)):
        assert parse_form(form.text) == form
    assert parse_form("1 h 1 draw3 plain").amax == "hadamard1"
    assert parse_form("0 t 32 rceil plain").amax == ""
    assert pointwise.parse(SWIGLU).text() == SWIGLU
