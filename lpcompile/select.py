"""Which recipe a GEMM gets, and why: annotation, then rules, then structure, then the cost model.

Nothing here looks at the machine that runs: every rank, and a report made elsewhere, decides alike.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

import torch
from torch import fx

from lpcompile import cost, gemm_grouped
from lpcompile.cones import is_pointwise
from lpcompile.errors import RecipeError, StrictError
from lpcompile.graph import base, peel, value
from lpcompile.ops import quantize_fp8_whole
from lpcompile.options import Options, Rule
from lpcompile.recipes import BF16, Gemm, Recipe, get_recipe, name_of
from lpcompile.sites import Site

SMALLEST = 16  # a linear with fewer outputs or inputs is not worth a quantize


@dataclass(frozen=True)
class Choice:
    """The Gemm that a site gets, or None, with the recipe's label and the reason.

    estimate: its time both ways, where it was asked for and can be, and its sizes are fixed.
    """

    label: str
    gemm: Gemm | None
    reason: str
    estimate: cost.Estimate | None = None


class Selection:
    """The choices of one graph. Remembers which rules matched, and whether any asks to narrow."""

    def __init__(self, options: Options, structural: dict[fx.Node, str], sites: list[Site]) -> None:
        self.options, self.structural = options, structural
        self.matched: set[Rule] = set()
        self.asks = False
        self.depth = Depth({site.module for site in sites})
        self.readers = Counter(r for s in sites if s.is_linear for r in _reads(s))

    def choose(self, site: Site) -> Choice:
        """What this GEMM becomes. StrictError where ``strict`` asks for it."""
        recipe, label, named, why = self._recipe_of(site)
        if site.grouping and recipe.grouped is not None:
            recipe = recipe.grouped
        if recipe.is_bf16:
            return Choice("bf16", None, why)
        self.asks = True
        structural = self.structural.get((site.forward or site).node)
        if structural and not named:
            return Choice("bf16", None, structural)
        gemm = recipe.gemm(site.product)
        if gemm is None:
            left = f"{label} leaves {site.product} in bf16"
            return Choice("bf16", None, f"{why}; {left}" if why else left)
        obstacle = site.obstacle or _dtype_obstacle(site) or _size_obstacle(site)
        if site.grouping:
            along_tokens = site.grouping == "ragged" and site.product == "wgrad"
            obstacle = obstacle or gemm_grouped.obstacle(gemm, along_tokens=along_tokens)
        if obstacle:
            if self.options.strict and site.is_linear:
                raise StrictError(
                    f"{site.product} of {site.module or 'the root module'} is to be {label} "
                    f"({why or 'the default'}), and cannot be: {obstacle}. Change that, give it a "
                    f"rule Rule({site.module!r}, 'bf16'), or leave out strict"
                )
            return Choice("bf16", None, obstacle)
        return self._weighed(site, recipe, label, gemm, why)

    def is_alike(self, sites: Iterable[Site]) -> bool:
        """Whether one recipe is for all of them."""
        return len({self._recipe_of(site)[0] for site in sites}) == 1

    def _weighed(self, site: Site, recipe: Recipe, label: str, gemm: Gemm, why: str) -> Choice:
        sizes = (site.m, site.n, site.k)
        if None in sizes:
            return Choice(label, gemm, why)
        target = self.options.target_of(recipe)
        m, n, k = (s for s in sizes if s is not None)
        sides = [
            (self.readers[read], _num_reads(operand, site, recipe))
            for operand, read in zip((site.lhs, site.rhs), _reads(site), strict=True)
        ]
        lhs, rhs = sides if site.lhs_is_first else sides[::-1]
        estimate = cost.gain(
            site.product,
            gemm,
            m,
            n,
            k,
            cost.DEVICES[target],
            num_groups=site.num_groups,
            readers=(lhs[0], rhs[0]),
            reads=(lhs[1], rhs[1]),
        )
        if self.options.rewrite == "all":
            return Choice(label, gemm, why, estimate)
        if not estimate.profitable:
            return Choice("bf16", None, f"unprofitable on {target}", estimate)
        times = f"{estimate.bf16_us:.0f} us in bf16, {estimate.lowprec_us:.0f} us in {label}"
        return Choice(label, gemm, f"{why}; {times} on {target}" if why else times, estimate)

    def _recipe_of(self, site: Site) -> tuple[Recipe, str, bool, str]:
        """The recipe, its label, whether something names this module, and what does."""
        asked = annotation(site.node)
        if asked is None and site.forward is not None:
            asked = annotation(site.forward.node)
        if asked is not None:
            return annotated(asked), name_of(asked), True, f"annotated {name_of(asked)}"
        rule = self.depth.rule_of(site.module, self.options.rules)
        if rule is not None:
            self.matched.add(rule)
            recipe, name = get_recipe(rule.recipe), name_of(rule.recipe)
            return recipe, name, rule.names(site.module), rule.said
        recipe = get_recipe(self.options.recipe)
        why = "recipe bf16" if recipe.is_bf16 else ""
        return recipe, name_of(self.options.recipe), False, why


def _reads(site: Site) -> tuple[tuple[fx.Node, bool], tuple[fx.Node, bool]]:
    """What a GEMM quantizes: the tensor under views, and whether along its other dimension.

    Under views, since every linear has its own of the x that it shares: AOT merges them later.
    """
    a_t, b_t = peel(site.lhs)[1], peel(site.rhs)[1]
    return (base(site.lhs), a_t), (base(site.rhs), not b_t)


def _num_reads(operand: fx.Node, site: Site, recipe: Recipe) -> int | None:
    """How often an operand is read to be quantized, or None where nothing is merged with that.

    What is made by pointwise ops is quantized as it is made; dY both ways from as many reads. What
    the forward narrowed likewise has its amax from there. Of small weights of experts L2 has the
    second read.
    """
    if is_pointwise(base(operand)):
        return 0
    fprop, dgrad, wgrad = recipe.fprop, recipe.dgrad, recipe.wgrad
    is_first = operand is (site.lhs if site.lhs_is_first else site.rhs)  # X, or dY
    if site.product == "fprop":
        if is_first or fprop is None or fprop.rhs.along != "tensor":
            return None
        size = (site.n or 0) * (site.k or 0)
        return 1 if quantize_fp8_whole.pays(site.num_groups, size) else None
    if is_first:
        return 1 if dgrad and wgrad else None
    if site.product == "dgrad":
        return 1 if fprop and dgrad and fprop.rhs == dgrad.rhs else None
    return 1 if fprop and wgrad and fprop.lhs == wgrad.rhs else None


def annotation(node: fx.Node) -> str | Recipe | None:
    """What ``torch.fx.traceback.annotate({"lowprec": ...})`` says of a node."""
    said = (node.meta.get("custom") or {}).get("lowprec")
    if said is not None and not isinstance(said, (str, Recipe)):
        raise RecipeError(f"annotate({{'lowprec': ...}}) takes a recipe or its name, got {said!r}")
    return said


def annotated(asked: str | Recipe) -> Recipe:
    """The recipe that an annotation asks for."""
    return BF16 if asked == "skip" else get_recipe(asked)


class Depth:
    """Which block of the model a path is in: the first number in it, of how many there are."""

    def __init__(self, paths: set[str]) -> None:
        self.count: dict[str, int] = {}
        for path in paths:
            stem, index = _block(path)
            if index is not None:
                self.count[stem] = max(self.count.get(stem, 0), index + 1)

    def rule_of(self, path: str, rules: Iterable[Rule]) -> Rule | None:
        """The first rule that matches a path, or None."""
        return next((rule for rule in rules if self.admits(rule, path)), None)

    def admits(self, rule: Rule, path: str) -> bool:
        """Whether a rule matches a path, its first and last counted in blocks."""
        if not rule.covers(path):
            return False
        if rule.first is None and rule.last is None:
            return True
        stem, index = _block(path)
        if index is None:
            return False
        total = self.count[stem]
        if rule.first is not None:
            return index < blocks(rule.first, total)
        return index >= total - blocks(rule.last or 0, total)


def blocks(amount: float, total: int) -> int:
    """A count, or a share of ``total`` rounded up, as a number of blocks."""
    return min(total, ceil(amount * total - 1e-9) if isinstance(amount, float) else int(amount))


def _block(path: str) -> tuple[str, int | None]:
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:i]), int(part)
    return path, None


def _dtype_obstacle(site: Site) -> str:
    dtypes = {value(site.lhs).dtype, value(site.rhs).dtype}
    if dtypes == {torch.bfloat16}:
        return ""
    names = " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
    device = value(site.node).device.type
    return (
        f"its operands are {names}: convert the model to bfloat16, or run it under "
        f"torch.autocast({device!r}, torch.bfloat16)"
    )


def _size_obstacle(site: Site) -> str:
    for letter, size in (("n", site.n), ("k", site.k)):
        if size is not None and size < SMALLEST:
            return f"{letter}={size} is below {SMALLEST}"
    return ""
