"""Multiply bf16 operands group by group under the scales of their tensors:

    a[T, K],  b[E, N, K], offs[E] -> [T, N]     fprop, dgrad: the rows of group e with b[e]
    a[M, Tp], b[N, Tp],   offs[E] -> [E, M, N]  wgrad: the columns of group e of both

What ``scaled_grouped_mm`` does of MXFP8 and NVFP4 operands where it has dequantized them. Either
may lie in memory the other way round. An amax is its tensor's, [1] or one a group, [E] (of a[T, K]
where groups are of equal size): amax / 2688 goes to the fp32 accumulator. Rows of [T, N] past
offs[-1] are whatever they are; offs of wgrad are multiples of ``groups.ALIGN``. An addend, like the
result, is added to what was rounded.
"""

from typing import Any

import torch
from torch import Tensor

from lpcompile.ops import fp4, grouped_gemm, groups, wide_mm
from lpcompile.ops.define import ALIGN, define, per_column, round_up


def outputs(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    out_dtype: torch.dtype,
    a_amax: Tensor | None = None,
    b_amax: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    shape = (offs.shape[0], a.shape[0], b.shape[0]) if b.dim() == 2 else (a.shape[0], b.shape[1])
    return a.new_empty(shape, dtype=out_dtype)


def exact(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    out_dtype: torch.dtype,
    a_amax: Tensor | None = None,
    b_amax: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """The product in fp64, which every implementation must meet."""
    return _by_groups(wide_mm.exact, a, b, offs, torch.float64, (a_amax, b_amax), addend)


def reference(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    out_dtype: torch.dtype,
    a_amax: Tensor | None = None,
    b_amax: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    return _by_groups(wide_mm.reference, a, b, offs, out_dtype, (a_amax, b_amax), addend)


def _by_groups(
    multiply: Any, a: Tensor, b: Tensor, offs: Tensor, dtype: Any, amaxes: Any, addend: Any
) -> Tensor:
    """Every group through ``multiply``, a GEMM of two matrices; zeros past the last group."""
    made = outputs(a, b, offs, dtype).zero_()
    for e, group in enumerate(groups.slices(offs)):
        along_k = b.dim() == 2
        operands = (a[:, group], b[:, group]) if along_k else (a[group], b[e])
        scales = (x if x is None or x.numel() == 1 else x[e : e + 1] for x in amaxes)
        made[e if along_k else group] = multiply(*operands, dtype, *scales)
    return made if addend is None else made + addend


def launch(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    out_dtype: torch.dtype,
    a_amax: Tensor | None = None,
    b_amax: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    made = outputs(a, b, offs, out_dtype)
    if not (a.shape[0] and b.shape[-2]):
        return made
    if addend is not None:
        addend = addend.reshape(made.shape).contiguous()
    E, along_k = offs.shape[0], b.dim() == 2
    of_a, of_b = _by_row(a, a_amax, E, along_k), _by_row(b, b_amax, E, along_k)
    if not grouped_gemm.suits_warpgroups(a, of_a, b, of_b):
        a, b = _padded(a), _padded(b)
    grouped_gemm.fill(a, of_a, b, of_b, offs, made, fast_accum=True, addend=addend)
    return made


def _padded(x: Tensor) -> Tensor:
    """x[..., K] with K last in memory, and padded with zeros to whole vectors."""
    K = x.shape[-1]
    return torch.nn.functional.pad(x, (0, round_up(K, ALIGN) - K)).contiguous()


def _by_row(x: Tensor, amax: Tensor | None, num_groups: int, along_k: bool) -> Tensor:
    """The scales of an operand's tensors as ``grouped_gemm`` reads them: one, [E], or of rows."""
    if amax is None:
        return torch.ones(1 if x.dim() == 2 else num_groups, device=x.device)
    scale = fp4.tensor_decode(amax)
    if x.dim() == 3:
        return scale.expand(num_groups).contiguous()
    if scale.numel() == 1:
        return scale
    rows = x.shape[0] if along_k else x.shape[0] // num_groups
    return scale[:, None].expand(num_groups, rows).flatten()


def _flops(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Of every row of a, as if none were past the last group."""
    return 2 * a[0] * a[1] * b[-2]


op = define(
    "wide_grouped_mm(Tensor a, Tensor b, Tensor offs, ScalarType out_dtype, Tensor? a_amax=None,"
    " Tensor? b_amax=None, Tensor? addend=None) -> Tensor",
    outputs=outputs,
    reference=reference,
    launch=launch,
    flops=_flops,
)
kernel = grouped_gemm.kernel
agrees = per_column(0.01)


def samples(device: str) -> list[tuple[Any, ...]]:
    """Both shapes of product, of operands that lie either way, with and without scales."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    bf16, one = torch.bfloat16, torch.rand(1, device=device) * 5000
    each = torch.rand(5, device=device) * 5000
    made: list[tuple[Any, ...]] = []
    for N, K in ((64, 256), (32, 192), (24, 200), (21, 203)):
        T, ends = 53, torch.tensor([0, 17, 17, 52, 53], device=device, dtype=torch.int32)
        x, w, w_t = randn(T, K), randn(5, N, K), randn(5, K, N).mT
        made += [(x, b, ends, bf16, *s) for b in (w, w_t) for s in ((None, None), (one, each))]
        padded = groups.padded_ends(ends, groups.ALIGN)
        Tp = groups.padded_length(T, 5, groups.ALIGN)
        dy, dy_t, x, x_t = randn(N, Tp), randn(Tp, N).t(), randn(K, Tp), randn(Tp, K).t()
        made += [(a, b, padded, bf16) for a in (dy, dy_t) for b in (x, x_t)]
        made.append((dy_t, x, padded, torch.float32, each, each * 2))
    x, w_t, total = randn(53, 256), randn(5, 256, 64).mT, randn(53, 64)
    return [*made, (x, w_t, ends, bf16, None, None, total)]
