"""Run the fused MXFP8 and NVFP4 kernels in Triton's interpreter, against their references.

Started by test_micro with TRITON_INTERPRET=1: every bit is right without a GPU, given torch's
roundings in place of the interpreter's, which are wrong (triton 3.6 and 3.7).
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from lpcompile import ops
from lpcompile.ops import blocks, fp8, fused_amax

convert = interpreter._convert_float
BY_TORCH = {tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16}


def rounded_by_torch(x, input_dtype, output_dtype, rounding_mode):
    if output_dtype not in BY_TORCH or input_dtype != tl.float32:
        return convert(x, input_dtype, output_dtype, rounding_mode)
    wide = torch.from_numpy(np.ascontiguousarray(x).view(np.float32))
    wide = torch.where(wide.isnan(), torch.nan, wide)  # the one NaN that a GPU makes
    if output_dtype == tl.float8e4nv:
        wide = wide.clamp(-448, 448)  # as a GPU saturates, and torch 2.11 does not
    narrow = wide.to(BY_TORCH[output_dtype])
    return narrow.view(getattr(torch, f"uint{8 * narrow.element_size()}")).numpy()


def main():
    interpreter._convert_float = rounded_by_torch
    fp8.runs_triton = lambda x: True
    blocks.runs_native = lambda x: False
    small = [s for s in fused_amax.programs("cpu") if s[0][0].shape[0] < 400]
    fused_amax.programs = lambda device: small
    count = 0
    for module in (ops.fused_amax_micro, ops.fused_cast_micro):
        for i, args in enumerate(module.samples("cpu")):
            if module is ops.fused_cast_micro and any(not a.isfinite() for a in args[1]):
                continue  # NVFP4 codes of NaN: the interpreter's minimum keeps it, a GPU's does not
            said = module.agrees(module.launch(*args), module.reference(*args))
            if said:
                raise SystemExit(f"{module.__name__} {i} {args[-1]}: {said}")
            count += 1
    print(count, "launches")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
