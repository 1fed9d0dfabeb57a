"""``bench kernels``: every quantize and amax kernel, and what the passes fuse of layers.

``share`` is bytes that must move / time over the bandwidth of a large copy in the same run. Bytes
that must move: every input tensor read once and every output written once. A chain of several
kernels, or a kernel that reads twice, is charged for it by its share. ``copy`` copies one tensor,
and pays what any kernel of that size pays for its launch and its last programs. ``host us``: until
the call returns, on an idle GPU.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lpcompile import gemm, ops
from lpcompile.bench import fused as fused_ops
from lpcompile.bench.fused import Call, name_of
from lpcompile.bench.models import EXPERTS, Layer, Llama, experts_layer, linears, llama_layer
from lpcompile.bench.report import Row
from lpcompile.bench.timing import copy_bandwidth, host_ms, interleave
from lpcompile.ops.pointwise import IDENTITY

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Measured by `bench gemm` and `bench experts`.
GEMMS = (ops.scaled_mm, ops.scaled_grouped_mm, ops.wide_mm, ops.wide_grouped_mm)
NUM_GROUPS = 8


def _narrow(x: Tensor) -> tuple[Any, ...]:
    return (x, E4M3, True)


def _with_amax(x: Tensor) -> tuple[Any, ...]:
    return (x, ops.amax_tensor.op(x), E5M2, False)


def _with_column_amax(x: Tensor) -> tuple[Any, ...]:
    return (x, ops.amax_column.op(x), E4M3, True)


def _alone(x: Tensor) -> tuple[Any, ...]:
    return (x,)


def _stack(x: Tensor) -> tuple[Any, ...]:
    return (x.unflatten(0, (NUM_GROUPS, -1)), E4M3, False)


def _codes(x: Tensor) -> tuple[Any, ...]:
    return (*ops.quantize_fp8_tensor.op(*_with_amax(x)), x.shape[1])


def _grouped_codes(x: Tensor) -> tuple[Any, ...]:
    return (*_codes(x), _ends(x.shape[0], x.device))


def _micro(x: Tensor) -> tuple[Any, ...]:
    return (x, E4M3, False)


def _nearest(x: Tensor) -> tuple[Any, ...]:
    return (x, ops.amax_tensor.op(x), None, 0)


def _signs(x: Tensor) -> tuple[Any, ...]:
    return (x, ops.hadamard.SIGNS)


def _scales(x: Tensor) -> Tensor:
    """e8m0 scales [R, C / 32] as swizzles read them, a byte for 32 elements of x."""
    return ops.quantize_mxfp8.op(x, E4M3, False)[1]


def _stacked_scales(x: Tensor) -> tuple[Any, ...]:
    return (_scales(x).unflatten(0, (NUM_GROUPS, -1)),)


def _ends(size: int, device: torch.device) -> Tensor:
    """The ends of groups that share ``size`` rows as equally as can be."""
    return (torch.arange(1, NUM_GROUPS + 1, device=device) * size // NUM_GROUPS).int()


def _grouped(x: Tensor) -> tuple[Any, ...]:
    return (x, _ends(x.shape[0], x.device))


def _grouped_with_amax(x: Tensor) -> tuple[Any, ...]:
    offs = _ends(x.shape[0], x.device)
    return (x, ops.amax_column_grouped.op(x, offs), offs, E4M3, True)


def _grouped_blocks(x: Tensor) -> tuple[Any, ...]:
    return (x, _ends(x.shape[0], x.device), E4M3, True)


def _grouped_micro(x: Tensor) -> tuple[Any, ...]:
    return (x, _ends(x.shape[0], x.device), E4M3, False)


def _grouped_alone(x: Tensor) -> tuple[Any, ...]:
    return (*_grouped(x), None)


def _grouped_signs(x: Tensor) -> tuple[Any, ...]:
    return (*_grouped(x), ops.hadamard.SIGNS)


def _grouped_nearest(x: Tensor) -> tuple[Any, ...]:
    amax = ops.amax_group.op(*_grouped_alone(x))
    return (x, amax, _ends(x.shape[0], x.device), None, None, 0)


def _grouped_transformed(x: Tensor) -> tuple[Any, ...]:
    amax = ops.amax_group.op(*_grouped_signs(x))
    return (x, amax, _ends(x.shape[0], x.device), ops.hadamard.SIGNS, None, 0)


def _grouped_stochastic(x: Tensor) -> tuple[Any, ...]:
    return (*_grouped_transformed(x)[:4], gemm.new_seed(x.device), 0)


def _grouped_scales(x: Tensor) -> tuple[Any, ...]:
    scales = _scales(x)
    return (scales, _ends(scales.shape[0], x.device))


def _grouped_scales_t(x: Tensor) -> tuple[Any, ...]:
    scales = ops.quantize_mxfp8_t.op(x, E4M3, False)[1]  # [C, R / 32]
    return (scales, _ends(scales.shape[1], x.device))


def _dequantized(x: Tensor) -> tuple[Any, ...]:
    return ops.quantize_mxfp8.op(x, E4M3, False)


def _swizzled(values: Tensor, scales: Tensor) -> tuple[Any, ...]:
    return (values, ops.swizzle.op(scales))


def _row_and_columns(x: Tensor) -> tuple[Any, ...]:
    return ([x], IDENTITY, E4M3, True, True)


def _row_and_columns_grouped(x: Tensor) -> tuple[Any, ...]:
    return (*_row_and_columns(x), _ends(x.shape[0], x.device))


def _stochastic(x: Tensor) -> tuple[Any, ...]:
    return (x, ops.amax_tensor.op(x), gemm.new_seed(x.device), 0)


# Arguments for every op but the GEMMs and the fused, given x[R, C] bf16.
KERNELS: dict[Any, Callable[[Tensor], tuple[Any, ...]]] = {
    ops.amax_column: _alone,
    ops.amax_column_grouped: _grouped,
    ops.amax_group: _grouped_alone,
    ops.amax_group_both: _grouped_signs,
    ops.amax_tensor: _alone,
    ops.amax_tensor_grouped: _grouped,
    ops.dequantize: _dequantized,
    ops.hadamard: _signs,
    ops.quantize_fp8_block: _narrow,
    ops.quantize_fp8_block_grouped_t: _grouped_blocks,
    ops.quantize_fp8_block_t: _narrow,
    ops.quantize_fp8_grouped_t: _grouped_with_amax,
    ops.quantize_fp8_row: _narrow,
    ops.quantize_fp8_row_t: _with_column_amax,
    ops.quantize_fp8_square: _narrow,
    ops.quantize_fp8_square_t: _narrow,
    ops.quantize_fp8_tensor: _with_amax,
    ops.quantize_fp8_tensor_t: _with_amax,
    ops.quantize_fp8_whole: _stack,
    ops.quantize_mxfp8: _micro,
    ops.quantize_mxfp8_grouped_t: _grouped_micro,
    ops.quantize_mxfp8_square: _micro,
    ops.quantize_mxfp8_square_t: _micro,
    ops.quantize_mxfp8_t: _micro,
    ops.quantize_nvfp4: _nearest,
    ops.quantize_nvfp4_grouped_t: _grouped_nearest,
    ops.quantize_nvfp4_square: _nearest,
    ops.quantize_nvfp4_square_t: _nearest,
    ops.quantize_nvfp4_t: _nearest,
    ops.swizzle: lambda x: (_scales(x),),
    ops.swizzle_experts: _stacked_scales,
    ops.swizzle_grouped: _grouped_scales,
    ops.swizzle_grouped_t: _grouped_scales_t,
    ops.transpose_fp8: _codes,
}
# Ops again, and what is special about their arguments.
MORE: tuple[tuple[Any, str, Callable[[Tensor], tuple[Any, ...]]], ...] = (
    (ops.dequantize, "nvfp4", lambda x: ops.quantize_nvfp4.op(*_nearest(x))),
    (ops.dequantize, "swizzled", lambda x: _swizzled(*_dequantized(x))),
    (ops.dequantize, "nvfp4 swizzled", lambda x: _swizzled(*ops.quantize_nvfp4.op(*_nearest(x)))),
    (ops.amax_group, "hadamard", _grouped_signs),
    (ops.fused_quantize_row, "maxima of columns", _row_and_columns),
    (ops.fused_quantize_row, "maxima of columns of groups", _row_and_columns_grouped),
    (ops.quantize_nvfp4, "stochastic", _stochastic),
    (ops.quantize_nvfp4_grouped_t, "hadamard", _grouped_transformed),
    (ops.quantize_nvfp4_grouped_t, "hadamard stochastic", _grouped_stochastic),
    (ops.quantize_nvfp4_t, "stochastic", _stochastic),
    (ops.transpose_fp8, "groups", _grouped_codes),
)


class Shape(NamedTuple):
    """A tensor [R, C] of a model: x and h are an FFN's input and hidden activations."""

    what: str
    R: int
    C: int


# Tokens and weights of mixture-of-experts layers, beside what the models have.
OF_EXPERTS = (
    Shape("tokens", 131072, 2048),
    Shape("tokens", 131072, 7168),
    Shape("64 experts' weights", 64 * 1408, 2048),
    Shape("8 experts' weights", 8 * 2048, 7168),
)


def shapes(model: Llama) -> list[Shape]:
    """The activations and the weights of a model's FFN, which are its largest."""
    made = [Shape("x", model.tokens, model.dim), Shape("h", model.tokens, model.hidden)]
    weights = {(linear.n, linear.k): linear.name for linear in linears(model, "ffn")}
    return made + [Shape(name, n, k) for (n, k), name in weights.items()]


PARTS = ("ops", "fused")
RECIPES = ("fp8_rowwise", "fp8_tensorwise", "fp8_blockwise", "mxfp8", "nvfp4")


def measure(
    models: Sequence[Llama],
    device: torch.device,
    repeats: int,
    *,
    alone: bool,
    recipes: Sequence[str],
) -> tuple[list[Row], float]:
    """One row a call, and the bytes/s of a copy. The calls of one shape or layer are interleaved.

    alone: every op on its own. recipes: also what the passes make, under these, of each model's FFN
    and of experts.
    """
    copy = copy_bandwidth(device, repeats, 2**30 if device.type == "cuda" else 2**22)
    rows: list[Row] = []
    of = [(f"{model.name} {shape.what}", shape) for model in models for shape in shapes(model)]
    of += [(shape.what, shape) for shape in OF_EXPERTS if device.type == "cuda"]
    for name, shape in of if alone else ():
        rows += _rows(name, _calls(shape, device), repeats, copy)
    for layer in _layers(models, device) if recipes else ():
        for recipe in recipes:
            calls = fused_ops.calls(layer, recipe, device)
            rows += _rows(f"{layer.model}, {recipe}", calls, repeats, copy)
    order = {name: i for i, name in enumerate(dict.fromkeys(row["kernel"] for row in rows))}
    return sorted(rows, key=lambda row: order[row["kernel"]]), copy


def _rows(of: str, calls: Sequence[Call], repeats: int, copy: float) -> list[Row]:
    moved: list[int] = []
    written: dict[str, int] = {}
    for call in calls:
        written[str(len(moved))] = num_bytes = _bytes(call.function())
        moved.append(_bytes(call.tensors) + num_bytes)
    functions = {str(i): call.function for i, call in enumerate(calls)}
    if not calls:
        return []
    device = next(t for t in tree_leaves(calls[0].tensors) if isinstance(t, Tensor)).device
    timings = interleave(functions, device, repeats, written)
    rows: list[Row] = []
    for call, num_bytes, timing in zip(calls, moved, timings.values(), strict=True):
        bandwidth = num_bytes / (timing.ms * 1e-3)
        row = {"kernel": call.name, "of": of, "R": call.R, "C": call.C, "us": timing.ms * 1e3}
        row |= {"host us": host_ms(call.function, device) * 1e3}
        rows.append(row | {"TB/s": bandwidth / 1e12, "share": bandwidth / copy})
    return rows


def _calls(shape: Shape, device: torch.device) -> list[Call]:
    """A copy of a tensor of this shape, then every op that is on its own."""
    x = torch.randn(shape.R, shape.C, device=device, dtype=torch.bfloat16)
    named = [(name_of(module), module, of) for module, of in KERNELS.items()]
    named += [(f"{name_of(module)} ({what})", module, of) for module, what, of in MORE]
    made = [Call("copy", shape.R, shape.C, partial(torch.empty_like(x).copy_, x), (x,))]
    for name, module, of in named:
        given = of(x)
        made.append(Call(name, shape.R, shape.C, partial(module.op, *given), given))
    return made


def _layers(models: Sequence[Llama], device: torch.device) -> list[Layer]:
    experts = EXPERTS["deepseek-v3-16b" if device.type == "cuda" else "tiny"]
    ffns = [llama_layer("ffn", model) for model in models]
    return [*ffns, experts_layer(experts, ragged=True)]


def _bytes(tensors: Any) -> int:
    """Bytes of every tensor in what an op takes or makes."""
    flat = tree_leaves(tensors)
    return sum(t.numel() * t.element_size() for t in flat if isinstance(t, Tensor))
