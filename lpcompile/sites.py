"""The GEMMs of a joint graph, each with its role in a linear: fprop, dgrad, wgrad, or none.

The gradient operand is the one that depends on a tangent. The weight is the operand that depends
on no graph input but parameters and buffers, so that weight norm and merged adapters count.
Identity tells dgrad from wgrad: the other operand is the forward's w, or its x. "The left operand
is a permute" would mislabel a transposed output.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import fx

from lpcompile.graph import Flow, aten, base, hint, module_path, shape, value
from lpcompile.recipes import Product

MATMULS: dict[Any, int] = {
    aten.mm.default: 0,
    aten.addmm.default: 1,
    aten.bmm.default: 0,
}  # first operand


@dataclass
class Site:
    """One GEMM, ``lhs[.., R, C] @ rhs[.., C, S]``, and what it is of its linear.

    lhs_is_first: the operand that the recipe's Gemm calls lhs (X, dY, dY) is this one's lhs; not
        so in a GEMM that computes a transposed product.
    weight: the operand that is the weight, in fprop and dgrad.
    m, n, k: of the linear, the same in its three products; None where unbacked.
    obstacle: why it is no GEMM of a linear, or cannot be narrowed; empty otherwise.
    """

    node: fx.Node
    product: Product
    lhs: fx.Node
    rhs: fx.Node
    module: str
    m: int | None
    n: int | None
    k: int | None
    lhs_is_first: bool = True
    weight: fx.Node | None = None
    forward: "Site | None" = None
    num_groups: int = 1
    is_linear: bool = True
    obstacle: str = ""


def find(graph: fx.Graph, flow: Flow) -> list[Site]:
    """Every mm, addmm and bmm of a joint (or inference) graph, in graph order."""
    nodes = [n for n in graph.nodes if n.op == "call_function" and n.target in MATMULS]
    forward = [_forward(n, flow) for n in nodes if n not in flow.gradients]
    partners: dict[Any, list[Site]] = defaultdict(list)
    for site in forward:
        if site.is_linear and "seq_nr" in site.node.meta:
            partners[site.node.meta["seq_nr"]].append(site)
    backward = [_backward(n, flow, partners, forward) for n in nodes if n in flow.gradients]
    order = {n: i for i, n in enumerate(nodes)}
    return sorted(forward + backward, key=lambda s: order[s.node])


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two matrices that a product multiplies, as they are now."""
    args: Any = node.args
    first = MATMULS[node.target]
    return args[first], args[first + 1]


def _sizes(lhs: fx.Node, rhs: fx.Node) -> tuple[int | None, int | None, int | None]:
    """R, C and S of lhs[R, C] @ rhs[C, S]."""
    return hint(shape(lhs)[-2]), hint(shape(lhs)[-1]), hint(shape(rhs)[-1])


def _forward(node: fx.Node, flow: Flow) -> Site:
    lhs, rhs = operands(node)
    r, c, s = _sizes(lhs, rhs)
    site = Site(node, "fprop", lhs, rhs, module_path(node), m=r, n=s, k=c)
    of_weights = lhs in flow.weights, rhs in flow.weights
    if of_weights == (True, True):
        site.is_linear, site.obstacle = False, "a product of two weights"
    elif of_weights == (False, False):
        site.is_linear, site.obstacle = False, "a product of two activations"
    elif of_weights[0]:  # a transposed product: W[N, K] @ X.T
        site.lhs_is_first, site.weight, site.m, site.n = False, lhs, s, r
    else:
        site.weight = rhs
    site.obstacle = site.obstacle or _form(node)
    return site


def _backward(
    node: fx.Node, flow: Flow, partners: dict[Any, list[Site]], forward: list[Site]
) -> Site:
    lhs, rhs = operands(node)
    gradients = lhs in flow.gradients, rhs in flow.gradients
    site = Site(node, "dgrad", lhs, rhs, module_path(node), *_mnk_unknown(lhs, rhs))
    if gradients == (True, True):
        site.is_linear, site.obstacle = False, "a product of two gradients"
        return site
    site.lhs_is_first = gradients[0]
    other = rhs if gradients[0] else lhs
    partner = _partner(node, other, partners, forward)
    if partner is None:
        site.is_linear, site.obstacle = False, "a product of two activations"
        return site
    site.forward, site.module = partner, partner.module or site.module
    site.m, site.n, site.k = partner.m, partner.n, partner.k
    if _same(other, partner.weight):
        site.weight = other
    else:
        site.product = "wgrad"
    site.obstacle = _form(node)
    return site


def _mnk_unknown(lhs: fx.Node, rhs: fx.Node) -> tuple[int | None, int | None, int | None]:
    r, c, s = _sizes(lhs, rhs)
    return r, s, c


def _partner(
    node: fx.Node, other: fx.Node, partners: dict[Any, list[Site]], forward: list[Site]
) -> Site | None:
    """The forward GEMM of the same linear: by ``seq_nr``, else by identity of the operand.

    Inside a user's autograd.Function the backward GEMMs have the seq_nr of the Function, which no
    forward GEMM need share.
    """
    for site in partners.get(node.meta.get("seq_nr"), ()):
        if _same(other, site.lhs) or _same(other, site.rhs):
            return site
    linears = [s for s in forward if s.is_linear]
    by_weight = next((s for s in linears if _same(other, s.weight)), None)
    return by_weight or next(
        (s for s in linears if _same(other, s.lhs) or _same(other, s.rhs)), None
    )


def _same(a: fx.Node, b: fx.Node | None) -> bool:
    return b is not None and base(a) is base(b)


def _form(node: fx.Node) -> str:
    """Why the call itself cannot be narrowed, or nothing."""
    if node.target is aten.bmm.default and hint(shape(node)[0]) != 1:
        return "a batched product: only a batch of 1 is a linear"
    scaled = {k: v for k, v in node.kwargs.items() if k in ("alpha", "beta") and v != 1}
    if scaled:
        return f"addmm with {', '.join(f'{k}={v}' for k, v in scaled.items())}"
    if not value(node).dtype.is_floating_point:
        return f"of {value(node).dtype}"
    return ""
