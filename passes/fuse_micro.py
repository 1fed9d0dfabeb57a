"""Merge the MXFP8 and NVFP4 quantizes of one graph with what makes their operands, in two ops.

``fuse`` for blocks of 32 and 16: what is quantized both ways is made from one read for the tensor
amaxes (``fused_amax_micro``, NVFP4 alone) and one for the forms of x and of x.T each
(``fused_cast_micro``). The Hadamard transform happens in registers, and scales are written in the
tiles of tensor cores where a GEMM of the same graph reads them. Bits are those of the chain.

What stays as it was: what would read more than the chain does, such as both gradients of a producer
with many inputs; and operands that are not whole bf16 matrices.
"""

import operator
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

from lpcompile import ops
from lpcompile.graph import call, value
from lpcompile.ops.micro_source import E4M3, Form
from lpcompile.passes.fuse import Group, groups, is_whole, last, matrix, with_producers

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


@dataclass
class Request:
    """One quantize of x, or of its transform, that can be fused.

    amax, seed: the nodes that it reads, of NVFP4. makes_amax: this graph makes it of the operand.
    transform: the Hadamard transform in between that nobody else reads.
    swizzles: the nodes that bring its scales into tiles, if nobody reads them otherwise.
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

    def form(self, result: int) -> Form:
        """What it asks of the fused op."""
        return Form(result, self.way, self.rows, self.how, bool(self.swizzles))


def run(graph: fx.Graph) -> int:
    """Fuse what pays, and return how many quantizes were merged."""
    requests: dict[fx.Node, list[Request]] = defaultdict(list)
    for node in graph.nodes:
        request = _request(node)
        if request is not None and is_whole(request.x):
            requests[request.x].append(request)
    asked = [r for rs in requests.values() for r in rs]
    inner = {n for r in asked for n in (r.node, r.transform, r.makes_amax and r.amax) if n}
    count = 0
    for group in groups(requests, with_producers(graph, inner)):
        if len({r.seed for r in group.requests} - {None}) <= 1 and _pays(group):
            _replace(graph, group)
            count += len(group.requests)
    if count:
        stable_topological_sort(graph)
    return count


def _request(node: fx.Node) -> Request | None:
    args: Any = node.args
    if node.op != "call_function":
        return None
    if node.target in MX and args[1] is E4M3:
        way, rows = MX[node.target]
        how = "floor" if args[2] else "rceil"
        return Request(node, args[0], way, rows, how, swizzles=_swizzles(node))
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
    )
    is_transform = x.target is ops.hadamard.op and x.args[1] == ops.hadamard.SIGNS
    readers = {node, amax} if made.makes_amax else {node}
    if is_transform and (way, rows) == ("n", 1) and set(x.users) <= readers:
        made.x, made.way, made.transform = x.args[0], "h", x
    return made


def _swizzles(node: fx.Node) -> tuple[fx.Node, ...]:
    """What reads the scales, where that is ``swizzle`` alone."""
    readers = {u for pair in node.users if pair.args[1] == 1 for u in pair.users}
    return tuple(readers) if all(u.target is ops.swizzle.op for u in readers) else ()


def _pays(group: Group) -> bool:
    """Whether the fused ops read and write no more full bf16 tensors than what they replace."""
    inputs, requests = group.cone.num_full, group.requests
    forms = [(r, name) for name, rs in group.results for r in rs]
    if len(forms) == 1 and not group.cone.statements and not requests[0].transform:
        return bool(requests[0].swizzles)  # the same kernel, and one fewer
    chain = inputs + len(group.results) if group.cone.statements else 0
    chain += sum(3 if r.transform else 1 for r in requests)
    chain += len({r.amax for r in requests if r.makes_amax})
    casts = {name if r.way != "n" else "" for r, name in forms}
    passes = len(casts) + any(r.makes_amax for r in requests)
    return inputs * passes <= chain


def _replace(graph: fx.Graph, group: Group) -> None:
    if not group.cone.statements and not any(r.transform for r in group.requests):
        for request in group.requests:
            request.makes_amax = False  # ``amax_tensor`` reads what is in memory no worse
    fake_mode: Any = value(group.requests[0].x).fake_mode  # type: ignore[attr-defined]
    make = partial(call, graph, fake_mode)
    program = group.cone.program([name for name, _ in group.results]).text()
    forms: list[tuple[Request, Form]] = [
        (r, r.form(i)) for i, (_, rs) in enumerate(group.results) for r in rs
    ]
    seed = next((r.seed for r, _ in forms if r.seed is not None), None)
    after = [leaf for leaf, _ in group.cone.leaves] + ([seed] if seed is not None else [])
    after += [r.amax for r, _ in forms if r.amax is not None and not r.makes_amax]
    with graph.inserting_before(last(after).next):
        inputs = [matrix(make, group.cone, leaf, kind) for leaf, kind in group.cone.leaves]
        wants = list(dict.fromkeys(form.amax for r, form in forms if r.makes_amax))
        amaxes: dict[str, fx.Node] = {}
        if wants:
            every = make(ops.fused_amax_micro.op, inputs, program, wants)
            amaxes = {want: make(operator.getitem, every, i) for i, want in enumerate(wants)}
        reads = [amaxes[f.amax] if r.makes_amax else r.amax for r, f in forms if f.amax]
        texts = [form.text for _, form in forms]
        made = make(ops.fused_cast_micro.op, inputs, reads, seed, program, texts)
        pairs = [
            [make(operator.getitem, made, 2 * i + j) for j in (0, 1)] for i in range(len(forms))
        ]
    for (request, form), (values, scales) in zip(forms, pairs, strict=True):
        for item in list(request.node.users):
            if item.args[1] == 0:
                item.replace_all_uses_with(values)
            elif not request.swizzles:
                item.replace_all_uses_with(scales)
        for swizzle in request.swizzles:
            swizzle.replace_all_uses_with(scales)
        if request.makes_amax and request.amax is not None:
            request.amax.replace_all_uses_with(amaxes[form.amax])
