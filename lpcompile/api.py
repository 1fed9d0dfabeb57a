"""Ways in beside ``backend="lowprec"``: ``compile_blocks(model)`` and ``@lowprec()``.

Per-block compile makes one graph that all alike blocks share, so compile time does not grow with
depth, and rules that speak of whole models ("the last 15% of the blocks") are resolved here, where
every name is known: a block sees only paths relative to itself.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo import trace_rules
from torch._dynamo.external_utils import wrap_inline

from lpcompile.errors import LowPrecisionError, RuleError, check_module, did_you_mean
from lpcompile.graph import clean_path
from lpcompile.options import BlockRule, Options, Rule, overlaid, parse
from lpcompile.recipes import Recipe
from lpcompile.select import Depth

T = TypeVar("T", bound=Callable[..., Any])
Blocks = type[nn.Module] | Iterable[nn.Module] | None

SWITCHED = "_lpcompile_recipe"  # on an instance of a decorated class, the recipe it is switched to


def compile_blocks(
    model: nn.Module,
    blocks: Blocks = None,
    *,
    recipe: str | Recipe | None = None,
    rules: Iterable[Any] = (),
    options: Mapping[str, Any] | None = None,
    fullgraph: bool = True,
    dynamic: bool | None = None,
) -> dict[str, nn.Module]:
    """Compile each transformer block of ``model`` in place by ``backend="lowprec"``.

    blocks: the class of the blocks, or the blocks themselves; found when left out: the class that
        repeats in a ModuleList or ModuleDict and holds the most parameters.
    rules: as in Options, with paths from ``model``; a rule that matches no module is a RuleError.
    Returns the compiled blocks by path. state_dict keys stay as they are.
    """
    check_module("compile_blocks", model)
    found = _named_blocks(model, blocks)
    chosen = overlaid(options, recipe=recipe, rules=rules or None)
    resolved = _resolve(model, found, parse(chosen))
    for path, block in found.items():
        per_block = {**chosen, "rules": resolved[path]}
        # What block.compile does, which pickle and deepcopy know to leave out.
        block._compiled_call_impl = torch.compile(
            not_skipped(block._call_impl),
            backend="lowprec",
            options=per_block,
            fullgraph=fullgraph,
            dynamic=dynamic,
        )
    return found


def lowprec(
    recipe: str | Recipe | None = None,
    *,
    rules: Iterable[Any] = (),
    options: Mapping[str, Any] | None = None,
    fullgraph: bool = True,
    dynamic: bool | None = None,
) -> Callable[[T], T]:
    """A decorator for a Module class or a function: its forward, compiled in low precision.

    A decorated class stays the same class object, so state_dict, pickle and deepcopy of its
    instances do not change. Paths in rules are relative to the decorated module; the first call
    raises a RuleError for a rule that matches none of its modules.
    """
    if callable(recipe):
        raise LowPrecisionError(
            f"@lowprec takes a recipe, got {recipe!r}: write @lpcompile.lowprec(), with parentheses"
        )
    chosen = overlaid(options, recipe=recipe, rules=rules or None)
    given = parse(chosen)

    def decorate(what: T) -> T:
        if isinstance(what, type) and issubclass(what, nn.Module):
            what.forward = _compiled(what.forward, given, chosen, fullgraph, dynamic)
            return what
        if isinstance(what, nn.Module) or not callable(what):
            raise LowPrecisionError(
                f"@lowprec decorates a Module class or a function, got {type(what).__name__}: "
                "for a module use module.compile(backend='lowprec')"
            )
        return _compiled(what, given, chosen, fullgraph, dynamic)

    return decorate


def _compiled(
    function: T, options: Options, chosen: Mapping[str, Any], fullgraph: bool, dynamic: bool | None
) -> T:
    checked: set[type] = set()

    @functools.cache
    def compiled(recipe: str | Recipe | None) -> Callable[..., Any]:
        return torch.compile(
            not_skipped(function),
            backend="lowprec",
            options=overlaid(chosen, recipe=recipe),
            fullgraph=fullgraph,
            dynamic=dynamic,
        )

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # an outer compile traces what is decorated
            return function(*args, **kwargs)
        recipe = None
        if args and isinstance(args[0], nn.Module):
            recipe = getattr(args[0], SWITCHED, None)
            if options.rules and type(args[0]) not in checked:
                check_rules(
                    options.rules, [clean_path(name) for name, _ in args[0].named_modules()]
                )
                checked.add(type(args[0]))
        return compiled(recipe)(*args, **kwargs)

    call._lpcompile_compiles = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def not_skipped(function: T) -> T:
    """The function, behind a frame of its own where Dynamo would skip it, as it does torch.nn's.

    A module of torch's (nn.Sequential, nn.TransformerEncoderLayer) that is compiled by its own
    ``compile`` runs as if it were not (torch 2.11 to 2.13); torch.compile of it does this too.
    """
    method = getattr(function, "__self__", None)
    called = method.forward if isinstance(method, nn.Module) else function
    return wrap_inline(function) if trace_rules.check(called) else function  # type: ignore[return-value]


def _named_blocks(model: nn.Module, blocks: Blocks) -> dict[str, nn.Module]:
    if blocks is None:
        blocks = _repeated_class(model)
    if isinstance(blocks, type):
        wanted: Callable[[nn.Module], bool] = functools.partial(_is_a, cls=blocks)
    else:
        ids = {id(b) for b in blocks}
        wanted = lambda m: id(m) in ids  # noqa: E731
    found = {name: m for name, m in model.named_modules() if wanted(m)}
    if not found:
        raise LowPrecisionError(
            f"no block to compile in {type(model).__name__}: {blocks!r} is none of its modules; "
            "pass the blocks' class, or the blocks"
        )
    return found


def _is_a(module: nn.Module, cls: type[nn.Module]) -> bool:
    return isinstance(module, cls)


def _repeated_class(model: nn.Module) -> type[nn.Module]:
    """The class of siblings in a container that hold the most parameters between them."""
    sizes: Counter[type[nn.Module]] = Counter()
    for alike in siblings(model):
        sizes[type(alike[0])] += sum(p.numel() for m in alike for p in m.parameters())
    best = sizes.most_common(1)
    if not best or not best[0][1]:
        raise LowPrecisionError(
            f"{type(model).__name__} repeats no block in a ModuleList, ModuleDict or Sequential: "
            "pass the blocks' class or the blocks, or use model.compile(backend='lowprec')"
        )
    return best[0][0]


def siblings(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Modules of one class beside each other in a container, two or more."""
    for container in model.modules():
        if isinstance(container, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            by_class: dict[type[nn.Module], list[nn.Module]] = defaultdict(list)
            for child in container.children():
                by_class[type(child)].append(child)
            yield from (alike for alike in by_class.values() if len(alike) > 1)


def _resolve(
    model: nn.Module, blocks: dict[str, nn.Module], options: Options
) -> dict[str, tuple[Rule, ...]]:
    """For every block, the rules in paths of its own: equal for alike blocks, so they share."""
    names = {name: clean_path(name) for name, _ in model.named_modules()}
    check_rules(options.rules, list(names.values()))
    depth = Depth(set(names.values()))
    resolved = {}
    for path, block in blocks.items():
        chosen: dict[str, Rule | None] = {}
        own: list[Rule] = []
        for inner, _ in block.named_modules():
            full, within = names[f"{path}.{inner}".strip(".")], clean_path(inner)
            rule = chosen[within] = depth.rule_of(full, options.rules)
            above = chosen.get(within.rpartition(".")[0]) if within else None
            if rule is not None and (rule is not above or rule.names(full)):
                pattern = "*" if rule.is_catch_all and not within else within
                own.append(BlockRule(pattern, rule.recipe, is_name=rule.names(full)))
        resolved[path] = tuple(reversed(own))  # what is in a module before the module
    return resolved


def check_rules(rules: Iterable[Rule], names: list[str]) -> None:
    """RuleError for a rule that admits none of a model's module paths."""
    depth = Depth(set(names))
    for rule in rules:
        if not any(depth.admits(rule, name) for name in names):
            raise RuleError(
                f"rule {rule.pattern!r} matches no module; {did_you_mean(rule.pattern, names)}"
            )
