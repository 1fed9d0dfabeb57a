"""Run the grouped kernels in Triton's interpreter, on ragged groups, against their references.

Started by test_grouped with TRITON_INTERPRET=1: where groups and tiles lie is right without a GPU.
Elements are fp32 here, because the interpreter rounds to FP8 wrongly (triton 3.6 and 3.7).
"""

from types import SimpleNamespace

import torch
import triton.language as tl
from interpreter import column_words, hurry, larger, narrow4, narrowed, rounded, widened

from lpcompile import ops
from lpcompile.ops import (
    block_scaled_grouped,
    blocks,
    fp8,
    fused_amax,
    fused_source,
    grouped_gemm,
    pointwise,
    turned,
)
from lpcompile.ops.define import per_column, same_bits

E4M3, WIDE = torch.float8_e4m3fn, torch.float32
fp8.MAX[WIDE], fp8.TRITON[WIDE] = fp8.MAX[E4M3], tl.float32


fp8.narrow4, pointwise.rounded, pointwise.narrowed = narrow4, rounded, narrowed
turned.larger, turned.widened = larger, widened
ops.transpose_fp8.column_words = column_words
grouped_gemm.suits_warpgroups = lambda *args: False  # there is no interpreter of Gluon
torch.cuda.get_device_capability = lambda device=None: (9, 0)
blocks.runs_native = lambda x: False
# In fp32, for its dot; only what launches a product calls it here.
block_scaled_grouped.dequantize = SimpleNamespace(op=lambda *side: ops.dequantize.op(*side).float())
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
    multi_processor_count=5, shared_memory_per_block_optin=2**17
)


def check(said, what):
    if said:
        raise SystemExit(f"{what}: {said}")


def quantizers(x, offs, *rows):
    """Every grouped quantizer on one x, or on the rows of it that are given."""
    for module in (ops.amax_column_grouped, ops.amax_tensor_grouped):
        amax = module.launch(x, offs, *rows)
        check(same_bits(amax, module.reference(x, offs, *rows)), module.__name__)
        args = (x, amax, offs, WIDE, True, *rows)  # powers of two, under which nothing is clamped
        made = ops.quantize_fp8_grouped_t.launch(*args)
        check(same_bits(made, ops.quantize_fp8_grouped_t.reference(*args)), "grouped_t")
    args = (x, offs, WIDE, True, *rows)
    made = ops.quantize_fp8_block_grouped_t.launch(*args)
    check(same_bits(made, ops.quantize_fp8_block_grouped_t.reference(*args)), "block_grouped_t")


def transposes():
    """Codes of all groups, and of one matrix, at odd sizes: their bytes are what they are."""
    for args in ops.transpose_fp8.samples("cpu"):
        made, expected = ops.transpose_fp8.launch(*args), ops.transpose_fp8.reference(*args)
        check(same_bits(made, expected), f"transpose_fp8 {[list(t.shape) for t in args[:2]]}")


def whole():
    """Matrices whose maxima are taken as others are narrowed; each ends in a part of a tile."""
    for E, R, C in ((7, 48, 704), (4, 40, 208), (5, 64, 256)):
        x = torch.randn(E, R, C, dtype=torch.bfloat16) * torch.arange(E)[:, None, None]
        made = ops.quantize_fp8_whole.launch(x, WIDE, True)
        check(same_bits(made, ops.quantize_fp8_whole.reference(x, WIDE, True)), f"whole {E}")


# Exact in bf16, to which the interpreter rounds wrongly too; of numbers that e4m3 has, not NaN.
EXACT = "wide wide full row; bf16 v0 = neg(i0); bool v1 = gt(i1, 0.5); bf16 v2 = where(v1, i2, 0.0)"
FORMS = (
    ["0 row e4m3 pow2 n", "0 row e4m3 pow2 g", "1 row e4m3 pow2 g", "1 row e4m3 pow2 t"],
    ["0 tokens e4m3 pow2 n", "0 tokens e4m3 pow2 g"],
    ["0 block e4m3 pow2 n", "0 block e4m3 pow2 g", "1 block e4m3 pow2 g"],
    ["0 block e4m3 pow2 t", "1 block e4m3 pow2 t", "1 block e4m3 pow2 n"],
)


def fused():
    """Every amax and every copy, of halves of a tensor and of results side by side too."""
    cases = fused_amax.grouped("cpu")
    for inputs, program, offs in (cases[2], cases[6], cases[-2], cases[-1]):
        inputs = [x.nan_to_num(448).to(E4M3).bfloat16() for x in inputs]
        if "wide" in program:
            inputs[:2] = torch.cat(inputs[:2], 1).split(inputs[0].shape[1], 1)
        program = f"{EXACT}; v0+i1 v2" if len(inputs) > 1 else program
        count = len(pointwise.parse(program).results)
        for wanted in FORMS if offs[-1] else FORMS[::2]:  # it does not saturate either
            parsed = [f for f in map(fused_source.parse_form, wanted) if f.result < count]
            wants = list(dict.fromkeys(f.amax for f in parsed if f.amax))
            made = ops.fused_amax.launch(inputs, program, wants, offs)
            expected = ops.fused_amax.reference(inputs, program, wants, offs)
            check(same_bits(made, expected), f"fused_amax {wants}")
            amaxes = dict(zip(wants, made, strict=True))
            given = [amaxes[f.amax] for f in parsed if f.amax]
            args = (inputs, given, program, [f.text for f in parsed], offs)
            made, expected = ops.fused_cast.launch(*args), ops.fused_cast.reference(*args)
            check(same_bits(made, expected), f"fused_cast {wanted} {offs}")


def multiply(args, what):
    a, a_scale, b, b_scale, offs, dtype, fast = args
    expected = ops.scaled_grouped_mm.exact(*args)
    made = torch.full_like(expected, torch.nan, dtype=dtype)
    made[expected.shape[0] if b.dim() == 2 else int(offs[-1]) :] = 0  # rows in no group
    grouped_gemm.fill(a.float(), a_scale, b.float(), b_scale, offs, made, fast)
    check(per_column(0.01)(made, expected), what)


def multiply_blocks(args):
    """MXFP8 and NVFP4 operands, dequantized by the reference and multiplied by the kernel.

    And the same with an addend, which this kernel leaves to torch.
    """
    expected = ops.scaled_grouped_mm.exact(*args)
    *operands, dtype, fast, a_amax, b_amax = args
    args = (*operands, torch.float32, fast, a_amax, b_amax)
    made = ops.scaled_grouped_mm.launch(*args)
    check(per_column(0.01)(made, expected), "blocks")
    addend = torch.randn_like(made)
    check(same_bits(ops.scaled_grouped_mm.launch(*args, addend), made + addend), "an addend")


def main():
    torch.manual_seed(0)
    fused()
    transposes()
    whole()
    for counts, past in (((70, 0, 128, 1, 140, 0), 21), ((0, 0), 5)):
        ends = torch.tensor(counts).cumsum(0).int()
        T, E = int(ends[-1]) + past, len(ends)
        N, K = 136, 144
        x, dy, w = (torch.randn(*s, dtype=torch.bfloat16) for s in ((T, K), (T, N), (E, N, K)))
        x[T - past :] = torch.nan
        quantizers(x, ends)
        few = torch.randn(50, K, dtype=torch.bfloat16)
        quantizers(few, ends, torch.randint(-50, 50, (T,)))
        for of_x, of_w in (
            (ops.quantize_fp8_row, ops.quantize_fp8_row),
            (ops.quantize_fp8_block, ops.quantize_fp8_square),
        ):
            pair = (*of_x.reference(x, E4M3, True), *of_w.reference(w, E4M3, True))
            multiply((*pair, ends, torch.float32, False), f"fprop {ends}")
        column = [ops.amax_column_grouped.reference(t, ends) for t in (dy, x)]
        rows = [
            ops.quantize_fp8_grouped_t.reference(t, amax, ends, E4M3, True)
            for t, amax in zip((dy, x), column, strict=True)
        ]
        blocks = [ops.quantize_fp8_block_grouped_t.reference(t, ends, E4M3, True) for t in (dy, x)]
        for (a, a_scale, at), (b, b_scale, _) in (rows, blocks):
            multiply((a, a_scale, b, b_scale, at, torch.float32, False), f"wgrad {ends}")

    for args in block_scaled_grouped.samples("cpu")[10:19]:  # the odd sizes
        multiply_blocks(args)


if __name__ == "__main__":
    hurry()
    main()
