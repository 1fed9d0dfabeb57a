"""Where the quantizes of a linear run, and in what dtype its weight's gradient is written.

- The weight is quantized in the forward for fprop and again in the backward for dgrad, never
  saved: the one is to be recomputed where the backward wants it too, the other is
  ``must_be_in_backward``, and the cast of a master weight is recomputed.
- X for wgrad is quantized in the backward where the backward holds what X is made of anyway, and in
  a checkpointed region, from what the user's policy gives there. Elsewhere it is left to the
  partitioner, which saves the narrow copy because it is smaller.
- X of experts that is picked row by row from a smaller tensor is read from there
  (``lpcompile.passes.hoist``), so what counts is that tensor: held, or smaller than the copy.
"""

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from lpcompile import gathers, ops
from lpcompile.flow import Flow
from lpcompile.graph import (
    BACKWARD,
    CASTS,
    TRANSPOSES,
    VIEWS,
    meta_of,
    peel,
    value,
)
from lpcompile.liveness import Held, is_cheap
from lpcompile.recipes import Gemm
from lpcompile.sites import Site


def late(sites: Sequence[tuple[Site, Gemm]], flow: Flow) -> set[fx.Node]:
    """The wgrads, of the sites that are to be narrowed so, whose X is quantized in the backward.

    To be asked before any of them is rewritten.
    """
    held = Held(flow, (site.node for site, _ in sites))
    return {
        site.node
        for site, gemm in sites
        if site.product == "wgrad" and (_is_checkpointed(site) or _is_late(site, gemm, held))
    }


def _is_late(site: Site, gemm: Gemm, held: Held) -> bool:
    x = site.rhs if site.lhs_is_first else site.lhs
    reads = site.grouping == "ragged" and gemm.rhs.fmt.scaling in gathers.SCALINGS
    gather = gathers.find(peel(x)[0]) if reads else None
    if gather is None or not all(reader in held.narrowed for reader in gather.readers()):
        return x in held
    few, many = gather.num_rows
    smaller = few is not None and many is not None and 2 * few <= many  # in bf16, than in 8 bits
    return smaller or gather.source in held


def _is_checkpointed(site: Site) -> bool:
    return site.forward is not None and "recompute" in site.forward.node.meta


def quantize_meta(site: Site, operand: fx.Node, is_second: bool, late: bool) -> dict[str, Any]:
    """The meta of an operand's quantize: when it runs, and that no policy for mm saves it."""
    meta = meta_of(site.node)
    if is_second and site.product == "dgrad":
        _recompute(operand, VIEWS | TRANSPOSES | CASTS)  # no copy of a master weight is saved
    elif is_second and late and not _is_checkpointed(site):
        gather = gathers.find(peel(operand)[0]) if site.grouping == "ragged" else None
        _recompute(operand if gather is None else gather.source, VIEWS | TRANSPOSES)
    if is_second and (site.product == "dgrad" or late):
        meta["partitioner_tag"] = BACKWARD
    if "recompute" in meta:
        meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    if is_second and site.product == "fprop":
        # The backward wants W narrowed so too where it makes Y again (under a memory budget), and
        # where a linear has W the other way round: AOT's CSE makes one quantize of the two.
        meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    return meta


def keep_amax(site: Site, values: fx.Node) -> None:
    """Save the amax of W, one number, that the quantize of W for the backward reads as well."""
    quantize = values.all_input_nodes[0]
    for node in quantize.all_input_nodes:
        if node.target is ops.amax_tensor.op and not _is_checkpointed(site):
            del node.meta["recompute"]


def _recompute(node: fx.Node, through: Container[Any]) -> None:
    """Have a node, and what is under it through ``through``, made again in the backward.

    Left alone, min-cut saves what an opaque op reads in the backward, since it must be materialized
    there (``ban_recompute_materialized_backward``, torch 2.11 to 2.13).
    """
    while node.op == "call_function" and is_cheap(node):
        node.meta.setdefault("recompute", CheckpointPolicy.MUST_RECOMPUTE)
        if node.target not in through:
            return
        node = node.all_input_nodes[0]


def out_dtype(site: Site) -> tuple[torch.dtype, fx.Node | None]:
    """bf16; or, for a wgrad that is read by one cast to fp32 alone, fp32 and that cast."""
    node = site.node
    while site.product == "wgrad" and len(node.users) == 1:
        (node,) = node.users
        if node.target in CASTS and value(node).dtype is torch.float32:
            return torch.float32, node
        if node.target not in TRANSPOSES:
            break
    return value(site.node).dtype, None


def fold(cast: fx.Node, made: fx.Node) -> None:
    """Drop a cast to what its input is now, with the fake values on the way made anew."""
    node = made
    while node is not cast.all_input_nodes[0]:
        (node,) = node.users
        with value(made).fake_mode:  # type: ignore[attr-defined]
            node.meta["val"] = node.target(  # type: ignore[operator]
                *torch.fx.node.map_arg(node.args, lambda n: n.meta["val"])
            )
    cast.replace_all_uses_with(node)
    cast.graph.erase_node(cast)
