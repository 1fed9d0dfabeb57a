"""``quantize_fp8_row`` as Inductor IR: a row's amax and a cast, which fuse with what makes x.

One kernel with an RMSNorm or a SiLU*mul in front, where the op alone would have x written in bf16
and read again. Equal to ``ops.quantize_fp8_row.reference`` bit for bit on the same x; fused, the
producer's rounding to bf16 falls away unless ``emulate_precision_casts`` is set, and 2 to 4% of the
codes differ from eager's.

Not a decomposition: that would dissolve the op before min-cut decides what is saved.
"""

from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import lowerings, register_lowering, to_dtype
from torch._inductor.virtualized import V
from torch._inductor.virtualized import ops as inner

from lpcompile import ops
from lpcompile.lowerings.launch import fallback
from lpcompile.ops.define import ALIGN
from lpcompile.ops.fp8 import MAX

aten = torch.ops.aten
OP = ops.quantize_fp8_row.op
_fallback = fallback(OP)


@register_lowering(OP, type_promotion_kind=None)
def lower(x: Any, element: torch.dtype, pow2: bool, columns: Any = None) -> Any:
    """values[R, C], scales[R] of x[R, C].

    The op itself where C needs padding or is symbolic, and where x is in memory: its own kernel
    reads x once, and Inductor's loop twice (118 against 50 us for 14336 x 4096, H200, torch 2.11).
    And of x[E, R, C]: the weights of experts have no producer to fuse with.
    """
    *rest, width = x.get_size()
    narrow = V.graph.sizevars.statically_known_multiple_of(width, ALIGN)
    if len(rest) != 1 or is_in_memory(x) or not narrow or x.get_dtype() != torch.bfloat16:
        return _fallback(x, element, pow2)
    (rows,) = rest
    # In fp32: Inductor's C++ for a bf16 amax declares one variable twice (torch 2.13, CPU).
    magnitude = lowerings[aten.abs.default](to_dtype(x, torch.float32))
    amax = lowerings[aten.amax.default](magnitude, [1], True)
    load_x, load_amax = x.make_loader(), amax.make_loader()

    def scale(row: Any) -> Any:
        return encode(load_amax([row, 0]), element, pow2)

    def value(index: Any) -> Any:
        wide = inner.to_dtype(load_x(index), torch.float32)
        limit = inner.constant(MAX[element], torch.float32)
        scaled = inner.mul(wide, scale(index[0]))
        clamped = inner.minimum(inner.maximum(scaled, inner.neg(limit)), limit)
        nan = inner.constant(float("nan"), torch.float32)
        kept = inner.where(inner.isnan(clamped), nan, clamped)
        return inner.to_dtype(kept, element, torch.float32)

    device = x.get_device()
    values = ir.Pointwise.create(device=device, dtype=element, inner_fn=value, ranges=[rows, width])
    scales = ir.Pointwise.create(
        device=device,
        dtype=torch.float32,
        inner_fn=lambda index: decode(scale(index[0])),
        ranges=[rows],
    )
    return values, scales


def is_in_memory(x: Any) -> bool:
    """Whether x is a buffer, and not a computation that could still be fused."""
    while isinstance(x, (ir.TensorBox, ir.BaseView)):
        x = x.data
    return not (isinstance(x, ir.StorageBox) and isinstance(x.data, (ir.Pointwise, ir.Reduction)))


def encode(amax: Any, element: torch.dtype, pow2: bool) -> Any:
    """``ops.fp8.encode_scale`` of an fp32 value, as Inductor ops."""
    f32, f64 = torch.float32, torch.float64
    least = inner.constant(1e-12, f64)
    wide = inner.maximum(inner.to_dtype(amax, f64), least)
    scale = inner.to_dtype(inner.truediv(inner.constant(MAX[element], f64), wide), f32)
    if pow2:
        bits = inner.to_dtype_bitcast(scale, torch.int32, f32)
        power = inner.bitwise_and(bits, inner.constant(0x7F800000, torch.int32))
        scale = inner.to_dtype_bitcast(power, f32, torch.int32)
    inf, nan = (inner.constant(float(v), f32) for v in ("inf", "nan"))
    return inner.where(inner.lt(amax, inf), scale, nan)  # a NaN is not less either


def decode(scale: Any) -> Any:
    """``ops.fp8.decode_scale`` of an fp32 value: 1 / scale through fp64, which rounds once."""
    f32, f64 = torch.float32, torch.float64
    wide = inner.truediv(inner.constant(1.0, f64), inner.to_dtype(scale, f64))
    nan = inner.constant(float("nan"), f32)
    return inner.where(inner.isnan(scale), nan, inner.to_dtype(wide, f32))
