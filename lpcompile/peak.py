"""What a graph holds in memory while it runs, and the order of a part of it that holds least.

A buffer lives from the call that makes it to the last that reads it; what the caller holds counts
nothing. Pointwise results that only pointwise ops and sums read are never written: Inductor fuses
them. With weights and dY, the most of ``lives`` was what an H200 had allocated at its peak, to
10 MiB, for five models of experts and a layer of Llama3-8B (torch 2.11).

The best order is searched, not guessed: what is alive depends on what has run and not on the order
in which it has, so a state is a set of calls, and a part of a graph has few hundred.
"""

import heapq
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import fx

from lpcompile.graph import TRANSPOSES, VIEWS, aten, is_own, num_bytes
from lpcompile.liveness import is_cheap
from lpcompile.ops.define import PRODUCTS

# How AOTAutograd names the inputs of a training graph that the caller holds. Those of an inference
# graph, "arg" to Inductor, count here as if they were freed after their last reader.
CALLERS = ("primals_", "tangents_")
ALIASES = (VIEWS | TRANSPOSES) - {aten.clone.default}
SUMS = {aten.sum.dim_IntList, aten.mean.dim}
MOST_CALLS, MOST_STATES = 64, 5_000  # beyond which a part is left as it is
# Of the least peak, what one kernel for several may add: as much as the maxima that it makes early.
SLACK = 1 / 1024


class Memory:
    """Which calls of a graph make and read its buffers; a buffer is named by a node."""

    def __init__(self, graph: fx.Graph) -> None:
        self.made: dict[fx.Node, list[fx.Node]] = defaultdict(list)  # by what makes them
        self.size: dict[fx.Node, int] = {}
        self.reads: dict[fx.Node, set[fx.Node]] = {}
        self.readers: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        fused = {node for node in graph.nodes if _is_fused(node)}
        for node in graph.nodes:
            if node not in fused and not _is_alias(node):
                self.reads[node] = _buffers(node, fused)
                for buffer in self.reads[node]:
                    self.readers[buffer].add(node)
            if node not in fused and _is_buffer(node):
                maker = node.args[0] if node.target is operator.getitem else node
                self.made[maker].append(node)
                self.size[node] = num_bytes(node)

    def is_call(self, node: fx.Node) -> bool:
        """Whether a node computes something that is written."""
        return node.op == "call_function" and node in self.reads

    def held(self, done: set[fx.Node]) -> int:
        """Bytes that are alive when some nodes have run: what they made for the others."""
        makers = ((b, maker) for maker, made in self.made.items() for b in made)
        return sum(self.size[b] for b, m in makers if m in done and not self.readers[b] <= done)

    def in_place(self, node: fx.Node, dying: Iterable[fx.Node]) -> int:
        """Bytes that a pointwise call needs no memory for: it writes over an input that dies."""
        if not is_cheap(node):
            return 0
        sizes = {self.size[buffer] for buffer in dying}
        return max((self.size[b] for b in self.made[node] if self.size[b] in sizes), default=0)

    def lives(self, nodes: Sequence[fx.Node]) -> list[int]:
        """Bytes alive while each of a graph's nodes runs, in that order."""
        left = {buffer: len(self.readers[buffer]) for buffer in self.size}
        live = sum(self.size[b] for n in nodes if n.op == "placeholder" for b in self.made[n])
        lives = []
        for node in nodes:
            reads, made = self.reads.get(node, ()), self.made[node]
            for buffer in reads:
                left[buffer] = left.get(buffer, 0) - 1
            dying = [b for b in reads if b in self.size and not left[b]]
            live += sum(self.size[b] for b in made) if node.op != "placeholder" else 0
            lives.append(live - self.in_place(node, dying))
            live -= sum(self.size[b] for b in [*dying, *(b for b in made if not left[b])])
        return lives


def _is_alias(node: fx.Node) -> bool:
    is_call = node.op == "call_function"
    return is_call and (node.target in ALIASES or node.target is operator.getitem)


def _is_fixed(node: fx.Node) -> bool:
    """Whether a node stays between those before and those after it.

    Collectives, which all ranks must meet in one order, random numbers, what writes to an argument
    and what is not known.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__module__", "") != "_operator"
    known = node.target.namespace in ("aten", "prims", "lpcompile")
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not known or random or node.target._schema.is_mutable


def _is_fused(node: fx.Node) -> bool:
    if _is_alias(node) or not is_cheap(node):
        return False
    return all(is_cheap(u) and not is_own(u) or u.target in SUMS for u in node.users)


def _is_buffer(node: fx.Node) -> bool:
    if node.op == "output" or (_is_alias(node) and node.target is not operator.getitem):
        return False
    held = node.op == "placeholder" and node.name.startswith(CALLERS)
    return num_bytes(node) > 0 and not held


def _buffers(node: fx.Node, fused: set[fx.Node]) -> set[fx.Node]:
    """What a node reads, under views and what is never written."""
    found: set[fx.Node] = set()
    seen, stack = {node}, [node]
    while stack:
        for i in stack.pop().all_input_nodes:
            if i not in seen:
                seen.add(i)
                inner = i in fused or (_is_alias(i) and i.target is not operator.getitem)
                stack.append(i) if inner else found.add(i)
    return found


@dataclass(frozen=True)
class Step:
    """Calls that run as one, each with what it alone needs of tensors that the caller holds.

    bits: the calls, as bits of their indices; needs: those that come before.
    """

    calls: tuple[fx.Node, ...]
    bits: int
    needs: int
    during: int  # bytes made that are alive while it runs
    after: int  # bytes made for others
    cost: int  # bytes that are read; 0 for what is never joined


class Part:
    """Adjacent nodes of a graph, to be put in the order that holds least.

    joins: sets of calls that may run as one, which then read their inputs once. pairs: more of
    them, of calls that were one; apart they are to read less, not to hold less.
    """

    def __init__(
        self,
        memory: Memory,
        nodes: Sequence[fx.Node],
        joins: Sequence[tuple[fx.Node, ...]],
        pairs: Sequence[tuple[fx.Node, ...]] = (),
    ) -> None:
        self.memory, self.nodes = memory, nodes
        self.pulled = _pulled(memory, nodes)
        calls = [n for n in nodes if memory.is_call(n) and n not in self.pulled]
        self.index = {node: i for i, node in enumerate(calls)}
        self._needs = self._precedence()
        self.dies = self._buffers()
        costly = {node for join in (*joins, *pairs) for node in join}
        self.single = [self._step((node,), costly) for node in calls]
        self.joined = [self._step(join, costly) for join in (*pairs, *joins)]
        apart = {call for pair in pairs for call in pair}
        self.given = [step for step in self.single if step.calls[0] not in apart]
        self.given += self.joined[: len(pairs)]

    def order(self, live: int, floor: int) -> list[Step] | None:
        """The steps in the order whose peak is least, if above ``floor``, and which reads least.

        live: bytes before the first. None where there is more to try than is worth while.
        """
        if len(self.single) > MOST_CALLS:
            return None
        found = _search(self.given, self.dies, live, floor)
        if found is None:
            return None
        floor = found[0] + int(found[0] * SLACK)
        joined = _search([*self.single, *self.joined], self.dies, live, floor)
        return (joined or found)[1]

    def nodes_in(self, steps: Sequence[Step]) -> list[fx.Node]:
        """Every node, where its step, the first that reads it or what it is an item of is."""
        left = dict.fromkeys(self.nodes)
        order: list[fx.Node] = []

        def place(node: fx.Node) -> None:
            if node in left:
                del left[node]
                for i in node.all_input_nodes:
                    place(i)
                order.append(node)
                for user in node.users:
                    if user.target is operator.getitem:
                        place(user)

        for call in (call for step in steps for call in step.calls):
            place(call)
        for node in list(left):
            place(node)
        return order

    def _bits(self, nodes: Iterable[fx.Node]) -> int:
        return sum({1 << self.index[self.pulled.get(n, n)] for n in nodes})

    def _precedence(self) -> dict[fx.Node, int]:
        """What each node needs, through what is no call."""
        needs: dict[fx.Node, int] = {}
        so_far = fixed = 0
        for node in self.nodes:
            needs[node] = so_far if _is_fixed(node) else fixed
            so_far |= 1 << self.index[node] if node in self.index else 0
            fixed = so_far if _is_fixed(node) else fixed
            for i in node.all_input_nodes:
                needs[node] |= 1 << self.index[i] if i in self.index else needs.get(i, 0)
        return needs

    def _buffers(self) -> list[tuple[int, int]]:
        """Bytes of each buffer that dies here, and the calls after which it is dead."""
        inside, found = set(self.nodes), []
        for node in self.nodes:
            for buffer in self.memory.made[node] if node in self.index else ():
                if self.memory.readers[buffer] <= inside:
                    bits = self._bits([node, *self.memory.readers[buffer]])
                    found.append((self.memory.size[buffer], bits))
        made = {b for node in self.nodes for b in self.memory.made[node]}
        read = {b for node in self.nodes for b in self.memory.reads.get(node, ())}
        for buffer in (read - made) & self.memory.size.keys():
            if all(r in inside for r in self.memory.readers[buffer]):
                found.append((self.memory.size[buffer], self._bits(self.memory.readers[buffer])))
        return found

    def _step(self, calls: tuple[fx.Node, ...], costly: set[fx.Node]) -> Step:
        memory, bits = self.memory, self._bits(calls)
        after = sum(memory.size[b] for call in calls for b in memory.made[call])
        pulled = [node for node, puller in self.pulled.items() if puller in calls]
        during = after + sum(memory.size[b] for node in pulled for b in memory.made[node])
        dying = [
            b
            for b in memory.reads[calls[0]] & memory.size.keys()
            if memory.readers[b] == {calls[0]}
        ]
        during -= memory.in_place(calls[0], dying)
        needs = 0
        for call in calls:
            needs |= self._needs[call]
        inputs = {i for call in calls if call in costly for i in memory.reads[call]}
        inputs -= {b for call in calls for b in memory.made[call]}
        return Step(calls, bits, needs & ~bits, during, after, sum(map(num_bytes, inputs)))


def _pulled(memory: Memory, nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Calls that read only what the caller holds, with the one call that they are made for.

    They run right before it: earlier they would only hold what they make.
    """
    light: set[fx.Node] = set()
    for node in nodes:
        if is_own(node) and node.target not in PRODUCTS and memory.is_call(node):
            read = memory.reads[node] & memory.size.keys()
            if all((b.args[0] if _is_alias(b) else b) in light for b in read):
                light.add(node)
    inside = set(nodes)
    pulled: dict[fx.Node, fx.Node] = {}
    for node in reversed(nodes):
        if node in light:
            readers = {r for b in memory.made[node] for r in memory.readers[b]}
            readers = {pulled.get(r, r) for r in readers}
            if len(readers) == 1 and readers <= inside:
                pulled[node] = readers.pop()
    return pulled


def _search(
    steps: Sequence[Step], dies: Sequence[tuple[int, int]], live: int, floor: int
) -> tuple[int, list[Step]] | None:
    """The steps in the order with the least peak, then cost, then closest to theirs; its peak."""
    everything = 0
    for step in steps:
        everything |= step.bits
    touched = {step: [d for d in dies if d[1] & step.bits] for step in steps}
    tick = count()
    heap: list[Any] = [(floor, 0, 0, next(tick), 0, live, None)]
    seen: set[int] = set()
    while heap and len(seen) < MOST_STATES:
        peak, cost, moved, _, done, live, path = heapq.heappop(heap)
        if done == everything:
            return peak, _steps(path)
        if done in seen:
            continue
        seen.add(done)
        for step in steps:
            if step.bits & done or step.needs & ~done:
                continue
            now = done | step.bits
            freed = sum(size for size, bits in touched[step] if not bits & ~now)
            highest, left = max(peak, live + step.during), live + step.after - freed
            passed = (~done & (step.bits - 1) & everything).bit_count()
            key = (highest, cost + step.cost, moved + passed, next(tick))
            heapq.heappush(heap, (*key, now, left, (path, step)))
            if highest == peak and left <= live and not step.cost:
                break  # nothing is lost by what lets go of as much as it makes
    return None


def _steps(path: Any) -> list[Step]:
    steps = []
    while path is not None:
        path, step = path
        steps.append(step)
    return steps[::-1]
