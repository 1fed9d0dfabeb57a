"""The passes of one compiled graph in order, each named, counted, checked and dumped.

    joint graph      find the GEMMs, choose their recipes, rewrite them; in inference, merge
    after the cut    what is chosen when it is known what runs in one graph (post-grad)

On a hit of Inductor's cache no pass runs, so nothing may rely on its having run.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn

import lpcompile
from lpcompile import ahead, lanes, placement, saved, structure, verify
from lpcompile.cost import DEVICES
from lpcompile.dumps import Dump
from lpcompile.flow import Flow, Leaves, is_called
from lpcompile.graph import hint, module_path
from lpcompile.options import BlockRule, Options, Rule
from lpcompile.passes import (
    addend,
    deduplicate,
    emulate,
    expert_loop,
    fuse,
    fuse_columns,
    fuse_micro,
    fuse_whole,
    grouped_mm,
    hoist,
    linear,
    pair_amax,
    schedule,
)
from lpcompile.recipes import get_recipe
from lpcompile.report import Row, SavedBytes
from lpcompile.select import Choice, Selection, annotated, annotation
from lpcompile.sites import SEEN, Site, find

log = logging.getLogger("lpcompile")


@dataclass
class Compile:
    """One call of the backend: its options, what its inputs are, and what the passes found."""

    options: Options
    leaves: Leaves
    key: str  # of the Dynamo graph: see ``graph_key``
    rows: list[Row] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # what each pass changed
    has_run: bool = False
    has_regions: bool = False  # nested compile regions, each cut by itself
    matched: set[Rule] = field(default_factory=set)
    asks: bool = False  # whether some GEMM was to be narrowed
    measures: bool = False  # also cut the graph as it was, for ``saved_bytes``
    originals: dict[fx.Graph, fx.Graph] = field(default_factory=dict)  # as they were, by graph
    saved_bytes: SavedBytes | None = None
    dump: Dump | None = None
    kernels: list[Future[int]] = field(default_factory=list)  # compiled beside Inductor's

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Patterns of rules that matched no GEMM of this graph, or of those that it calls."""
        given = (r for r in self.options.rules if not isinstance(r, BlockRule))
        return tuple(rule.pattern for rule in given if rule not in self.matched)

    @property
    def watches_cut(self) -> bool:
        """Whether the partitioner is wrapped in ``Partition``."""
        return self.measures or self.options.verify or self.dump is not None


_observers: ContextVar[tuple[tuple[list[Compile], bool], ...]] = ContextVar("observers", default=())


@contextmanager
def observe(measures: bool = False) -> Iterator[list[Compile]]:
    """Collects the Compile of every graph that the backend compiles inside it.

    measures: with ``saved_bytes``, for which every graph is cut twice.
    """
    seen: list[Compile] = []
    token = _observers.set((*_observers.get(), (seen, measures)))
    try:
        yield seen
    finally:
        _observers.reset(token)


def register(compile: Compile) -> None:
    """Show a Compile to whoever observes."""
    for seen, measures in _observers.get():
        seen.append(compile)
        compile.measures |= measures


class JointPass(CustomGraphPass):
    """Every pass on the joint graph, or on a forward without a backward."""

    def __init__(self, compile: Compile) -> None:
        self.compile = compile

    def __call__(self, graph: fx.Graph) -> None:
        compile = self.compile
        compile.has_run = True
        if compile.measures:
            compile.originals[graph] = saved.copy(graph)
        if compile.dump:
            compile.dump.given(graph, "traced")
        if compile.options.verify:
            verify.begin(graph)
        flow = Flow(graph, compile.leaves)
        sites = find(graph, flow)
        notes: expert_loop.Notes = {}
        found = lanes.find(graph, flow)
        if found.families or found.untiled:
            group = partial(_group, graph, found, sites, compile.options, notes)
            run_steps(graph, [("expert_loop", group)], compile, compile.leaves)
            flow = Flow(graph, compile.leaves)
            sites = find(graph, flow)
        choices = _choose(graph, sites, compile, notes)
        before = saved.copy(graph) if compile.dump else graph
        rows = {site.node.name: _row(site, choice) for site, choice in choices}
        compile.rows += rows.values()
        late = placement.late([(s, c.gemm) for s, c in choices if c.gemm is not None], flow)
        steps: list[tuple[str, Callable[[], int]]] = [
            ("linear", partial(linear.rewrite, choices, late)),
            ("grouped_mm", partial(grouped_mm.rewrite, choices, late)),
            ("hoist", partial(hoist.run, graph)),  # reads what they wrote
            ("pair_amax", partial(pair_amax.run, graph)),  # of what hoist left in its place
        ]
        if not flow.gradients:
            steps.append(("deduplicate", partial(deduplicate.run, graph)))
        run_steps(graph, steps, compile, compile.leaves)
        if compile.dump:
            compile.dump.gemms(before, graph, rows)

    def uuid(self) -> str:
        # Recipes and devices by what they are too: a user may have put others under a name.
        options = self.compile.options
        named = [options.recipe, *(rule.recipe for rule in options.rules)]
        recipes = [get_recipe(name) for name in named]
        said = repr((options, recipes, DEVICES))
        return " ".join((self.compile.key, hashlib.sha256(said.encode()).hexdigest(), sources()))


AFTER_THE_CUT: list[tuple[str, Callable[[fx.Graph], int]]] = [
    ("fuse_columns", fuse_columns.run),  # of what is left to this graph, before it is paired
    ("fuse", fuse.run),
    ("fuse_whole", fuse_whole.run),
    ("emulate", emulate.run),  # before fuse_micro, which fuses the dequantizes that it makes
    ("fuse_micro", fuse_micro.run),
    ("schedule", schedule.run),  # it orders what the others made
    ("addend", addend.run),  # last: the GEMM that then comes last can add what the other made
]


class PostPass(CustomGraphPass):
    """Every pass on a forward or a backward after partitioning."""

    def __init__(self, compile: Compile) -> None:
        self.compile = compile

    def __call__(self, graph: fx.Graph) -> None:
        if self.compile.dump:
            self.compile.dump.given(graph, "post_grad")
        steps = [(name, partial(run, graph)) for name, run in AFTER_THE_CUT]
        run_steps(graph, steps, self.compile)
        if self.compile.options.codegen == "inductor":
            self.compile.kernels += ahead.start(graph)

    def uuid(self) -> str:
        return f"{self.compile.options.verify} {sources()}"


def run_steps(
    graph: fx.Graph,
    steps: Sequence[tuple[str, Callable[[], int]]],
    compile: Compile,
    leaves: Leaves | None = None,
) -> None:
    """Run passes in order, each of which gives the number of changes that it made.

    leaves: of a joint graph, in which it is checked too where nodes are to run.
    """
    for name, step in steps:
        before = verify.Before.of(graph) if compile.options.verify else None
        count = step()
        graph.eliminate_dead_code()
        graph.lint()
        compile.counts[name] = compile.counts.get(name, 0) + count
        log.debug("pass %s: %d", name, count)
        if before is not None:
            verify.passed(graph, name, before, leaves)
        if compile.dump:
            compile.dump.passed(graph, name, count)


class Partition(CustomPartitionerFn):
    """Inductor's min-cut, watched: what it saves for the backward, before and after rewriting."""

    def __init__(self, compile: Compile) -> None:
        self.compile = compile

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        compile, outputs = self.compile, kwargs["num_fwd_outputs"]
        joint, original = gm.graph, compile.originals.pop(gm.graph, None)
        forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
        if compile.options.verify:
            verify.cut(forward.graph, backward.graph, compile.leaves, outputs)
        if original is not None:
            whole = fx.GraphModule(gm, original)
            before, _ = min_cut_rematerialization_partition(whole, joint_inputs, **kwargs)
            # A nested region is cut before the graph that calls it, which does not show what of its
            # outputs the region itself saves: then the bytes are not known.
            compile.has_regions |= is_called(joint)
            if not compile.has_regions:
                cuts = (before.graph, forward.graph)
                found = (saved.find(cut, compile.leaves, outputs) for cut in cuts)
                compile.saved_bytes = SavedBytes(*map(saved.total, found))
            if compile.dump:
                compile.dump.cut(joint, forward, backward, before, compile.leaves, outputs)
        return forward, backward

    def uuid(self) -> str:
        return sources()


def _group(
    graph: fx.Graph,
    found: lanes.Lanes,
    sites: list[Site],
    options: Options,
    notes: expert_loop.Notes,
) -> int:
    # A loop that cannot be grouped is linears, which may do what strictness asks for.
    selection = Selection(replace(options, strict=False), structure.find(graph, sites), sites)
    return expert_loop.run(graph, found, sites, selection, notes)


def _choose(
    graph: fx.Graph, sites: list[Site], compile: Compile, notes: expert_loop.Notes
) -> list[tuple[Site, Choice]]:
    """notes: what the reason of a product begins with."""
    selection = Selection(compile.options, structure.find(graph, sites), sites)
    choices = []
    for site in sites:
        choice = selection.choose(site)
        note = notes.get((site.forward or site).node) or notes.get(site.node)
        reason = "; ".join(filter(None, (note, choice.reason)))
        choices.append((site, replace(choice, reason=reason)))
    for site in sites:
        site.node.meta[SEEN] = True
    compile.matched |= selection.matched
    compile.asks |= selection.asks
    return choices


def _row(site: Site, choice: Choice) -> Row:
    return Row(
        site.module,
        site.product,
        site.m,
        site.n,
        site.k,
        site.num_groups,
        choice.label if choice.gemm else "bf16",
        choice.gemm is not None,
        choice.reason,
        choice.estimate,
    )


def graph_key(gm: fx.GraphModule, leaves: Leaves) -> str:
    """A digest of what steers the passes and is not in torch's cache key.

    Not there (torch 2.11 to 2.13), so that a constant uuid would take another graph's entry: what
    ``torch.fx.traceback.annotate`` said, module paths, and the hints of symbolic sizes, by which
    the cost model decides.
    """
    digest = hashlib.sha256(repr((sorted(leaves.parameters), sorted(leaves.buffers))).encode())
    # The body of a checkpoint, and of any higher-order op, is a graph of its own.
    for module in (m for m in gm.modules() if isinstance(m, fx.GraphModule)):
        for node in module.graph.nodes:
            asked, hints = annotation(node), _hints(node.meta.get("example_value"))
            recipe = None if asked is None else annotated(asked)
            digest.update(f"{node.name} {module_path(node)} {hints} {recipe}\n".encode())
    return digest.hexdigest()


def _hints(made: Any) -> list[int | None]:
    """The sizes of a tensor, or a size itself, as numbers."""
    sizes = made.shape if isinstance(made, torch.Tensor) else [made]
    return [hint(s) for s in sizes if isinstance(s, int | torch.SymInt)]


@cache
def sources() -> str:
    """A digest of lpcompile's source files: a changed source must miss the cache."""
    digest = hashlib.sha256(torch.__version__.encode())
    folder = Path(lpcompile.__file__).parent
    folders = [folder, *(f for f in folder.iterdir() if f.is_dir())]  # rglob skips linked folders
    for path in sorted(p for f in folders for p in f.glob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
