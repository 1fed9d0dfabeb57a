"""The random numbers of a pass: one seed for its stochastic roundings, and which draw each reads.

Two draws a linear, for its dgrad and its wgrad, as ``lpcompile.linear`` and ``grouped_mm`` have
them. The seed is drawn in each backward; its rounding is that of a recompute.
"""

from collections.abc import Iterator

import torch
from torch import fx

from lpcompile import gemm
from lpcompile.graph import BACKWARD, aten, call, meta_of, value
from lpcompile.recipes import Gemm
from lpcompile.sites import Site


def numbered(chosen: list[tuple[Site, Gemm]]) -> Iterator[tuple[Site, Gemm, int]]:
    """Every site that is rewritten, how, and the draw that its gradient would take."""
    first: dict[fx.Node, int] = {}
    for site, how in chosen:
        linear = first.setdefault((site.forward or site).node, len(first))
        yield site, how, 2 * linear + (site.product == "wgrad")


def seed(chosen: list[tuple[Site, Gemm]]) -> fx.Node | None:
    """A seed[1] in front of the first GEMM that is rounded stochastically, or None."""
    first = next((s.node for s, how in chosen if how.lhs.rounding == "stochastic"), None)
    if first is None:
        return None
    kind = {"dtype": torch.int64, "device": value(first).device}
    with first.graph.inserting_before(first):
        node = call(first.graph, aten.randint.default, gemm.HIGHEST_SEED, [1], **kind)
    node.meta.update(meta_of(first, partitioner_tag=BACKWARD))
    return node
