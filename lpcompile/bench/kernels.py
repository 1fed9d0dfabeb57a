"""``bench kernels``: every quantize and amax kernel, and what should be fused with one.

``share`` is bytes that must move / time over the bandwidth of a large copy in the same run. Bytes
that must move: every input tensor read once and every output written once. A chain of several
kernels, or a kernel that reads twice, is charged for it by its share.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lpcompile.lowerings  # noqa: F401  registers them with Inductor
from lpcompile import gemm, ops
from lpcompile.bench.models import Llama, linears
from lpcompile.bench.report import Row
from lpcompile.bench.timing import copy_bandwidth, interleave
from lpcompile.ops import micro_source
from lpcompile.ops.pointwise import IDENTITY

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GEMMS = (ops.scaled_mm, ops.scaled_grouped_mm)  # measured by `bench gemm` and `bench experts`
NUM_GROUPS = 8


def _narrow(x: Tensor) -> tuple[Any, ...]:
    return (x, E4M3, True)


def _with_amax(x: Tensor) -> tuple[Any, ...]:
    return (x, ops.amax_tensor.op(x), E5M2, False)


def _with_column_amax(x: Tensor) -> tuple[Any, ...]:
    return (x, ops.amax_column.op(x), E4M3, True)


def _alone(x: Tensor) -> tuple[Any, ...]:
    return (x,)


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


# gate, up and dh of SwiGLU -> the gradients of gate and up, and h, as ``passes/fuse.py`` writes it.
SWIGLU = (
    "full full full; bf16 v0 = mul(i0, i1); float v1 = v0; float v2 = i2; float v3 = sigmoid(v2);"
    " float v4 = mul(v1, v3); float v5 = sub(1.0, v3); float v6 = mul(v2, v5);"
    " float v7 = add(v6, 1.0); float v8 = mul(v4, v7); bf16 v9 = v8; float v10 = mul(v2, v3);"
    " bf16 v11 = v10; bf16 v12 = mul(v11, i1); bf16 v13 = mul(i0, v11); v9 v12 v13"
)
SILU_MUL = "full full; float v0 = i0; float v1 = sigmoid(v0); float v2 = mul(v0, v1);"
SILU_MUL += " bf16 v3 = v2; bf16 v4 = mul(v3, i1); v4"
WANTS = ["column0", "row0", "column1", "column2", "row2"]
FORMS = [f"{r} row e4m3 pow2 {way}" for r, way in ("0t", "0n", "1t", "2t", "2n")]  # of WANTS


def _swiglu_amax(x: Tensor) -> tuple[Any, ...]:
    return ([x, torch.randn_like(x), torch.randn_like(x)], SWIGLU, WANTS)


def _swiglu_cast(x: Tensor) -> tuple[Any, ...]:
    inputs, program, wants = _swiglu_amax(x)
    return (inputs, ops.fused_amax.op(inputs, program, wants), program, FORMS)


def _silu_mul(x: Tensor) -> tuple[Any, ...]:
    return ([x, torch.randn_like(x)], SILU_MUL, E4M3, True)


def _row_and_columns(x: Tensor) -> tuple[Any, ...]:
    return ([x], IDENTITY, E4M3, True, True)


def _row_and_columns_grouped(x: Tensor) -> tuple[Any, ...]:
    return (*_row_and_columns(x), _ends(x.shape[0], x.device))


def _stochastic(x: Tensor) -> tuple[Any, ...]:
    return (x, ops.amax_tensor.op(x), gemm.new_seed(x.device), 0)


def _cast_micro(x: Tensor, *forms: str) -> tuple[Any, ...]:
    """SiLU*mul, narrowed to forms."""
    names = [name for form in forms if (name := micro_source.parse_form(form).amax)]
    inputs = [x, torch.randn_like(x)]
    amaxes = ops.fused_amax_micro.op(inputs, SILU_MUL, names) if names else []
    return (inputs, amaxes, gemm.new_seed(x.device), SILU_MUL, list(forms))


def _amax_micro(x: Tensor) -> tuple[Any, ...]:
    return ([x, torch.randn_like(x)], SILU_MUL, ["tensor0", "hadamard0"])


# Arguments for every op but the GEMMs, given x[R, C] bf16.
KERNELS: dict[Any, Callable[[Tensor], tuple[Any, ...]]] = {
    ops.amax_column: _alone,
    ops.amax_column_grouped: _grouped,
    ops.amax_group: _grouped_alone,
    ops.amax_tensor: _alone,
    ops.amax_tensor_grouped: _grouped,
    ops.dequantize: _dequantized,
    ops.fused_amax: _swiglu_amax,
    ops.fused_amax_micro: _amax_micro,
    ops.fused_cast: _swiglu_cast,
    ops.fused_cast_micro: lambda x: _cast_micro(x, "0 n 1 rceil swizzled", "0 t 1 rceil swizzled"),
    ops.fused_quantize_row: _silu_mul,
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
}
# Ops again, and what is special about their arguments.
MORE: tuple[tuple[Any, str, Callable[[Tensor], tuple[Any, ...]]], ...] = (
    (ops.dequantize, "nvfp4", lambda x: ops.quantize_nvfp4.op(*_nearest(x))),
    (ops.amax_group, "hadamard", _grouped_signs),
    (ops.fused_quantize_row, "maxima of columns", _row_and_columns),
    (ops.fused_quantize_row, "maxima of columns of groups", _row_and_columns_grouped),
    (ops.quantize_nvfp4, "stochastic", _stochastic),
    (ops.quantize_nvfp4_grouped_t, "hadamard", _grouped_transformed),
    (ops.quantize_nvfp4_grouped_t, "hadamard stochastic", _grouped_stochastic),
    (ops.quantize_nvfp4_t, "stochastic", _stochastic),
    (ops.fused_cast_micro, "nvfp4", lambda x: _cast_micro(x, "0 n 1 nearest swizzled")),
    (ops.fused_cast_micro, "nvfp4 hadamard", lambda x: _cast_micro(x, "0 h 1 nearest swizzled")),
    (ops.fused_cast_micro, "nvfp4 stochastic", lambda x: _cast_micro(x, "0 n 1 draw0 swizzled")),
    (
        ops.fused_cast_micro,
        "nvfp4 hadamard stochastic",
        lambda x: _cast_micro(x, "0 h 1 draw1 swizzled"),
    ),
)


def _norm_row(x: Tensor, w: Tensor) -> Any:
    return ops.quantize_fp8_row.op(F.rms_norm(x, w.shape, w), E4M3, True)


def _norm_block(x: Tensor, w: Tensor) -> Any:
    return ops.quantize_fp8_block.op(F.rms_norm(x, w.shape, w), E4M3, True)


def _silu_row(gate: Tensor, up: Tensor) -> Any:
    return ops.quantize_fp8_row.op(F.silu(gate) * up, E4M3, True)


def _silu_amax(gate: Tensor, up: Tensor) -> Any:
    h = F.silu(gate) * up
    return h, ops.amax_tensor.op(h)


def _silu_backward_row(dh: Tensor, gate: Tensor, up: Tensor) -> Any:
    """The gradients of gate and up, narrowed for dgrad."""
    half = torch.sigmoid(gate.float())
    dgate = (dh.float() * up * half * (1 + gate.float() * (1 - half))).to(dh.dtype)
    dup = (dh.float() * gate * half).to(dh.dtype)
    quantize = ops.quantize_fp8_row.op
    return *quantize(dgate, E4M3, True), *quantize(dup, E4M3, True)


# (function, what it reads, how many of it, whether a vector [C] comes last): compiled by Inductor
# with our lowerings; one kernel each where they fuse.
COMPILED: tuple[tuple[Callable[..., Any], str, int, bool], ...] = (
    (_norm_row, "x", 1, True),
    (_norm_block, "x", 1, True),
    (_silu_row, "h", 2, False),
    (_silu_amax, "h", 2, False),
    (_silu_backward_row, "h", 3, False),
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


def measure(
    models: Sequence[Llama], device: torch.device, repeats: int, *, compiled: bool
) -> tuple[list[Row], float]:
    """One row an op and shape, and the bytes/s of a copy. The ops of one shape are interleaved."""
    copy = copy_bandwidth(device, repeats, 2**30 if device.type == "cuda" else 2**22)
    torch._dynamo.reset()
    rows = []
    everything = [(f"{model.name} {s.what}", s) for model in models for s in shapes(model)]
    if device.type == "cuda":
        everything += [(shape.what, shape) for shape in OF_EXPERTS]
    for of, shape in everything:
        functions, read, written = {}, {}, {}
        for name, function, inputs in _functions(shape, device, compiled):
            functions[name], read[name] = function, _bytes(inputs)
            written[name] = _bytes(function())
        for name, timing in interleave(functions, device, repeats, written).items():
            bandwidth = (read[name] + written[name]) / (timing.ms * 1e-3)
            rows.append(
                {
                    "kernel": name,
                    "of": of,
                    "R": shape.R,
                    "C": shape.C,
                    "us": timing.ms * 1e3,
                    "TB/s": bandwidth / 1e12,
                    "share": bandwidth / copy,
                }
            )
    order = {name: i for i, name in enumerate(dict.fromkeys(row["kernel"] for row in rows))}
    return sorted(rows, key=lambda row: order[row["kernel"]]), copy


def _functions(
    shape: Shape, device: torch.device, compiled: bool
) -> Iterator[tuple[str, Callable[[], Any], tuple[Any, ...]]]:
    """(name, what to time, its inputs) for everything that runs on a tensor of this shape."""

    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16)

    x = randn(shape.R, shape.C)
    for module, arguments in KERNELS.items():
        given = arguments(x)
        yield name_of(module), partial(module.op, *given), given
    for module, what, arguments in MORE:
        given = arguments(x)
        yield f"{name_of(module)} ({what})", partial(module.op, *given), given
    for function, reads, num_inputs, has_vector in COMPILED if compiled else ():
        if reads != shape.what:
            continue
        given = (x, *(randn(shape.R, shape.C) for _ in range(num_inputs - 1)))
        given += (randn(shape.C),) if has_vector else ()
        fast = torch.compile(function, fullgraph=True, dynamic=False)
        name = function.__name__.strip("_") + " (compiled)"
        yield name, partial(fast, *given), given


def name_of(module: Any) -> str:
    """The op's name."""
    return module.__name__.rpartition(".")[2]


def _bytes(tensors: Any) -> int:
    """Bytes of every tensor in what an op takes or makes."""
    flat = tree_leaves(tensors)
    return sum(t.numel() * t.element_size() for t in flat if isinstance(t, Tensor))
