"""Loops that Python unrolled: what every expert does to its own rows, side by side in a graph.

Slices that tile the rows of one tensor are where lanes begin, one for each expert. What is computed
from the rows of one expert alone is in its lane; a Family is what all of them do at one place, so
that it may be done to all rows at once:

    rows      [s_e, ...] of each expert, of a whole [T, ...]
    rows_t    [C, s_e], of a whole [C, T]
    stack     [M, N] of each expert, of a whole [E, M, N]: the gradient of a weight

Nodes are one family when they are the same op of the same families and of the same other tensors,
but for the weight, which every expert has its own of. That no lane reads another's work, or what
comes of it, follows: it would be another tensor in every lane.
"""

import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from lpcompile.flow import Flow
from lpcompile.graph import CASTS, aten, shape, swaps_last_two

Kind = Literal["rows", "rows_t", "stack", "parts"]  # parts: the tuple that a split makes
SPLITS = {aten.split_with_sizes.default, aten.split.Tensor}
# Products of rows, and which of their arguments every expert has its own of.
LINEARS: dict[Any, tuple[int, ...]] = {aten.mm.default: (1,), aten.addmm.default: (0, 2)}
COPIES = {aten.alias.default, aten.clone.default, aten.detach.default}
# Ops along some dimensions: where these stand among the arguments, and the default.
ALONG: dict[Any, tuple[int, int]] = {
    aten.cat.default: (1, 0),
    aten.slice.Tensor: (1, 0),
    aten.split.Tensor: (2, 0),
    aten.split_with_sizes.default: (2, 0),
    aten.squeeze.dim: (1, 0),
    aten.sum.dim_IntList: (1, 0),
    aten.unsqueeze.default: (1, 0),
}


@dataclass(eq=False)
class Loop:
    """The lanes of slices of these sizes, which add up to ``rows``.

    pieces: some of the slices, one a lane.
    """

    sizes: tuple[Any, ...]
    rows: Any
    pieces: list[fx.Node]

    @property
    def num_lanes(self) -> int:
        """How many experts there are."""
        return len(self.sizes)


@dataclass(eq=False)
class Family:
    """The nodes of all lanes that are one op of all rows.

    nodes: one a lane, in order.
    base: whose rows the nodes are, where lanes begin.
    """

    loop: Loop
    kind: Kind
    nodes: list[fx.Node] = field(default_factory=list)
    base: fx.Node | None = None


@dataclass
class Lanes:
    """The families of a graph, in an order in which they may be computed.

    at: the family and the lane of a node.
    untiled: slices of rows that, for the reason given, do not tile them.
    same: of what is computed from parameters alone, in every lane anew, the first that is equal.
    """

    families: list[Family] = field(default_factory=list)
    at: dict[fx.Node, tuple[Family, int]] = field(default_factory=dict)
    untiled: dict[fx.Node, str] = field(default_factory=dict)
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def inputs(self, node: fx.Node) -> list[Family]:
        """The families that a node reads."""
        return [self.at[i][0] for i in node.all_input_nodes if i in self.at]


def find(graph: fx.Graph, flow: Flow) -> Lanes:
    """Every family of a graph; of those that some lane lacks, none."""
    lanes = Lanes()
    _begin(graph, flow, lanes)
    if not lanes.at:
        return lanes
    _find_same(graph, flow, lanes)
    known: dict[Any, Family] = {}
    times: Counter[Any] = Counter()
    for node in graph.nodes:
        read = [lanes.at[i] for i in node.all_input_nodes if i in lanes.at]
        places = {(family.loop, lane) for family, lane in read}
        if node in lanes.at or len(places) != 1 or node.op != "call_function":
            continue
        kind = _kind(node, lanes, flow)
        if kind is None:
            continue
        ((loop, lane),) = places
        key = loop, _key(node, lanes)
        times[key, lane] += 1
        place = (key, times[key, lane])
        if place not in known:
            known[place] = Family(loop, kind)
            lanes.families.append(known[place])
        known[place].nodes.append(node)
        lanes.at[node] = known[place], lane
    _drop_incomplete(lanes)
    return lanes


def _find_same(graph: fx.Graph, flow: Flow, lanes: Lanes) -> None:
    first: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        of_parameters = node in flow.weights or node in flow.constants
        if node.op == "call_function" and of_parameters and not _is_random(node):
            args = pytree.tree_map_only(fx.Node, lambda n: lanes.same.get(n, n), node.args)
            lanes.same[node] = first.setdefault((node.target, str(args), str(node.kwargs)), node)


def _drop_incomplete(lanes: Lanes) -> None:
    kept: dict[Family, None] = {}
    for family in lanes.families:
        whole = len(family.nodes) == family.loop.num_lanes
        if whole and all(f in kept for f in lanes.inputs(family.nodes[0])):
            family.nodes.sort(key=lambda n: lanes.at[n][1])
            kept[family] = None
    lanes.families = list(kept)
    lanes.at = {node: place for node, place in lanes.at.items() if place[0] in kept}


def _key(node: fx.Node, lanes: Lanes) -> str:
    """What a node reads, alike in every lane if it is a family."""
    own = LINEARS.get(node.target, ())  # of every expert, in a product of a weight

    def of(read: fx.Node) -> Any:
        return f"family {id(lanes.at[read][0])}" if read in lanes.at else lanes.same.get(read, read)

    args = [
        _weight_key(lanes.same.get(a, a), lanes)
        if i in own and isinstance(a, fx.Node) and a not in lanes.at
        else pytree.tree_map_only(fx.Node, of, a)
        for i, a in enumerate(node.args)
    ]
    return f"{node.target} {args} {node.kwargs}"


def _weight_key(weight: fx.Node, lanes: Lanes) -> str:
    stack = stack_of(weight, lanes)
    how = [(n.target, n.args[1:], n.kwargs) for n in chain_of(weight)]
    return f"weight {stack and stack[0]} {list(shape(weight))} {how}"


def chain_of(weight: fx.Node) -> Iterator[fx.Node]:
    """The transposes and casts above what a weight is stored as."""
    while swaps_last_two(weight) or weight.target in CASTS:
        yield weight
        weight = weight.all_input_nodes[0]


def stack_of(weight: fx.Node, lanes: Lanes) -> tuple[fx.Node, int] | None:
    """The stack of weights that a matrix is of, through transposes and casts, and which it is."""
    dim = len(shape(weight)) + 1
    for node in chain_of(weight):
        weight = node.all_input_nodes[0]
    args: Any = weight.args
    if weight.target is aten.select.int and args[1] == 0 and isinstance(args[2], int):
        stack, index = args[0], args[2]
    elif weight.target is operator.getitem and args[0].target is aten.unbind.int:
        stack, index = args[0].args[0], args[1]
        if len(args[0].args) > 1 and args[0].args[1] != 0:
            return None
    else:
        return None
    stack = lanes.same.get(stack, stack)
    return (stack, index % shape(stack)[0]) if len(shape(stack)) == dim else None


def _kind(node: fx.Node, lanes: Lanes, flow: Flow) -> Kind | None:
    """What a node of one lane is of the whole, or None where it is nothing of it."""
    kinds = [lanes.at[i][0].kind if i in lanes.at else None for i in node.all_input_nodes]
    target, args = node.target, node.args
    if any(isinstance(value, fx.Node) for value in node.kwargs.values()):
        return None
    if target is aten.mm.default and kinds == ["rows_t", "rows"]:
        return "stack"
    if target in LINEARS:
        of_rows = [a in lanes.at for a in args] == [
            i not in LINEARS[target] for i in range(len(args))
        ]
        own = all(args[i] in flow.weights for i in LINEARS[target])
        return (
            "rows" if of_rows and own and set(kinds) == {"rows", None} and not node.kwargs else None
        )
    if swaps_last_two(node) and len(shape(node)) == 2:
        turned: dict[Any, Kind] = {"rows": "rows_t", "rows_t": "rows", "stack": "stack"}
        return turned.get(kinds[0])
    if target is operator.getitem:
        return "rows" if kinds == ["parts"] else None
    if target in CASTS and kinds == ["stack"]:
        return "stack"
    if set(kinds) - {None} != {"rows"}:
        return None
    if target in ALONG:
        across = None not in kinds and 0 not in _dims(node)
        return ("parts" if target in SPLITS else "rows") if across else None
    return "rows" if _is_pointwise(node, lanes) else None


def _dims(node: fx.Node) -> list[int]:
    """The dimensions that an op of ``ALONG`` works along."""
    at, default = ALONG[node.target]
    said: Any = node.args[at] if len(node.args) > at else node.kwargs.get("dim", default)
    if said is None:
        return [0]
    num = len(shape(node.all_input_nodes[0])) + (node.target is aten.unsqueeze.default)
    return [d % num for d in (said if isinstance(said, (list, tuple)) else [said])]


def _is_pointwise(node: fx.Node, lanes: Lanes) -> bool:
    """Whether a node computes every row of [s, ...] from that row, and tensors for all rows."""
    is_one = torch.Tag.pointwise in getattr(node.target, "tags", ())
    if _is_random(node) or not (is_one or node.target in CASTS or node.target in COPIES):
        return False
    dim = len(shape(node))
    for i in node.all_input_nodes:
        if not isinstance(i.meta.get("val"), torch.Tensor):
            return False
        size = shape(i)
        if i in lanes.at:
            if len(size) != dim:
                return False
        elif len(size) >= dim and not statically_known_true(size[0] == 1):
            return False
    return dim > 0


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _begin(graph: fx.Graph, flow: Flow, lanes: Lanes) -> None:
    """The families where lanes begin: slices that tile the rows of one tensor."""
    loops: list[Loop] = []
    slices: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node in flow.weights or node in flow.constants:
            continue
        if node.target in SPLITS and _dims(node) == [0]:
            _begin_split(node, lanes, loops)
        elif node.target is aten.slice.Tensor and _dims(node) == [0]:
            slices[node.args[0]].append(node)
    for base, pieces in slices.items():
        chain = _chain(base, pieces)
        if isinstance(chain, str):
            lanes.untiled |= {piece: chain for piece in pieces} if len(pieces) > 1 else {}
        elif len(chain) > 1:
            _add(base, chain, lanes, loops)


def _begin_split(node: fx.Node, lanes: Lanes, loops: list[Loop]) -> None:
    parts: list[list[fx.Node]] = [[] for _ in node.meta["val"]]
    for user in node.users:
        if user.target is operator.getitem:
            parts[user.args[1]].append(user)  # type: ignore[index]
    if len(parts) > 1 and all(parts):
        _add(node.all_input_nodes[0], parts, lanes, loops)


def _add(base: fx.Node, parts: list[list[fx.Node]], lanes: Lanes, loops: list[Loop]) -> None:
    """Begin lanes at slices, some of which may be of the same rows."""
    first = [alike[0] for alike in parts]
    sizes = tuple(shape(n)[0] for n in first)
    loop = next((loop for loop in loops if _alike(loop.sizes, sizes)), None)
    if loop is None:
        loop = Loop(sizes, shape(base)[0], first)
        loops.append(loop)
    family = Family(loop, "rows", list(first), base)
    lanes.families.append(family)
    for lane, alike in enumerate(parts):
        lanes.at |= dict.fromkeys(alike, (family, lane))


def _alike(sizes: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    pairs = zip(sizes, others, strict=False)
    return len(sizes) == len(others) and all(statically_known_true(a == b) for a, b in pairs)


def _chain(base: fx.Node, pieces: Iterable[fx.Node]) -> list[list[fx.Node]] | str:
    """The slices of [0, T) in order, or why they do not tile it."""
    by_start: dict[Any, list[tuple[Any, fx.Node]]] = defaultdict(list)
    rows = shape(base)[0]
    for piece in pieces:
        start, end, step = range_of(piece.args[2:], rows)
        if step != 1 or not statically_known_true(shape(piece)[0] == end - start):
            return UNBOUNDED
        by_start[_expression(start)].append((end, piece))
    made: list[list[fx.Node]] = []
    at: Any = 0
    while _expression(at) in by_start:
        found = by_start.pop(_expression(at))
        if len({_expression(end) for end, _ in found}) > 1:
            return "its slices of the rows overlap"
        at = found[0][0]
        made.append([piece for _, piece in found])
    if by_start or not statically_known_true(at == rows):
        return "its slices do not tile the rows: where they do, torch._check(end == len(x)) says so"
    return made


UNBOUNDED = (
    "its slices are not known to tile the rows: torch.split says so, and torch._check(size >= 0) "
    "with torch._check(end <= len(x)) of each does"
)


def range_of(said: Sequence[Any], rows: Any) -> tuple[Any, Any, Any]:
    """Start, end and step of a slice of ``rows`` rows, as they are written."""
    start, end, step = ((*said, *([None] * 3))[i] for i in range(3))
    start, end, step = (a.meta["val"] if isinstance(a, fx.Node) else a for a in (start, end, step))
    to_the_end = end is None or (isinstance(end, int) and end == 2**63 - 1)
    return 0 if start is None else start, rows if to_the_end else end, 1 if step is None else step


def _expression(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr
