"""Where the quantizes of a linear run, and in what dtype its weight's gradient is written.

- The weight is quantized in the forward for fprop and again in the backward for dgrad, never
  saved: the one is to be recomputed where the backward wants it too, the other is
  ``must_be_in_backward``, and the cast of a master weight is recomputed.
- X for wgrad is quantized in the backward where the backward holds what X is made of anyway, and in
  a checkpointed region, from what the user's policy gives there. Elsewhere it is left to the
  partitioner, which saves the narrow copy because it is smaller.
- Under one scale for all of X one read makes both of its copies. X in memory is narrowed both ways
  in the forward where weights' gradients are larger than those they are made of, and the backward
  holds most when it has made them: X.T lies beside them anyway.
- X of experts that is picked row by row from a smaller tensor is read from there
  (``lpcompile.passes.hoist``), so what counts is that tensor: held, or smaller than the copy.
"""

import operator
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from lpcompile import gathers, ops
from lpcompile.cones import RESHAPES
from lpcompile.flow import Flow
from lpcompile.graph import (
    BACKWARD,
    CASTS,
    TRANSPOSES,
    VIEWS,
    aten,
    fake_mode,
    is_own,
    meta_of,
    peel,
    shape,
    value,
)
from lpcompile.liveness import Held, is_cheap
from lpcompile.ops.fused_quantize_row import WIDEST_WITH_MAXIMA
from lpcompile.recipes import Gemm
from lpcompile.sites import MATMULS, Site


def late(sites: Sequence[tuple[Site, Gemm]], flow: Flow) -> set[fx.Node]:
    """The wgrads, of the sites that are to be narrowed so, whose X is quantized in the backward.

    To be asked before any of them is rewritten.
    """
    held = Held(flow, (site.node for site, _ in sites))
    of = {site.node: gemm for site, gemm in sites}
    return {
        site.node
        for site, gemm in sites
        if site.product == "wgrad"
        and (_is_checkpointed(site) or (_is_late(site, gemm, held) and not _is_read_once(site, of)))
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


def _is_read_once(site: Site, of: Mapping[fx.Node, Gemm]) -> bool:
    """Whether the forward narrows X both ways for this wgrad: see the top of this file."""
    fprop = site.forward and of.get(site.forward.node)
    x, _ = peel(site.rhs if site.lhs_is_first else site.lhs)
    if fprop is None or fprop.lhs != of[site.node].rhs or fprop.lhs.block != "tensor":
        return False
    if site.m is None or site.k is None or not _is_in_memory(x):
        return False
    return site.m < site.k * site.num_groups


def _is_checkpointed(site: Site) -> bool:
    return site.forward is not None and "recompute" in site.forward.node.meta


OF_COLUMNS = {ops.amax_column.op, ops.amax_column_grouped.op}
ATTENTION = {
    getattr(aten, f"_scaled_dot_product_{which}").default
    for which in ("cudnn_attention", "efficient_attention", "flash_attention")
} | {aten._scaled_dot_product_flash_attention_for_cpu.default}
IN_MEMORY = {*MATMULS, torch.ops._c10d_functional.wait_tensor.default}  # what they make


def quantize_meta(site: Site, operand: fx.Node, is_second: bool, late: bool) -> dict[str, Any]:
    """The meta of an operand's quantize: when it runs, and that no policy for mm saves it."""
    meta = meta_of(site.node)
    if is_second and site.product != "wgrad":
        # No copy of a master weight is saved. AOT's CSE makes one cast of several, the first, which
        # may be that of a linear without a dgrad.
        _recompute(operand, VIEWS | TRANSPOSES | CASTS)
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
    """Save the amax that the backward narrows an operand under, where the forward can take it.

    Of a tensor, that which the forward narrows it under. Of columns, where the forward narrows the
    same tensor by rows, and takes their maxima in that read (``lpcompile.passes.fuse_columns``).
    """
    for node in values.all_input_nodes[0].all_input_nodes:
        if node.target is ops.amax_tensor.op and site.product == "fprop":
            del node.meta["recompute"]
        elif node.target in OF_COLUMNS and (site.product == "dgrad" or not _is_checkpointed(site)):
            _take_in_forward(node)


def _take_in_forward(amax: fx.Node) -> None:
    """Move an amax to the forward's quantize of the same tensor by rows, and name it there.

    Were it not an argument there, min-cut would take it in the backward: it has the tensor.
    """
    x: fx.Node = amax.args[0]  # type: ignore[assignment]
    for user in x.users:
        forward = user.meta.get("partitioner_tag") != BACKWARD and not user.kwargs.get("columns")
        known = all(i < user for i in amax.all_input_nodes)  # where groups end may come later
        if user.target is ops.quantize_fp8_row.op and forward and known and _serves_both(x):
            user.prepend(amax)
            user.update_kwarg("columns", amax)
            amax.meta["partitioner_tag"] = user.meta.get("partitioner_tag")
            return


def _serves_both(x: fx.Node) -> bool:
    """Whether it pays that one kernel narrows x by rows and takes the maxima of its columns.

    Of what lies in memory. Of what Inductor or ``fuse`` makes as it is narrowed it was measured to
    lose (16384 tokens, one H200): after a norm 106 us where 45 and 41 us do, of SiLU*mul 86 us more
    where the backward, which reads gate and up for their gradients' maxima, takes 26 us more.
    """
    columns = shape(x)[-1]
    if not isinstance(columns, int) or columns > WIDEST_WITH_MAXIMA:
        return False
    return len(shape(x)) > 2 or _is_in_memory(x)  # a stack's quantize fuses with nothing


def _is_in_memory(x: fx.Node) -> bool:
    """Whether x is what a GEMM, attention or an op of ours made, or is given, and not pointwise."""
    while x.target in RESHAPES or x.target in TRANSPOSES:
        x = x.all_input_nodes[0]
    if x.target is operator.getitem and x.args[0].target in ATTENTION:  # type: ignore[union-attr]
        return True
    return x.op == "placeholder" or x.target in IN_MEMORY or is_own(x)


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
        with fake_mode(cast.graph):
            node.meta["val"] = node.target(  # type: ignore[operator]
                *torch.fx.node.map_arg(node.args, lambda n: n.meta["val"])
            )
    cast.replace_all_uses_with(node)
    cast.graph.erase_node(cast)
