"""Rewrite the GEMMs of bf16 linears: mm(a, b) becomes scaled_mm(quantize(a), quantize(b.T)).

Runs on AOTAutograd's joint graph, before the partitioner, so that what is quantized in the forward
can be saved so. Pre-grad rewriting was tried and lost: it meets 11 spellings of a linear, breaks a
user's selective checkpointing and fails under DTensor. Post-grad cannot change what is saved.

Where the new nodes run:

- The weight is quantized in the forward for fprop and again in the backward for dgrad, never
  saved: the one is to be recomputed where the backward wants it too, the other is
  ``must_be_in_backward``, and the cast of a master weight is recomputed.
- X for wgrad is quantized in the backward where the backward holds what X is made of anyway, and in
  a checkpointed region, from what the user's policy gives there. Elsewhere it is left to the
  partitioner, which saves the narrow copy because it is smaller.
"""

from collections.abc import Callable, Container
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from lpcompile import gemm
from lpcompile.graph import (
    BACKWARD,
    CASTS,
    TRANSPOSES,
    VIEWS,
    Flow,
    aten,
    call,
    emit,
    meta_of,
    peel,
    replace,
    shape,
    users_through,
    value,
)
from lpcompile.liveness import Held, is_cheap
from lpcompile.recipes import Gemm
from lpcompile.select import Choice
from lpcompile.sites import Site, operands


def rewrite(choices: list[tuple[Site, Choice]], flow: Flow) -> int:
    """Rewrite every site that has a Gemm, and return how many."""
    chosen = [(site, choice.gemm) for site, choice in choices if choice.gemm is not None]
    held = Held(flow, (site.node for site, _ in chosen))
    late = {
        site.node
        for site, _ in chosen
        if site.product == "wgrad"
        and (_is_checkpointed(site) or (site.rhs if site.lhs_is_first else site.lhs) in held)
    }
    seed = _seed(chosen)
    draws: dict[fx.Node, int] = {}
    for site, how in chosen:
        # Two draws a linear, for its dgrad and its wgrad, as lpcompile.linear has them.
        linear = draws.setdefault((site.forward or site).node, len(draws))
        draw = 2 * linear + (site.product == "wgrad")
        _rewrite(site, how, site.node in late, partial(gemm.quantize, draw=draw), seed)
    return len(chosen)


def _seed(chosen: list[tuple[Site, Gemm]]) -> fx.Node | None:
    """One seed for the stochastic roundings of a graph, drawn in each backward, or None."""
    first = next((s.node for s, how in chosen if how.lhs.rounding == "stochastic"), None)
    if first is None:
        return None
    made = value(first)
    fake_mode: Any = made.fake_mode  # type: ignore[attr-defined]
    with first.graph.inserting_before(first):
        seed = call(
            first.graph,
            fake_mode,
            aten.randint.default,
            gemm.HIGHEST_SEED,
            [1],
            dtype=torch.int64,
            device=made.device,
        )
    seed.meta.update(meta_of(first, partitioner_tag=BACKWARD))
    return seed


def _is_checkpointed(site: Site) -> bool:
    return site.forward is not None and "recompute" in site.forward.node.meta


def _rewrite(
    site: Site, how: Gemm, late: bool, quantize: Callable[..., Any], seed: fx.Node | None
) -> None:
    node = site.node
    out_dtype, cast = _out_dtype(site)
    roles = (how.lhs, how.rhs) if site.lhs_is_first else (how.rhs, how.lhs)
    quantized = []
    # Read from the node: an earlier rewrite may have replaced what the site was found with.
    for side, (operand, how_operand) in enumerate(zip(operands(node), roles, strict=True)):
        is_second = (side == 1) == site.lhs_is_first  # W, W and X in fprop, dgrad and wgrad
        meta = _quantize_meta(site, operand, is_second, late)
        x, transposed = peel(_matrix(node, operand))
        how_quantize = partial(quantize, operand=how_operand, transpose=transposed != (side == 1))
        given = (x, seed) if how_operand.rounding == "stochastic" else (x,)
        quantized.append(emit(node, partial(_with_seed, how_quantize), *given, meta=meta))
    multiply = partial(
        gemm.multiply,
        out_dtype=out_dtype,
        fast_accum=how.fast_accum,
        swizzled=how.lhs.fmt.swizzled,
    )
    made = emit(node, multiply, *quantized, meta=meta_of(node))
    if node.target is aten.addmm.default:
        made = emit(node, aten.add.Tensor, made, node.args[0], meta=meta_of(node))
    if node.target is aten.bmm.default:
        made = emit(node, aten.unsqueeze.default, made, 0, meta=meta_of(node))
    replace(node, made)
    if cast is not None:
        _fold(cast, made)


def _with_seed(quantize: Callable[..., Any], x: Any, seed: Any = None) -> Any:
    return quantize(x, seed=seed)


def _matrix(before: fx.Node, operand: fx.Node) -> fx.Node:
    """A 2-d operand: itself, or the one matrix of a batch of 1."""
    if len(shape(operand)) == 2:
        return operand
    return emit(before, aten.squeeze.dim, operand, 0, meta=meta_of(operand))


def _quantize_meta(site: Site, operand: fx.Node, is_second: bool, late: bool) -> dict[str, Any]:
    """The meta of an operand's quantize: when it runs, and that no policy for mm saves it."""
    meta = meta_of(site.node)
    if is_second and site.product == "dgrad":
        _recompute(operand, VIEWS | TRANSPOSES | CASTS)  # no copy of a master weight is saved
    elif is_second and late and not _is_checkpointed(site):
        _recompute(operand, VIEWS | TRANSPOSES)
    if is_second and (site.product == "dgrad" or late):
        meta["partitioner_tag"] = BACKWARD
    if "recompute" in meta:
        meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    if is_second and site.product == "fprop":
        # The backward wants W narrowed so too where it makes Y again (under a memory budget), and
        # where a linear has W the other way round: AOT's CSE makes one quantize of the two.
        meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    return meta


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


def _out_dtype(site: Site) -> tuple[torch.dtype, fx.Node | None]:
    """bf16; or, for a wgrad that is read by one cast to fp32 alone, fp32 and that cast."""
    node = site.node
    users = list(users_through(node, TRANSPOSES))
    if site.product == "wgrad" and len(users) == 1:
        (user,) = users
        if user.target in CASTS and value(user).dtype is torch.float32 and _only_path(node):
            return torch.float32, user
    return value(node).dtype, None


def _only_path(node: fx.Node) -> bool:
    while len(node.users) == 1:
        (node,) = node.users
        if node.target in CASTS:
            return True
    return False


def _fold(cast: fx.Node, made: fx.Node) -> None:
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
