"""The GEMMs of a joint graph, each with its role in a linear: fprop, dgrad, wgrad, or none.

The gradient operand is the one that depends on a tangent. The weight is the operand that depends
on no graph input but parameters and buffers, so that weight norm and merged adapters count.
Identity tells dgrad from wgrad: the other operand is the forward's w, or its x. "The left operand
is a permute" would mislabel a transposed output.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from lpcompile.flow import Flow, is_called
from lpcompile.graph import aten, base, calls, hint, module_path, placeholders, root, shape, value
from lpcompile.recipes import Product

ADDING = {aten.addmm.default, aten.baddbmm.default}  # their first argument to the product
MATMULS: dict[Any, int] = {
    aten.mm.default: 0,
    aten.addmm.default: 1,
    aten.bmm.default: 0,
    aten.baddbmm.default: 1,
    aten._grouped_mm.default: 0,
}  # first operand
# What torch's own modules call at inference.
WHOLE_LAYERS = {
    aten._transformer_encoder_layer_fwd.default,
    aten._native_multi_head_attention.default,
}
GATHERS = {aten.index.Tensor, aten.index_select.default, aten.gather.default}

# In the meta of a GEMM that was looked at: Inductor (torch 2.11 to 2.13) runs the joint passes on a
# nested region and once more on the forward and the backward that it is cut into.
SEEN = "lowprec_seen"


@dataclass
class Site:
    """One GEMM, ``lhs[.., R, C] @ rhs[.., C, S]``, and what it is of its linear.

    lhs_is_first: the operand that the recipe's Gemm calls lhs (X, dY, dY) is this one's lhs; not
        so in a GEMM that computes a transposed product.
    weight: the operand that is the weight, in fprop and dgrad.
    m, n, k: of the linear, the same in its three products; None where unbacked. m counts the tokens
        of all groups.
    grouping: "ragged" where the rows of group after group, as ``offs`` says, have a weight each;
        "batch" where matrices of as many rows have; empty for one weight.
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
    grouping: Literal["", "ragged", "batch"] = ""
    num_groups: int = 1
    offs: fx.Node | None = None
    is_linear: bool = True
    obstacle: str = ""


def find(graph: fx.Graph, flow: Flow) -> list[Site]:
    """Every product of a joint (or inference) graph, in graph order.

    Then what looks like a product inside an op, so that a report does not pass over it.
    """
    nodes = [n for n in calls(graph, MATMULS) if SEEN not in n.meta]
    forward = [_forward(n, flow) for n in nodes if n not in flow.gradients]
    partners: dict[Any, list[Site]] = defaultdict(list)
    for site in forward:
        if "seq_nr" in site.node.meta:
            partners[site.node.meta["seq_nr"]].append(site)
    backward = [_backward(n, flow, partners, forward) for n in nodes if n in flow.gradients]
    order = {n: i for i, n in enumerate(nodes)}
    others = [_of_others(n, flow) for n in graph.nodes if SEEN not in n.meta]
    ours = sorted(forward + backward, key=lambda s: order[s.node])
    return ours + [site for site in others if site is not None]


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
        site.is_linear, site.obstacle = False, OF_GUESSES if flow.guessed else WEIGHTS
    elif of_weights == (False, False):
        site.is_linear, site.obstacle = False, _without_weight(lhs, rhs, flow)
    elif of_weights[0]:  # a transposed product: W[N, K] @ X.T
        site.lhs_is_first, site.weight, site.m, site.n = False, lhs, s, r
    else:
        site.weight = rhs
    if site.is_linear:
        _group(site)
    if site.grouping == "batch" and site.m is not None:
        site.m *= site.num_groups
    if site.weight is not None and not site.module:
        site.module = flow.modules.get(root(site.weight), "")
    site.obstacle = site.obstacle or _form(node) or _weight_form(site)
    return site


def _of_others(node: fx.Node, flow: Flow) -> Site | None:
    """A forward op that multiplies where no pass looks: another library's, of rows x[.., M, C] and
    a weight with a side of C.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or node in flow.gradients:
        return None
    if target.namespace in ("aten", "prims", "lpcompile") and target not in WHOLE_LAYERS:
        return None
    matrices = [n for n in node.all_input_nodes if _is_matrix(n)]
    rows = [n for n in matrices if n not in flow.weights and n not in flow.constants]
    for w in (n for n in matrices if n in flow.weights):
        for x in rows:
            sides, k = [hint(s) for s in shape(w)[-2:]], hint(shape(x)[-1])
            if k in sides:
                sides.remove(k)
                lead = [hint(s) for s in shape(x)[:-1][-1 if len(shape(w)) == 3 else 0 :]]
                m = None if None in lead else math.prod(s or 0 for s in lead)
                site = Site(node, "fprop", x, w, module_path(node), m, sides[0], k)
                site.num_groups = (hint(shape(w)[0]) or 1) if len(shape(w)) == 3 else 1
                site.is_linear, site.obstacle = False, _by_another(target, value(w).dtype)
                return site
    return None


def _is_matrix(node: fx.Node) -> bool:
    made = node.meta.get("val")
    return isinstance(made, torch.Tensor) and made.dim() > 1 and made.dtype.is_floating_point


def _by_another(target: torch._ops.OpOverload, dtype: torch.dtype) -> str:
    """Why such an op is left, with its backward."""
    reason = f"{target.namespace}::{target._opname} multiplies inside itself"
    if dtype == torch.bfloat16:
        return reason
    name = str(dtype).removeprefix("torch.")
    return f"{reason}, which may be because its weight is {name}: make that bfloat16"


WEIGHTS = "a product of two weights"
OF_GUESSES = (
    f"{WEIGHTS}: no input of this graph is a Parameter, and both are of matrices that require grad"
)
ACTIVATIONS = "a product of two activations"
NO_PARAMETERS = (
    f"{ACTIVATIONS}: no input of this graph is a Parameter, nor a matrix that requires grad"
)
BUFFER = "an operand is a buffer or a constant: only what depends on a parameter is a weight"
GATHERED = (
    "it gathers a weight matrix for each token: sort tokens by expert and use grouped_mm "
    '(in Hugging Face transformers, experts_implementation="grouped_mm")'
)


def _without_weight(lhs: fx.Node, rhs: fx.Node, flow: Flow) -> str:
    """Why a product none of whose operands is a weight is none of a linear."""
    if _is_gathered(lhs, flow) or _is_gathered(rhs, flow):
        return GATHERED
    if lhs in flow.constants or rhs in flow.constants:
        return BUFFER
    return NO_PARAMETERS if flow.guessed and not flow.weights else ACTIVATIONS


def _is_gathered(node: fx.Node, flow: Flow) -> bool:
    """Whether an operand is a weight's matrices picked by an index."""
    node = base(node)
    return node.target in GATHERS and node.args[0] in flow.weights


def _group(site: Site) -> None:
    """What a product of several matrices says of its groups."""
    node = site.node
    (a, b), args = operands(node), node.args
    of_batch = len(shape(a)) == len(shape(b)) == 3
    is_grouped = node.target is aten._grouped_mm.default
    if of_batch and (is_grouped or hint(shape(a)[0]) != 1):
        site.grouping, site.num_groups = "batch", hint(shape(a)[0]) or 1
    elif is_grouped:
        site.offs = args[2] if len(args) > 2 else node.kwargs.get("offs")  # type: ignore[assignment]
        site.grouping, site.num_groups = "ragged", hint(shape(site.offs)[0]) or 1  # type: ignore[arg-type]


def _backward(
    node: fx.Node, flow: Flow, partners: dict[Any, list[Site]], forward: list[Site]
) -> Site:
    lhs, rhs = operands(node)
    gradients = lhs in flow.gradients, rhs in flow.gradients
    r, c, s = _sizes(lhs, rhs)
    site = Site(node, "dgrad", lhs, rhs, module_path(node), m=r, n=s, k=c)
    if gradients == (True, True):
        site.is_linear, site.obstacle = False, "a product of two gradients"
        return site
    site.lhs_is_first = gradients[0]
    other = rhs if gradients[0] else lhs
    partner = _partner(node, other, partners, forward)
    if partner is None:
        return _without_forward(site, other, flow, forward)
    if not partner.is_linear:
        site.is_linear, site.obstacle = False, partner.obstacle
        return site
    site.forward, site.module = partner, partner.module or site.module
    site.m, site.n, site.k = partner.m, partner.n, partner.k
    _group(site)
    if _same(other, partner.weight):
        site.weight = other
    else:
        site.product = "wgrad"
    site.obstacle = _form(node) or _weight_form(partner)
    return site


def _without_forward(site: Site, other: fx.Node, flow: Flow, forward: list[Site]) -> Site:
    """The backward of a ``torch.cond`` is a graph of its own, without the forward's products."""
    r, s, c = site.m, site.n, site.k
    weight: fx.Node | None
    if other in flow.weights:
        site.weight, weight = other, root(other)
        site.m, site.n, site.k = (r, c, s) if site.lhs_is_first else (s, c, r)
    elif (weight := _weight_of(site.node, flow)) is not None:
        site.product = "wgrad"
        site.m, site.n, site.k = (c, r, s) if site.lhs_is_first else (c, s, r)
    else:
        same = next((s for s in forward if _is_of(s.node, site.node)), None)
        site.is_linear, site.obstacle = False, same.obstacle if same else ACTIVATIONS
        return site
    site.module = site.module or flow.modules.get(weight, "")
    _group(site)
    grouped = "a grouped product in the backward of a torch.cond" if site.grouping else ""
    site.obstacle = grouped or _form(site.node)
    return site


def _weight_of(node: fx.Node, flow: Flow) -> fx.Node | None:
    """The weight whose gradient a called graph, which gives one for each input, gives as node."""
    primals = [n for n in placeholders(node.graph) if n not in flow.gradients]
    (made,) = node.graph.output_node().args
    gradients: Any = made
    if not is_called(node.graph) or len(gradients) != len(primals):
        return None
    pairs = zip(primals, gradients, strict=True)
    of = (p for p, g in pairs if p in flow.weights and isinstance(g, fx.Node) and root(g) is node)
    return next(of, None)


def _partner(
    node: fx.Node, other: fx.Node, partners: dict[Any, list[Site]], forward: list[Site]
) -> Site | None:
    """The forward GEMM of the same linear, or product: by ``seq_nr``, else by identity.

    Inside a user's autograd.Function the backward GEMMs have the seq_nr of the Function, which no
    forward GEMM need share.
    """
    same = [
        s
        for s in partners.get(node.meta.get("seq_nr"), ())
        if _same(other, s.lhs) or _same(other, s.rhs)
    ]
    if same:  # of a product of two activations too, one of which may be the X of a linear
        return next((s for s in same if s.is_linear), same[0])
    linears = [s for s in forward if s.is_linear]
    by_weight = next((s for s in linears if _same(other, s.weight)), None)
    return by_weight or next(
        (s for s in linears if _same(other, s.lhs) or _same(other, s.rhs)), None
    )


def _is_of(forward: fx.Node, backward: fx.Node) -> bool:
    seq_nr = forward.meta.get("seq_nr")
    return seq_nr is not None and seq_nr == backward.meta.get("seq_nr")


def _same(a: fx.Node, b: fx.Node | None) -> bool:
    return b is not None and base(a) is base(b)


def _form(node: fx.Node) -> str:
    """Why the call itself cannot be narrowed, or nothing."""
    if node.target is aten._grouped_mm.default:
        more = ("bias", "out_dtype")
        given = {**dict(zip(more, node.args[3:], strict=False)), **node.kwargs}
        asked = [name for name in more if given.get(name) is not None]
        if asked:
            return f"_grouped_mm with {' and '.join(asked)}"
        if len(shape(operands(node)[0])) > len(shape(operands(node)[1])):
            return "_grouped_mm whose groups lie along columns"
    scaled = {k: v for k, v in node.kwargs.items() if k in ("alpha", "beta") and v != 1}
    if scaled:
        name = node.target._opname  # type: ignore[union-attr]
        return f"{name} with {', '.join(f'{k}={v}' for k, v in scaled.items())}"
    if not value(node).dtype.is_floating_point:
        return f"of {value(node).dtype}"
    return ""


def _weight_form(site: Site) -> str:
    """Why a batch is no group of experts, or nothing."""
    if site.grouping != "batch" or site.weight is None:
        return ""
    if base(site.weight).target in GATHERS:
        return GATHERED
    if value(site.weight).stride(0) == 0:
        return "a batch that shares one weight: F.linear of the batch would be one GEMM"
    return ""
