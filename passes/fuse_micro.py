"""Merge the MXFP8 and NVFP4 quantizes of one graph with what makes their operands, in two ops.

``fuse`` for blocks of 32 and 16: what is quantized both ways is made from one read for the tensor
amaxes (``fused_amax_micro``, NVFP4 alone) and one for the forms of x and of x.T each
(``fused_cast_micro``). The Hadamard transform happens in registers, and scales are written in the
tiles of tensor cores where a GEMM of the same graph reads them. Bits are those of the chain.

A copy that is dequantized again, and read by nobody else (``passes/emulate.py``), is never written:
``fused_wide_micro`` makes what it stands for, both ways and of experts' groups too, from one read
for each tensor.

What stays as it was: what would read more than the chain does, such as both gradients of a producer
with many inputs, in narrow copies; and operands that are not whole bf16 matrices.
"""

import operator
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

from lpcompile import ops
from lpcompile.cones import Cone
from lpcompile.fusion import Group, groups, is_whole, last, matrix, offsets, with_producers
from lpcompile.graph import base, call, shape, value
from lpcompile.ops.micro_source import E4M3, Form

# quantize op -> of x or of x.T, rows that share a scale
MX: dict[Any, tuple[str, int]] = {
    ops.quantize_mxfp8.op: ("n", 1),
    ops.quantize_mxfp8_t.op: ("t", 1),
    ops.quantize_mxfp8_square.op: ("n", 32),
    ops.quantize_mxfp8_square_t.op: ("t", 32),
}
NV: dict[Any, tuple[str, int]] = {
    ops.quantize_nvfp4.op: ("n", 1),
    ops.quantize_nvfp4_t.op: ("t", 1),
    ops.quantize_nvfp4_square.op: ("n", 16),
    ops.quantize_nvfp4_square_t.op: ("t", 16),
}
# Of tokens of experts, group by group; fused only where they are dequantized again.
IN_GROUPS = (ops.quantize_mxfp8_grouped_t.op, ops.quantize_nvfp4_grouped_t.op)


@dataclass
class Request:
    """One quantize of x, or of its transform, that can be fused.

    amax, seed: the nodes that it reads, of NVFP4. makes_amax: this graph makes it of the operand.
    transform: the Hadamard transform in between that nobody else reads.
    swizzles: the nodes that bring its scales into tiles, if nobody reads them otherwise.
    wide: the one that dequantizes it, if nobody reads it otherwise. offs: where groups end.
    """

    node: fx.Node
    x: fx.Node
    way: str
    rows: int
    how: str
    amax: fx.Node | None = None
    seed: fx.Node | None = None
    makes_amax: bool = False
    transform: fx.Node | None = None
    swizzles: tuple[fx.Node, ...] = ()
    wide: fx.Node | None = None
    offs: fx.Node | None = None

    def form(self, result: int) -> Form:
        """What it asks of the fused op."""
        return Form(result, self.way, self.rows, self.how, bool(self.swizzles))


Asked = tuple[Request, Form]


def run(graph: fx.Graph) -> int:
    """Fuse what pays, and return how many quantizes were merged."""
    requests: dict[fx.Node, list[Request]] = defaultdict(list)
    count = 0
    for node in list(graph.nodes):
        request = _request(node)
        if request is None:
            continue
        alike = [*requests[request.x], request]
        if is_whole(request.x) and len(offsets(alike)) <= 1:
            requests[request.x] = alike
        elif _is_stack(request):
            _replace(graph, Group(_identity(request.x), [("i0", [request])]))
            count += 1
    asked = [r for rs in requests.values() for r in rs]
    inner = {n for r in asked for n in (r.node, r.wide, r.transform, r.makes_amax and r.amax) if n}
    whole = {x: rs for x, rs in requests.items() if rs}
    # Random words bound what rounds stochastically, and a producer would add to that.
    drawn = {base(x) for x, rs in whole.items() if any(r.wide and r.seed for r in rs)}
    for group in groups(whole, with_producers(graph, inner) - drawn):
        if len({r.seed for r in group.requests} - {None}) <= 1 and _pays(group):
            _replace(graph, group)
            count += len(group.requests)
    if count:
        stable_topological_sort(graph)
    return count


def _is_stack(request: Request) -> bool:
    """Whether x is a stack of bf16 matrices, row after row, that is dequantized again."""
    again = request.wide is not None and request.seed is None and request.way in "nt"
    return again and is_whole(request.x, 3)


def _identity(x: fx.Node) -> Cone:
    """A program that reads one tensor."""
    return Cone(shape(x)[0], shape(x)[-1], lambda node: False, leaves=[(x, "full")])


def _request(node: fx.Node) -> Request | None:
    if node.op != "call_function":
        return None
    args: Any = node.args
    wide = _dequantize(node)
    if node.target in IN_GROUPS and wide is not None:
        return _request_in_groups(node, wide)
    if node.target in MX and args[1] is E4M3:
        way, rows = MX[node.target]
        how = "floor" if args[2] else "rceil"
        return Request(node, args[0], way, rows, how, swizzles=_swizzles(node), wide=wide)
    if node.target not in NV:
        return None
    (x, amax, seed, draw), (way, rows) = args, NV[node.target]
    made = Request(
        node,
        x,
        way,
        rows,
        "nearest" if seed is None else f"draw{draw}",
        amax,
        seed,
        makes_amax=amax.target is ops.amax_tensor.op and amax.args[0] is x,
        swizzles=_swizzles(node),
        wide=wide,
    )
    is_transform = x.target is ops.hadamard.op and x.args[1] == ops.hadamard.SIGNS
    readers = {node, amax} if made.makes_amax else {node}
    if is_transform and (way, rows) == ("n", 1) and set(x.users) <= readers:
        made.x, made.way, made.transform = x.args[0], "h", x
    return made


def _request_in_groups(node: fx.Node, wide: fx.Node) -> Request | None:
    args: Any = node.args
    if node.target is ops.quantize_mxfp8_grouped_t.op:
        x, offs, element, floor = args
        how = "floor" if floor else "rceil"
        return Request(node, x, "g", 1, how, wide=wide, offs=offs) if element is E4M3 else None
    x, amax, offs, signs, seed, draw = args
    if signs not in (None, ops.hadamard.SIGNS):
        return None
    way, how = "g" if signs is None else "gh", "nearest" if seed is None else f"draw{draw}"
    return Request(node, x, way, 1, how, amax, seed, wide=wide, offs=offs)


def _dequantize(node: fx.Node) -> fx.Node | None:
    """What dequantizes a copy, if nobody else reads its values and scales."""
    items = [u for u in node.users if u.target is operator.getitem and u.args[1] in (0, 1)]
    readers = {user for item in items for user in item.users}
    only = readers.pop() if len(readers) == 1 else None
    return only if only is not None and only.target is ops.dequantize.op else None


def _swizzles(node: fx.Node) -> tuple[fx.Node, ...]:
    """What reads the scales, where that is ``swizzle`` alone."""
    readers = {u for pair in node.users if pair.args[1] == 1 for u in pair.users}
    return tuple(readers) if all(u.target is ops.swizzle.op for u in readers) else ()


def _pays(group: Group) -> bool:
    """Whether the fused ops read and write no more full bf16 tensors than what they replace."""
    inputs, requests = group.cone.num_full, group.requests
    forms = [(r, name) for name, rs in group.results for r in rs]
    if len(forms) == 1 and not group.cone.statements and not requests[0].transform:
        # The same kernel, and one fewer.
        return bool(requests[0].swizzles) or requests[0].wide is not None
    chain = inputs + len(group.results) if group.cone.statements else 0
    chain += sum((3 if r.transform else 1) + (r.wide is not None) for r in requests)
    chain += len({r.amax for r in requests if r.makes_amax})
    casts = {name if r.way != "n" else "" for r, name in forms if r.wide is None}
    reads = inputs * (len(casts) + any(r.makes_amax for r in requests))
    for name, rs in group.results:
        # MXFP8's wide copies of one result are one kernel, NVFP4's are one each.
        wide = [r.amax for r in rs if r.wide is not None]
        kernels = len(wide) - wide.count(None) + (None in wide)
        reads += group.cone.part(name)[0].num_full * kernels
    return reads <= chain


def _replace(graph: fx.Graph, group: Group) -> None:
    if not group.cone.statements and not any(r.transform for r in group.requests):
        for request in group.requests:
            request.makes_amax = False  # ``amax_tensor`` reads what is in memory no worse
    cone, x = group.cone, group.requests[0].x
    make = partial(call, graph)
    program = cone.program([name for name, _ in group.results]).text()
    forms: list[Asked] = [(r, r.form(i)) for i, (_, rs) in enumerate(group.results) for r in rs]
    after = [leaf for leaf, _ in cone.leaves] + list(offsets(group.requests))
    after += [r.seed for r, _ in forms if r.seed is not None]
    after += [r.amax for r, _ in forms if r.amax is not None and not r.makes_amax]
    with graph.inserting_before(last(after).next):
        inputs = [x] if value(x).dim() == 3 else [matrix(make, cone, *leaf) for leaf in cone.leaves]
        wants = list(dict.fromkeys(form.amax for r, form in forms if r.makes_amax))
        amaxes: dict[str, fx.Node] = {}
        if wants:
            every = make(ops.fused_amax_micro.op, inputs, program, wants)
            amaxes = {want: make(operator.getitem, every, i) for i, want in enumerate(wants)}
        narrow = [(r, form) for r, form in forms if r.wide is None]
        if narrow:
            reads = [amaxes[f.amax] if r.makes_amax else r.amax for r, f in narrow if f.amax]
            _replace_narrow(make, narrow, inputs, reads, program)
        for i, (name, requests) in enumerate(group.results):
            asked = [r for r in requests if r.wide is not None]
            if asked:
                of = [(r, r.form(i).amax) for r in asked if r.amax is not None]
                reads = [amaxes[amax] if r.makes_amax else r.amax for r, amax in of]
                part, result = cone.part(name)
                read = [inputs[cone.leaves.index(leaf)] for leaf in part.leaves]
                _replace_wide(make, asked, read, reads, part.program([result]).text())
    for request, form in forms:
        if request.makes_amax and request.amax is not None:
            request.amax.replace_all_uses_with(amaxes[form.amax])


def _replace_narrow(
    make: Any, forms: list[Asked], inputs: list[fx.Node], amaxes: list[Any], program: str
) -> None:
    seed = next((r.seed for r, _ in forms if r.seed is not None), None)
    texts = [form.text for _, form in forms]
    made = make(ops.fused_cast_micro.op, inputs, amaxes, seed, program, texts)
    for i, (request, _) in enumerate(forms):
        values, scales = (make(operator.getitem, made, 2 * i + j) for j in (0, 1))
        for item in list(request.node.users):
            if item.args[1] == 0:
                item.replace_all_uses_with(values)
            elif not request.swizzles:
                item.replace_all_uses_with(scales)
        for swizzle in request.swizzles:
            swizzle.replace_all_uses_with(scales)


def _replace_wide(
    make: Any, requests: list[Request], inputs: list[fx.Node], amaxes: list[Any], program: str
) -> None:
    """One op for the copies of one result: of several, all would live at once."""
    seed = next((r.seed for r in requests if r.seed is not None), None)
    texts, offs = [r.form(0).text for r in requests], list(offsets(requests))
    made = make(ops.fused_wide_micro.op, inputs, amaxes, seed, program, texts, *offs)
    items = [make(operator.getitem, made, i) for i in range(len(requests) + len(offs))]
    for request, item in zip(requests, items, strict=False):
        if request.wide is not None:
            request.wide.replace_all_uses_with(item)
        for ends in request.node.users:
            if ends.args[1] == 2:  # where its padded groups end
                ends.replace_all_uses_with(items[-1])
