"""Order the quantizes of one graph, and the GEMMs that read them, so that less lives at once.

- Around tensors that are cast from the same inputs, the order that holds least is searched
  (``lpcompile.peak``). SwiGLU's backward: whether h, for wgrad, and the gradients of gate and up
  are cast one after another, each before its own GEMMs, or at once, which lets go of gate, up and
  the gradient of h; whether dX comes before dW, and when x is narrowed for wgrad. One kernel casts
  several, and reads their inputs once, where the peak is not above the least by a thousandth. Under
  one scale the codes of x.T are those of x: what is cast both ways may be cast along rows, beside
  others, and its codes transposed when x.T is needed.
- What is quantized from inputs of the graph that are held anyway (weights, above all) is quantized
  right before the first GEMM that reads it: a copy made early is held beside them.

Inductor takes the order with the least peak, by its estimate, of four: the one that it is given and
three of its own (``reorder_for_peak_memory``, torch 2.11 to 2.13), none of which finds this one.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import fx

from lpcompile import ops
from lpcompile.cones import LARGE
from lpcompile.fusion import MOST_INPUTS, MOST_STATEMENTS
from lpcompile.graph import TRANSPOSES, VIEWS, base, call, is_own, shape, value
from lpcompile.liveness import is_cheap
from lpcompile.ops import fused_amax, pointwise
from lpcompile.ops.define import PRODUCTS
from lpcompile.ops.fused_cast import num_outputs
from lpcompile.ops.fused_source import WHOLE, along, parse_form
from lpcompile.peak import CALLERS, Memory, Part

CASTS = (ops.fused_cast.op, ops.fused_cast_micro.op, ops.fused_wide_micro.op)
MOST_JOINED = 6  # calls in one: all sets of so many are looked at
MOST_BETWEEN = 8  # GEMMs from a group's first cast to its last: more and it is several layers'
JOINED: dict[Any, int] = {ops.fused_cast.op: 4, ops.fused_amax.op: 3}  # arguments before offs


def run(graph: fx.Graph) -> int:
    """Move what is better made later, and return how many calls were moved or joined."""
    count = 0
    for casts in _groups(graph):
        count += _order(graph, casts)
    for amaxes in _adjacent(graph):
        joins = sorted(_joins(amaxes, {}), key=len)
        while joins:
            largest = joins.pop()
            joins = [join for join in joins if not set(join) & set(largest)]
            _join(graph, largest)
            count += 1
    return count + _sink(graph)


def _groups(graph: fx.Graph) -> list[list[fx.Node]]:
    """The casts that read a large input together and lie near each other, in graph order."""
    group_of: dict[fx.Node, list[fx.Node]] = {}  # by input
    before: dict[fx.Node, int] = {}  # GEMMs before a cast
    products = 0
    for node in graph.nodes:
        products += node.op == "call_function" and node.target in PRODUCTS
        if node.op != "call_function" or node.target not in CASTS:
            continue
        before[node] = products
        near = (group_of.get(i) for i in _inputs(node))
        alike = {id(g): g for g in near if g and products - before[g[0]] <= MOST_BETWEEN}
        group = [*sorted(other for g in alike.values() for other in g), node]
        group_of |= {i: group for member in group for i in _inputs(member)}
    groups = {id(group): group for group in group_of.values()}
    return [group for group in groups.values() if len(group) > 1]


def _inputs(cast: fx.Node) -> set[fx.Node]:
    """What a cast, or a call that takes amaxes, reads that is as large as its results."""
    args: Any = cast.args
    kinds = pointwise.parse(next(a for a in args[1:] if isinstance(a, str))).kinds
    return {base(i) for i, kind in zip(args[0], kinds, strict=True) if kind in LARGE}


def _order(graph: fx.Graph, casts: list[fx.Node]) -> int:
    """Put a part of the graph into its best order, and join calls; how many that changed."""
    split = {cast: _split(graph, cast) for cast in casts}
    turned = dict(pair for pair in split.values() if pair)
    casts = sorted(pair[0] if pair else cast for cast, pair in split.items())
    everything = list(graph.nodes)
    first, end = _range(everything, casts, list(turned.values()))
    amaxes = {a for cast in casts for a in _amaxes(cast)} & set(everything[first:end])
    joins = [*_joins(casts, turned), *_joins(sorted(amaxes), {})]
    memory = Memory(graph)
    lives = memory.lives(everything)
    part = Part(memory, everything[first:end], joins, list(turned.items()))
    floor = max(lives[:first] + lives[end:], default=0)
    steps = part.order(memory.held(set(everything[:first])), floor)
    if steps is None:
        for both in turned.items():
            _join(graph, both)
        return 0
    order = part.nodes_in(steps)
    for at, node in pairwise([everything[first - 1], *order]):
        at.append(node)
    together = [step.calls for step in steps if len(step.calls) > 1]
    for join in together:
        _join(graph, join)
    return sum(a is not b for a, b in zip(order, part.nodes, strict=True)) + len(together)


def _split(graph: fx.Graph, cast: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """A cast of x and the transpose of its codes, in the place of one call that casts both ways.

    None, and nothing done, where the two have scales of their own.
    """
    if cast.target is not ops.fused_cast.op:
        return None
    given = _arguments(cast)
    forms = {form.way: form for form in map(parse_form, given.wanted)}
    alike = {replace(form, way="n") for form in forms.values()}
    both = len(forms) == len(given.wanted) == 2 and alike == {forms.get("n")}
    if not both or forms["n"].kind not in WHOLE or len(set(given.amaxes)) > 1:
        return None
    starts = dict(zip(forms, (0, num_outputs(next(iter(forms.values())))), strict=True))
    (other,) = forms.keys() - {"n"}
    columns = value(cast)[starts[other]].shape[0]
    if not isinstance(columns, int):  # an argument of the op: a size that changes would be guarded
        return None
    only = given._replace(amaxes=given.amaxes[:1], wanted=[forms["n"].text])
    with graph.inserting_before(cast):
        made = call(graph, cast.target, *only[:2], only.program.text(), only.wanted, *only.offs)
        codes = [call(graph, operator.getitem, made, i) for i in range(2)]
        offs = given.offs if other == "g" else ()
        turned = call(graph, ops.transpose_fp8.op, *codes, columns, *offs)
    for item in list(cast.users):
        i: Any = item.args[1]
        if i - starts["n"] in range(2):
            item.replace_all_uses_with(codes[i - starts["n"]])
            graph.erase_node(item)
        else:
            item.args = (turned, i - starts[other])
    graph.erase_node(cast)
    return made, turned


def _adjacent(graph: fx.Graph) -> list[list[fx.Node]]:
    """Calls that take amaxes one after another, as ``fuse`` makes them: they hold nothing."""
    runs: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if node.op == "call_function" and node.target is ops.fused_amax.op:
            runs[-1].append(node)
        elif not _is_item(node) and node.target not in VIEWS and runs[-1]:
            runs.append([])
    return [run for run in runs if len(run) > 1]


def _amaxes(cast: fx.Node) -> list[fx.Node]:
    """The calls that make the amaxes that a cast reads, from what it casts."""
    made = [i.args[0] for i in cast.all_input_nodes if i.target is operator.getitem]
    return [a for a in made if isinstance(a, fx.Node) and a.target is ops.fused_amax.op]


def _range(nodes: list[fx.Node], casts: list[fx.Node], turned: list[fx.Node]) -> tuple[int, int]:
    """Which nodes there is something to gain from: up to the GEMMs that read the casts.

    From the first of them, or the casts that the GEMM reads which makes an input of theirs.
    """
    at = {node: i for i, node in enumerate(nodes)}
    makers = {i for cast in casts for i in _inputs(cast) if i.target in PRODUCTS}
    read = {i.args[0] for maker in makers for i in maker.all_input_nodes if _is_item(i)}
    first = min(at[node] for node in [*casts, *read])  # type: ignore[index]
    made = [*casts, *turned]
    readers = {u for node in made for item in node.users for u in item.users if u.op != "output"}
    end = 1 + max(at[node] for node in [*made, *readers])
    while nodes[end].op == "call_function" and (_is_item(nodes[end]) or is_cheap(nodes[end])):
        end += 1
    return first, end


def _is_item(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def _joins(
    nodes: list[fx.Node], turned: Mapping[fx.Node, fx.Node]
) -> Iterator[tuple[fx.Node, ...]]:
    """Casts, or calls that take amaxes, that share inputs and that one kernel can make.

    Each with and without the transposes of what it makes.
    """
    alone = {node: _inputs(node) for node in nodes if node.target in JOINED}
    some: dict[tuple[fx.Node, ...], set[fx.Node]] = {(n,): i for n, i in alone.items()}
    while some:
        for join in (join for join in some if len(join) > 1):
            yield from dict.fromkeys((join, (*join, *(turned[n] for n in join if n in turned))))
        some = {
            (*first, node): inputs | own
            for first, inputs in some.items()
            for node, own in alone.items()
            if len(first) < MOST_JOINED and first[-1] < node
            if inputs & own and _fits((*first, node))
        }


def _fits(nodes: Sequence[fx.Node]) -> bool:
    """Whether calls are of matrices of one shape, in the same groups of rows, by a program."""
    program, _ = _program(nodes)
    large = sum(kind in LARGE for kind in program.kinds)
    small = large <= MOST_INPUTS and len(program.statements) <= MOST_STATEMENTS
    return small and len({_whole(node) for node in nodes}) == 1


class Arguments(NamedTuple):
    """Of a call of ``fused_cast``, or of ``fused_amax``, which reads no amaxes."""

    inputs: list[fx.Node]
    amaxes: list[fx.Node]
    program: pointwise.Program
    wanted: list[str]
    offs: tuple[fx.Node, ...]


def _arguments(node: fx.Node) -> Arguments:
    inputs, *amaxes, program, wanted = node.args[: JOINED[node.target]]
    read, offs = amaxes[0] if amaxes else [], node.args[JOINED[node.target] :]
    return Arguments(inputs, read, pointwise.parse(program), wanted, offs)  # type: ignore[arg-type]


def _whole(node: fx.Node) -> tuple[Any, ...]:
    """The shape that a program computes in, and what says where groups of rows end."""
    given = _arguments(node)
    return (str(shape(given.inputs[given.program.large])), *given.offs)


def _program(nodes: Sequence[fx.Node]) -> tuple[pointwise.Program, list[fx.Node]]:
    """The program of all calls and its inputs, of which views of one tensor are one."""
    views: dict[str, fx.Node] = {}
    parts = []
    for given in map(_arguments, nodes):
        inputs = [
            views.setdefault(f"{i.target} {i.args}", i) if i.target in VIEWS else i
            for i in given.inputs
        ]
        parts.append((given.program, inputs))
    return pointwise.join(parts)


def _join(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """One call for calls that lie side by side; with the transposes of what they make."""
    casts = [node for node in nodes if node.target in JOINED]
    turned = [node for node in nodes if node not in casts]
    program, inputs = _program(casts)
    wanted: list[str] = []
    amaxes: list[fx.Node] = []
    first: dict[fx.Node, int] = {}  # of a call's results
    for node in casts:
        given = _arguments(node)
        first[node] = sum(len(_arguments(other).program.results) for other in first)
        wanted += (_of_result(text, first[node]) for text in given.wanted)
        amaxes += given.amaxes
    for node in turned:
        cast: Any = node.args[0].args[0]  # type: ignore[union-attr]
        form = parse_form(_of_result(_arguments(cast).wanted[0], first[cast]))
        wanted.append(replace(form, way="g" if len(value(node)) == 3 else "t").text)
        amaxes += _arguments(cast).amaxes
    target: Any = casts[0].target
    read = [amaxes] if target is ops.fused_cast.op else []
    offs = _arguments(casts[0]).offs
    with graph.inserting_after(max(nodes)):
        made = call(graph, target, inputs, *read, program.text(), wanted, *offs)
    count = 0
    for node in [*casts, *turned]:
        for item in list(node.users):
            item.update_arg(1, item.args[1] + count)  # type: ignore[operator]
            item.update_arg(0, made)
            made.append(item)
        count += len(value(node))
        graph.erase_node(node)


def _of_result(text: str, first: int) -> str:
    """A form, or the name of an amax, where its program's results begin at ``first``."""
    if " " in text:
        form = parse_form(text)
        return replace(form, result=form.result + first).text
    return f"{along(text)}{fused_amax.result_of(text) + first}"


def _sink(graph: fx.Graph) -> int:
    """Move what is quantized from tensors that are held anyway down to its first reader."""
    from_inputs: set[fx.Node] = set()
    for node in graph.nodes:
        known = all(i in from_inputs for i in node.all_input_nodes)
        if node.op == "placeholder" or (_is_light(node) and known):
            from_inputs.add(node)
    count = 0
    for node in reversed(list(graph.nodes)):
        if node.op == "placeholder" or node not in from_inputs or not node.users:
            continue
        first = min(node.users)
        is_part = node.target is operator.getitem  # which takes nothing to be handed on
        is_idle = (first.op != "output" or is_part) and node.next is not first
        if is_idle and all(_is_held(base(i), first) for i in node.all_input_nodes):
            first.prepend(node)
            count += 1
    return count


def _is_held(node: fx.Node, until: fx.Node) -> bool:
    """Whether an input lives until then anyhow: for the caller, or for what is computed of it."""
    if node.op != "placeholder" or node.name.startswith(CALLERS):
        return True
    if not isinstance(value(node), torch.Tensor) or value(node).dim() < 2:
        return True
    seen, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            if not user < until:
                return True
            if user not in seen and is_cheap(user):
                seen.add(user)
                stack.append(user)
    return False


def _is_light(node: fx.Node) -> bool:
    """A quantize or an amax, what it reads through, and what is taken of its outputs."""
    if node.op != "call_function":
        return False
    through = node.target in VIEWS or node.target in TRANSPOSES
    own = is_own(node) and node.target not in PRODUCTS
    return own or through or node.target is operator.getitem
