"""Make one grouped GEMM of the linears of a Python loop over experts: x[a:b] @ w[e], for every e.

    for a, b, e in ...:  torch.cat([f(x[a:b], w[e]), ...])    ->    f(x, grouped by offs, w)

All that the experts do to their own rows is done to all rows at once (``lpcompile.lanes``), so that
nothing is cut or put together between the products of an expert. Their gradients, scattered into
that of a stack of weights and added, are the grouped product itself. What is left of an expert's
own reads its rows of the whole.

Runs before all other passes, which see ``aten._grouped_mm`` as if the model had called it. Loops
that stay as they are, whose linears are narrowed one by one, have the reason in the report: slices
that are not known to tile the rows, work that is not the same for every expert, or rules that are
not; and separate weights, which must be copied into a stack, where that costs more than it gains.
"""

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lpcompile import cost
from lpcompile.graph import aten, hint, shape, value
from lpcompile.lanes import Family, Lanes, Loop
from lpcompile.lift import Lift, common_stack, is_product, weights_of
from lpcompile.recipes import Gemm, get_recipe
from lpcompile.select import Selection
from lpcompile.sites import Site

ALIGN = 8  # elements of bf16 in the 16 bytes that ``aten._grouped_mm`` wants rows to start at
# Where the work of one expert ends.
JOINS = {aten.cat.default, aten.slice_scatter.default, aten.select_scatter.default}


Notes = dict[fx.Node, str]  # by product, what the report is to say of its loop


def run(
    graph: fx.Graph, lanes: Lanes, sites: list[Site], selection: Selection, notes: Notes
) -> int:
    """Group the loops that are to be narrowed grouped, and return how many products they have."""
    known = {site.node: site for site in sites}
    grouped: set[Loop] = set()
    for loop in dict.fromkeys(family.loop for family in lanes.families):
        families = (f for f in lanes.families if f.loop is loop and is_product(f))
        products = [f for f in families if all(node in known for node in f.nodes)]
        if not any(_is_of_experts(family, lanes) for family in products):
            continue
        left = _obstacle(products, lanes, known, selection)
        if left:
            alone = f"one of {loop.num_lanes} experts in a loop: {left}"
            notes |= {node: alone for family in products for node in family.nodes}
        else:
            grouped.add(loop)
    _note_others(graph, lanes, sites, notes)
    lift = Lift(graph, lanes)
    for family in lanes.families:
        if family.loop in grouped:
            lift.add(family)
    for family, node in lift.products.items():
        copied = weights_of(family) and common_stack(weights_of(family), lanes) is None
        stacked = ", their weights copied into a stack" if copied else ""
        notes[node] = f"{family.loop.num_lanes} experts of a loop{stacked}"
    if lift.products:
        lift.finish()
    return len(lift.products)


def _obstacle(
    products: list[Family], lanes: Lanes, known: dict[fx.Node, Site], selection: Selection
) -> str:
    """Why the linears of a loop stay what they are, or nothing."""
    bases = {f.base for f in lanes.families if f.loop is products[0].loop and f.base is not None}
    if not all(len(shape(base)) != 2 or _is_readable(base) for base in bases):
        return "its rows do not start at multiples of 16 bytes"
    inside = {node for family in products for node in family.nodes}
    for site in known.values():
        if site.forward is not None and (site.node in inside) != (site.forward.node in inside):
            return "its gradients are not computed alike for all of them"
    gemms: list[tuple[Family, Site, Gemm | None]] = []
    reason = ""
    for family in products:
        own = [known[n] for n in family.nodes]
        first = own[0]
        role = first.product, first.lhs_is_first
        if not all(s.is_linear and (s.product, s.lhs_is_first) == role for s in own):
            return "its products are not linears of one kind"
        if not selection.is_alike(own):
            return "rules give the others other recipes"
        if any(value(s.node).dtype is not torch.bfloat16 for s in own):
            return "its operands are not bf16"
        if any(not isinstance(size, int) or size % ALIGN for size in (first.n, first.k)):
            return f"n={first.n} and k={first.k} are not multiples of {ALIGN}"
        if weights_of(family) and not _is_of_experts(family, lanes):
            return "they share a weight"
        choice = selection.choose(_grouped(family, first))
        gemms.append((family, first, choice.gemm))
        reason = reason or ("" if choice.gemm else choice.reason)
    if not any(gemm for _, _, gemm in gemms):
        return f"grouped, {reason}"
    lost = _lost(gemms, lanes, selection)
    if lost > 0:
        return f"copying their weights into a stack takes {lost:.0f} us more than grouping gains"
    return ""


def _is_readable(x: fx.Node) -> bool:
    """Whether ``aten._grouped_mm`` takes a matrix as it lies in memory."""
    last, other = sorted(value(x).stride(), key=lambda s: s != 1)
    return isinstance(other, int) and last == 1 and other % ALIGN == 0


def _is_of_experts(family: Family, lanes: Lanes) -> bool:
    """Whether a family multiplies the rows of every lane by a weight of its own."""
    return len({lanes.same.get(w, w) for w in weights_of(family)}) == family.loop.num_lanes


def _grouped(family: Family, first: Site) -> Site:
    """The product of all experts, as it would be found."""
    num = family.loop.num_lanes
    return replace(first, grouping="ragged", num_groups=num, m=hint(family.loop.rows))


def _lost(
    gemms: list[tuple[Family, Site, Gemm | None]], lanes: Lanes, selection: Selection
) -> float:
    """Microseconds that a stack of separate weights costs beyond what grouping gains."""
    options = selection.options
    device = cost.get_device(options.target_of(get_recipe(options.recipe)))
    copies = gain = 0.0
    for family, first, gemm in gemms:
        m, n, k, num = hint(family.loop.rows), first.n, first.k, family.loop.num_lanes
        if m is None or n is None or k is None:
            return 0.0
        if weights_of(family) and common_stack(weights_of(family), lanes) is None:
            copies += cost.LAUNCH_US + 4 * num * n * k / device.bandwidth * 1e6
        if gemm is not None:
            alone = cost.gain(first.product, gemm, max(1, m // num), n, k, device)
            together = cost.gain(first.product, gemm, m, n, k, device, num_groups=num)
            gain += num * alone.lowprec_us - together.lowprec_us
    return copies - gain if copies else 0.0


def _note_others(graph: fx.Graph, lanes: Lanes, sites: list[Site], notes: Notes) -> None:
    """Say why of the linears that read slices of rows, each with a weight of its own."""
    origins: dict[fx.Node, tuple[Any, ...]] = {
        piece: (piece.args[0], piece, why) for piece, why in lanes.untiled.items()
    }
    for node, (family, lane) in lanes.at.items():
        if family.base is not None:
            origins[node] = (family.base, lane, "")
    for node in graph.nodes:  # what is computed from a slice is of that slice
        of = next((origins[i] for i in node.all_input_nodes if i in origins), None)
        if of is not None and node.op == "call_function" and node.target not in JOINS:
            origins.setdefault(node, of)
    readers: dict[fx.Node, set[Any]] = defaultdict(set)  # of a weight: the slices that it is for
    found: list[tuple[Site, fx.Node, tuple[Any, ...]]] = []
    for site in sites:
        if site.product == "fprop" and site.weight is not None and site.node in origins:
            weight = lanes.same.get(site.weight, site.weight)
            readers[weight].add(origins[site.node][:2])
            found.append((site, weight, origins[site.node]))
    found = [f for f in found if len(readers[f[1]]) == 1]
    places = Counter(base for base, _ in {of[:2] for _, _, of in found})
    for site, _, (base, _, why) in found:
        if places[base] > 1 and site.node not in lanes.at:
            notes[site.node] = f"one of a loop's experts: {why or 'not all of them compute it'}"
