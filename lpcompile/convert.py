"""``lpcompile.convert(model)``: low precision without the compiler, linear by linear.

Every ``nn.Linear`` becomes one over ``lpcompile.linear``, in place: the same module with the same
parameters, hooks and state_dict keys and another class, as FSDP2 does it, so that whoever holds
the module (a tied layer, an optimizer, tensor parallelism) holds the converted one. Building new
modules would lose the hooks, and with them tensor parallelism.

There is no graph to look at here, so what stays in bf16 by structure is found in the modules: an
LM head has a row for each row of an embedding and lies in no block that repeats (an embedding of
positions may have as many rows as the model is wide), a router one for each of the experts beside
it. A matrix that no ``nn.Linear`` multiplies is left alone, and named.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lpcompile import experts, functional
from lpcompile.api import check_rules, siblings
from lpcompile.errors import check_module
from lpcompile.graph import clean_path
from lpcompile.options import Rule, overlaid, parse
from lpcompile.recipes import BF16, DEFAULT, PRODUCTS, Product, Recipe, get_recipe, name_of
from lpcompile.report import Report, Row
from lpcompile.select import SMALLEST, Depth


class Linear(nn.Linear):
    """``nn.Linear`` with its three GEMMs as a recipe says; x and weight bf16, or under autocast.

    is_named: a rule gave it its recipe, which ``switch`` leaves as it is.
    """

    recipe: Recipe
    is_named: bool

    def forward(self, x: Tensor) -> Tensor:
        """x[..., K] -> y[..., N]."""
        w: Tensor = self.weight
        bias: Tensor | None = self.bias
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, w = x.to(dtype), w.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if self.recipe.is_bf16:
            return F.linear(x, w, bias)
        return functional.linear(x, w, bias, recipe=self.recipe)

    def extra_repr(self) -> str:
        """The sizes, and the recipe's name."""
        return f"{super().extra_repr()}, recipe={name_of(self.recipe)}"


def convert(
    model: nn.Module, recipe: str | Recipe = DEFAULT, *, rules: Iterable[Any] = ()
) -> Report:
    """Have every ``nn.Linear`` and stack of experts compute as a recipe says, eager, in place.

    rules: as in Options, with paths from ``model``; RuleError for one that matches no module.
    To be called before ``fully_shard``; before or after ``parallelize_module``. A row per product
    of every linear comes back, with the reason for each left alone; M is not known, and the rows
    say nothing of a batch's cost.
    """
    check_module("convert", model)
    options = parse(overlaid(None, recipe=recipe, rules=rules))
    paths = {name: clean_path(name) for name, _ in model.named_modules()}
    check_rules(options.rules, list(paths.values()))
    depth, structural = Depth(set(paths.values())), _structural(model)
    report = Report()
    for name, module in model.named_modules():
        stacks = _stacks(module)
        if not isinstance(module, nn.Linear) and not stacks:
            for of in _matrices(module):
                why = f"{of!r} is not an nn.Linear's: its GEMMs are narrowed in a compiled model"
                left = dict.fromkeys(PRODUCTS, why)
                report.rows += _rows(paths[name], (None, None, 1), BF16, None, left)
            continue
        rule = depth.rule_of(paths[name], options.rules)
        chosen = get_recipe(rule.recipe if rule else options.recipe)
        if not isinstance(module, nn.Linear):
            if not (rule and chosen.is_bf16):
                if not isinstance(module, experts.Experts):
                    module.__class__ = experts.subclass(type(module))
                vars(module).update(recipe=chosen, is_named=rule is not None)
            left = experts.obstacles(chosen)
            for e, n, k in stacks:
                report.rows += _rows(paths[name], (n, k, e), chosen.grouped or chosen, rule, left)
            continue
        reason = _obstacle(module)
        if not (rule and rule.names(paths[name])):
            reason = reason or structural.get(module, "")
        if not reason and not (rule and chosen.is_bf16):
            # A whole model may start in bf16, and be switched.
            module.__class__ = Linear
            vars(module).update(recipe=chosen, is_named=rule is not None)
        left = dict.fromkeys(PRODUCTS, reason)
        sizes = (module.out_features, module.in_features, 1)
        report.rows += _rows(paths[name], sizes, chosen, rule, left)
    return report


def _obstacle(module: nn.Linear) -> str:
    """Why a linear cannot be converted, or nothing."""
    if type(module) not in (nn.Linear, Linear):
        return f"a {type(module).__name__}, which may use its weight without calling nn.Linear"
    for letter, size in (("n", module.out_features), ("k", module.in_features)):
        if size < SMALLEST:
            return f"{letter}={size} is below {SMALLEST}"
    return ""


def _structural(model: nn.Module) -> dict[nn.Module, str]:
    """The linears that stay bf16 unless a rule names them, with the reason."""
    found: dict[nn.Module, str] = {}
    vocabularies = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    # Models beside each other, each with an embedding of its own, are no blocks.
    repeated = [
        block
        for alike in siblings(model)
        for block in alike
        if not any(isinstance(m, nn.Embedding) for m in block.modules())
    ]
    inside = {m for block in repeated for m in block.modules() if m is not block}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        above = model.get_submodule(".".join(name.split(".")[:-2]))
        if module.out_features in vocabularies and module not in inside:
            found[module] = "an LM head: it has a row for each row of an embedding"
        elif module.out_features in _experts_under(above):
            found[module] = "a router: it has a row for each of the experts beside it"
    return found


def _experts_under(module: nn.Module) -> set[int]:
    """How many experts there are in the stacks of weights, and lists of modules, of a module."""
    stacks = {p.shape[0] for p in module.parameters() if p.dim() == 3}
    lists = {len(m) for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    return stacks | lists


def _stacks(module: nn.Module) -> list[tuple[int, ...]]:
    """Sizes of a module's own stacks of weights [E, N, K]; torch.nn's are convolutions."""
    if type(module).__module__.startswith("torch.nn"):
        return []
    sizes = [tuple(p.shape) for p in module.parameters(recurse=False) if p.dim() == 3]
    return [s for s in sizes if s[0] > 1 and min(s[1:]) >= SMALLEST]


def _matrices(module: nn.Module) -> list[str]:
    """What a module that is no linear calls its own matrices; those of embeddings are tables."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag, ParametrizationList)):
        return []
    own = module.named_parameters(recurse=False)
    return [name for name, p in own if p.dim() == 2 and min(p.shape) >= SMALLEST]


def _rows(
    path: str,
    sizes: tuple[int | None, int | None, int],
    recipe: Recipe,
    rule: Rule | None,
    left: dict[Product, str],
) -> list[Row]:
    """The rows of one weight, of sizes n, k and num_groups; ``left`` says why a product is left."""
    rows = []
    label, asked = name_of(recipe), rule.said if rule else ""
    n, k, num_groups = sizes
    for product in PRODUCTS:
        is_narrow = not left.get(product) and recipe.gemm(product) is not None
        why = left.get(product) or asked
        if not is_narrow and not left.get(product):
            leaves = "" if recipe.is_bf16 else f"{label} leaves {product} in bf16"
            why = "; ".join(filter(None, (asked, leaves))) or "recipe bf16"
        shown = label if is_narrow else "bf16"
        rows.append(Row(path, product, None, n, k, num_groups, shown, is_narrow, why))
    return rows
