"""Run the fused and the grouped MXFP8 and NVFP4 kernels interpreted, against their references.

Started by test_micro with TRITON_INTERPRET=1: every bit is right without a GPU, given torch's
conversions in place of the interpreter's, which are wrong (triton 3.6 and 3.7).
"""

import numpy as np
import torch
import triton
import triton.language as tl
from interpreter import hurry, larger, narrow4, narrowed, rounded, widened
from triton.runtime import interpreter

from lpcompile import ops
from lpcompile.ops import (
    amax_group,
    amax_tensor,
    blocks,
    fp4,
    fp4_codes,
    fp8,
    fused_amax,
    fused_amax_micro,
    hadamard,
    philox,
    pointwise,
    turned,
    wide_tile,
)
from lpcompile.ops.pointwise import IDENTITY

convert = interpreter._convert_float
BY_TORCH = {tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16}


def rounded_by_torch(x, input_dtype, output_dtype, rounding_mode):
    if (input_dtype, output_dtype) == (tl.bfloat16, tl.float32):
        return (x.astype(np.uint32) << 16).view(np.float32)
    if (input_dtype, output_dtype) == (tl.float8e4nv, tl.float32):
        return torch.from_numpy(x.copy()).view(torch.float8_e4m3fn).float().numpy()
    if output_dtype not in BY_TORCH or input_dtype != tl.float32:
        return convert(x, input_dtype, output_dtype, rounding_mode)
    wide = torch.from_numpy(np.ascontiguousarray(x).view(np.float32))
    wide = torch.where(wide.isnan(), torch.nan, wide)  # the one NaN that a GPU makes
    if output_dtype == tl.float8e4nv:
        wide = wide.clamp(-448, 448)  # as a GPU saturates, and torch 2.11 does not
    narrow = wide.to(BY_TORCH[output_dtype])
    return narrow.view(getattr(torch, f"uint{8 * narrow.element_size()}")).numpy()


@triton.jit
def up(a, b, c):
    exact = a.to(tl.float64) * b + c
    near = exact.to(tl.float32)
    bits = near.to(tl.int32, bitcast=True)
    above = tl.where(near > 0, bits + 1, tl.where(near < 0, bits - 1, 1))
    return tl.where(near < exact, above.to(tl.float32, bitcast=True), near)


@triton.jit
def signs(x):
    made = x[0].to(tl.int16, bitcast=True).to(tl.int32) * 0
    for k in tl.static_range(8):
        negative = x[k].to(tl.int16, bitcast=True) < 0
        made |= tl.where(negative, 8, 0) << 4 * k
    return made


@triton.jit
def codes(made):
    word = tl.zeros(made[0].shape, tl.int32)
    for k in tl.static_range(8):
        a = tl.abs(made[k])
        code = tl.where(a < 2, 2 * a, tl.where(a < 4, a + 2, tl.where(a < 6, 6.0, 7.0)))
        word |= tl.where(a == a, code, 7.0).to(tl.int32) << 4 * k
    return word


@triton.jit
def reciprocal(v):
    return tl.where(v == 0, 3e38, tl.div_rn(1.0, tl.where(v == 0, 1.0, v)))


@triton.jit
def halves(wide):
    return (wide >> 32).to(tl.uint32), wide.to(tl.uint32)


pointwise.rounded, pointwise.narrowed, wide_tile.up = rounded, narrowed, up
philox.halves = halves
turned.widened, turned.larger = widened, larger
fp8.narrow4, fp4.reciprocal, fp4_codes.codes = narrow4, reciprocal, codes
fp4_codes.signs_along = fp4_codes.signs_across = signs
TIES = ops.quantize_nvfp4_grouped_t.samples("cpu")[:2]


def ragged():
    """(module, arguments) of the kernels for ragged groups."""
    x = torch.randn(150, 70).bfloat16()
    x[130:] = torch.nan  # past the last group
    tiny = x[:130] * 1e-38
    yield from ((ops.quantize_nvfp4_grouped_t, args) for args in TIES)
    e4m3, seed = torch.float8_e4m3fn, torch.tensor([0x0123456789ABCDEF])
    for t, ends in ((x, (0, 1, 17, 70, 70, 130)), (tiny.t(), (10, 70)), (x, (0, 0))):
        offs = torch.tensor(ends, dtype=torch.int32)
        for floor in (False, True):
            yield ops.quantize_mxfp8_grouped_t, (t, offs, e4m3, floor)
        for signs in (None, hadamard.SIGNS):
            yield ops.amax_group, (t, offs, signs)
            if signs is not None:
                yield ops.amax_group_both, (t, offs, signs)
            amax = amax_group.reference(t, offs, signs)
            for given in (None, seed):
                yield ops.quantize_nvfp4_grouped_t, (t, amax, offs, signs, given, 7)


def fused():
    """The same of the fused kernels."""
    for module in (ops.fused_amax_micro, ops.fused_cast_micro):
        for args in module.samples("cpu"):
            if module is ops.fused_amax_micro or all(a.isfinite() for a in args[1]):
                yield module, args  # NVFP4 codes of NaN: its minimum keeps it, a GPU's does not


def wide():
    """The same of what copies stand for: small, or they take minutes."""
    offs, seed = torch.tensor([0, 12, 12, 30], dtype=torch.int32), torch.tensor([7])
    x, experts = torch.randn(41, 70).bfloat16(), torch.randn(2, 41, 70).bfloat16()
    whole = amax_tensor.reference(x), fused_amax_micro.reference([x], IDENTITY, ["hadamard0"])[0]
    of_groups = amax_group.reference(x, offs, hadamard.SIGNS)
    for forms, amaxes, ends in (
        (["0 n 1 rceil plain", "0 t 1 floor plain", "0 t 32 rceil plain"], (), None),
        (["0 n 1 rceil plain", "0 g 1 rceil plain"], (), offs),
        (["0 n 1 draw2 plain", "0 h 1 draw3 plain"], whole, None),
        (["0 n 16 nearest plain", "0 gh 1 draw5 plain"], (whole[0], of_groups), offs),
        (["0 gh 1 draw5 plain", "0 g 1 nearest plain"], (of_groups, of_groups), offs),
    ):
        yield ops.fused_wide_micro, ([x], list(amaxes), seed, IDENTITY, forms, ends)
    for inputs, program in ops.fused_wide_micro.biased("cpu"):
        args = (inputs, [], None, program, ["0 n 1 rceil plain", "0 t 1 rceil plain"])
        yield ops.fused_wide_micro, args
    every = torch.arange(2**16).to(torch.int16).view(torch.bfloat16).view(-1, 64)
    forms = [f"0 {way} 1 {how} plain" for way in "nt" for how in ("rceil", "floor")]
    yield ops.fused_wide_micro, ([every], [], None, IDENTITY, forms, None)
    each = [amax_tensor.reference(experts)]
    args = ([experts], each, None, IDENTITY, ["0 t 16 nearest plain"])
    yield ops.fused_wide_micro, args


def main():
    interpreter._convert_float = rounded_by_torch
    fp8.runs_triton = lambda x: True
    blocks.runs_native = blocks.compares_pairs = lambda x: False
    small = [s for s in fused_amax.programs("cpu") if s[0][0].numel() < 30_000]
    fused_amax.programs = lambda device: small
    count = 0
    for module, args in (*fused(), *ragged(), *wide()):
        said = module.agrees(module.launch(*args), module.reference(*args))
        if said:
            raise SystemExit(f"{module.__name__} {args[1:]}: {said}")
        count += 1
    print(count, "launches")


if __name__ == "__main__":
    hurry()
    torch.manual_seed(0)
    main()
