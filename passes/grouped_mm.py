"""Rewrite the GEMMs of experts: _grouped_mm(x, w, offs) becomes scaled_grouped_mm(quantized, ...).

    2d x 3d    tokens, whose rows belong to group after group, by a weight each: fprop, dgrad
    2d x 2d    over the rows of each group: wgrad
    3d x 3d    matrix by matrix, as bmm: any product of experts with as many tokens each

The quantize for wgrad lays groups out at multiples of what the GEMM reads, on the device; where
they lie comes with the gradient's copy, since X's may be made in the forward. Where the new nodes
run: ``lpcompile.placement``.
"""

from collections.abc import Callable, Container
from functools import partial
from typing import Any

from torch import fx

from lpcompile import draws, gemm, gemm_grouped, placement
from lpcompile.graph import aten, emit, meta_of, peel, replace
from lpcompile.recipes import Gemm, Operand
from lpcompile.select import Choice
from lpcompile.sites import ADDING, Site, operands


def rewrite(choices: list[tuple[Site, Choice]], late: Container[fx.Node]) -> int:
    """Rewrite every grouped product that has a Gemm, and return how many.

    late: wgrads whose X is quantized in the backward.
    """
    chosen = [(s, c.gemm) for s, c in choices if c.gemm is not None and s.grouping]
    seed = draws.seed(chosen)
    for site, how, draw in draws.numbered(chosen):
        _rewrite(site, how, partial(_quantize, site, site.node in late, draw, seed))
    return len(chosen)


def _rewrite(site: Site, how: Gemm, quantize: Callable[..., Any]) -> None:
    node = site.node
    out_dtype, cast = placement.out_dtype(site)
    roles = (how.lhs, how.rhs) if site.lhs_is_first else (how.rhs, how.lhs)
    made = [quantize(side, operand) for side, operand in enumerate(roles)]
    sides = [quantized for quantized, _ in made]
    _, offs = made[0 if site.lhs_is_first else 1]
    weight_is_first = site.product != "wgrad" and not site.lhs_is_first
    if weight_is_first:  # blocks of 128x128 are for second operands, so the product is transposed
        sides.reverse()
    out = emit(
        node,
        gemm_grouped.multiply_grouped,
        *sides,
        offs,
        out_dtype=out_dtype,
        fast_accum=how.fast_accum,
        meta=meta_of(node),
    )
    if weight_is_first:
        out = emit(node, aten.permute.default, out, [0, 2, 1], meta=meta_of(node))
    if node.target in ADDING:
        out = emit(node, aten.add.Tensor, out, node.args[0], meta=meta_of(node))
    replace(node, out)
    if cast is not None:
        placement.fold(cast, out)


def _quantize(
    site: Site, late: bool, draw: int, seed: fx.Node | None, side: int, how: Operand
) -> tuple[Any, fx.Node | None]:
    """One operand, narrowed, with the contraction last; and where its groups of rows end."""
    node, operand = site.node, operands(site.node)[side]
    is_second = (side == 1) == site.lhs_is_first  # W, W and X in fprop, dgrad and wgrad
    meta = placement.quantize_meta(site, operand, is_second, late)
    x, transposed = peel(operand)
    given: dict[str, Any] = {"seed": seed, "draw": draw, "meta": meta}
    ends = site.offs
    if site.grouping == "batch" or (is_second and site.product != "wgrad"):
        turned = transposed != (side == 1)
        quantized = emit(node, gemm.quantize, x, how, transpose=turned, **given)
    elif site.product != "wgrad":
        quantized = emit(node, gemm_grouped.quantize_tokens, operand, how, ends, **given)
    else:
        if side == 1:
            x = operand  # [T, C] as it is
        elif not transposed:
            x = emit(node, aten.permute.default, operand, [1, 0], meta=meta)
        quantized, ends = emit(node, gemm_grouped.quantize_groups_t, x, how, ends, **given)
    if is_second:
        placement.keep_amax(site, quantized.values)
    return quantized, ends
