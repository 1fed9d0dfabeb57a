"""Rewrite the GEMMs of bf16 linears: mm(a, b) becomes scaled_mm(quantize(a), quantize(b.T)).

Runs on AOTAutograd's joint graph, before the partitioner, so that what is quantized in the forward
can be saved so. Pre-grad rewriting was tried and lost: it meets 11 spellings of a linear, breaks a
user's selective checkpointing and fails under DTensor. Post-grad cannot change what is saved.

Where the new nodes run: ``lpcompile.placement``.
"""

from collections.abc import Container
from typing import Any

from torch import fx

from lpcompile import draws, gemm, placement
from lpcompile.graph import aten, emit, meta_of, peel, replace, shape
from lpcompile.recipes import Gemm
from lpcompile.select import Choice
from lpcompile.sites import ADDING, Site, operands


def rewrite(choices: list[tuple[Site, Choice]], late: Container[fx.Node]) -> int:
    """Rewrite every linear that has a Gemm, and return how many.

    late: wgrads whose X is quantized in the backward.
    """
    chosen = [(s, c.gemm) for s, c in choices if c.gemm is not None and not s.grouping]
    seed = draws.seed(chosen)
    for site, how, draw in draws.numbered(chosen):
        _rewrite(site, how, site.node in late, seed=seed, draw=draw)
    return len(chosen)


def _rewrite(site: Site, how: Gemm, late: bool, **drawn: Any) -> None:
    node = site.node
    out_dtype, cast = placement.out_dtype(site)
    roles = (how.lhs, how.rhs) if site.lhs_is_first else (how.rhs, how.lhs)
    quantized = []
    # Read from the node: an earlier rewrite may have replaced what the site was found with.
    for side, (operand, how_operand) in enumerate(zip(operands(node), roles, strict=True)):
        is_second = (side == 1) == site.lhs_is_first  # W, W and X in fprop, dgrad and wgrad
        meta = placement.quantize_meta(site, operand, is_second, late)
        x, transposed = peel(_matrix(node, operand))
        turned = transposed != (side == 1)
        made = emit(node, gemm.quantize, x, how_operand, transpose=turned, **drawn, meta=meta)
        if is_second:
            placement.keep_amax(site, made.values)
        quantized.append(made)
    product = emit(
        node,
        gemm.multiply,
        *quantized,
        out_dtype=out_dtype,
        fast_accum=how.fast_accum,
        swizzled=how.lhs.fmt.swizzled,
        meta=meta_of(node),
    )
    if len(shape(node)) == 3:  # a batch of one
        product = emit(node, aten.unsqueeze.default, product, 0, meta=meta_of(node))
    if node.target in ADDING:
        product = emit(node, aten.add.Tensor, product, node.args[0], meta=meta_of(node))
    replace(node, product)
    if cast is not None:
        placement.fold(cast, product)


def _matrix(before: fx.Node, operand: fx.Node) -> fx.Node:
    """A 2-d operand: itself, or the one matrix of a batch of 1."""
    if len(shape(operand)) == 2:
        return operand
    return emit(before, aten.squeeze.dim, operand, 0, meta=meta_of(operand))
