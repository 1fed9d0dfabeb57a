"""What a user can ask of the backend: rules and options, validated where they are built."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch

from lpcompile.cost import DEVICES, H200, target_for
from lpcompile.errors import OptionError, RuleError, did_you_mean
from lpcompile.recipes import DEFAULT, Recipe, get_recipe

Rewrite = Literal["profitable", "all"]
Codegen = Literal["inductor", "eager"]


@dataclass(frozen=True)
class Rule:
    """The recipe of the modules whose path matches, with all in them. The first that matches wins.

    pattern: fnmatch on module paths without wrappers, ``layers.*.ffn.w2``; empty is the module
        compiled itself. A router or an LM head, which stay bf16 by structure, are narrowed where a
        pattern matches their own path, and is not of stars alone.
    recipe: a name in RECIPES, or a Recipe.
    first, last: keep to the first or last blocks of the model: a count (int) or a share (float
        below 1, of which a part of a block counts as a whole one).
    """

    pattern: str
    recipe: Recipe | str
    first: float | None = None
    last: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise RuleError(f"a rule's pattern is a module path with * and ?: got {self.pattern!r}")
        get_recipe(self.recipe)
        if self.first is not None and self.last is not None:
            raise RuleError(f"rule {self.pattern!r} has both first and last: write two rules")
        for name in ("first", "last"):
            at = getattr(self, name)
            if at is not None and not _is_amount(at):
                raise RuleError(
                    f"rule {self.pattern!r}: {name} is a number of blocks (int) or a share of them "
                    f"(float between 0 and 1), got {at!r}"
                )

    @property
    def is_catch_all(self) -> bool:
        """It matches every path, so it names none."""
        return bool(self.pattern) and not self.pattern.strip("*")

    @property
    def said(self) -> str:
        """What a report calls it."""
        depths = (("first", self.first), ("last", self.last))
        limit = "".join(f" of the {name} {at}" for name, at in depths if at is not None)
        return f"rule {self.pattern!r}{limit}"

    def names(self, path: str) -> bool:
        """Whether it speaks of this very module, and not of one that holds it, or of all."""
        return not self.is_catch_all and fnmatchcase(path, self.pattern)

    def covers(self, path: str) -> bool:
        """Whether it matches a module, or one that holds it."""
        parts = path.split(".")
        above = (".".join(parts[:i]) for i in range(len(parts) + 1))
        return any(fnmatchcase(p, self.pattern) for p in above)


@dataclass(frozen=True)
class BlockRule(Rule):
    """A rule that ``compile_blocks`` made for a module of a block, which may have no GEMM.

    is_name: the rule that it was made of speaks of this very module.
    """

    is_name: bool = True

    def names(self, path: str) -> bool:
        return self.is_name and super().names(path)


@dataclass(frozen=True)
class Options:
    """The options of one compile, hashable and comparable.

    recipe: a name in RECIPES or a Recipe, for what no rule names.
    rules: see Rule; also accepted as (pattern, recipe) pairs and as dicts.
    rewrite: "profitable" for ``target`` by the cost model, or "all".
    target: a device of the cost model; by default "h200" for FP8, "b200" for MXFP8 and NVFP4. It
        has nothing to do with the device that runs: the choice must not differ between ranks.
    codegen: "inductor", or "eager" to run the rewritten graphs op by op.
    strict: raise when a linear's GEMM that is to be narrowed cannot be.
    verify: check the graph between passes.
    dump: a folder for the graphs before and after each pass, as runnable Python; see ``dump``.
    inductor: Inductor's own settings, sorted pairs.
    """

    recipe: Recipe | str = DEFAULT
    rules: tuple[Rule, ...] = ()
    rewrite: Rewrite = "profitable"
    target: str | None = None
    codegen: Codegen = "inductor"
    strict: bool = False
    verify: bool = False
    dump: str | None = None
    inductor: tuple[tuple[str, Any], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        get_recipe(self.recipe)
        if isinstance(self.rules, (str, Mapping, Rule)) or not isinstance(self.rules, Iterable):
            raise RuleError(
                f"rules is a list of rules, got {self.rules!r}: write "
                '[("layers.*.w2", "bf16")], a (pattern, recipe) pair for each'
            )
        if isinstance(self.rules, Iterator):
            raise RuleError(
                "rules is an iterator, which the first graph would use up: write list(...)"
            )
        object.__setattr__(self, "rules", tuple(map(_rule, self.rules)))
        _one_of("rewrite", self.rewrite, get_args(Rewrite))
        _one_of("codegen", self.codegen, get_args(Codegen))
        if self.target is not None:
            _one_of("target", self.target, tuple(DEVICES))
        if self.dump is not None:
            if not isinstance(self.dump, (str, os.PathLike)):
                raise OptionError(f"dump is the path of a folder, got {self.dump!r}")
            object.__setattr__(self, "dump", os.fspath(self.dump))
        for name in ("strict", "verify"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is True or False, got {getattr(self, name)!r}")

    def target_of(self, recipe: Recipe) -> str:
        """The device that the cost model predicts for."""
        if self.target:
            return self.target
        gemm = recipe.fprop or recipe.dgrad or recipe.wgrad
        return (target_for(gemm) if gemm else H200).name


_OWN = tuple(f.name for f in fields(Options) if f.name != "inductor")
_defaults: dict[str, Any] = {}


def set_defaults(**options: Any) -> None:
    """Options for every later compile that does not give them, for launchers that take a string.

    ``set_defaults(recipe="fp8_tensorwise")``; ``set_defaults()`` forgets them. They stand under
    ``LPCOMPILE_OPTIONS``, which stands under what the call says. Where they change, what
    torch.compile has made in this process is forgotten (``torch._dynamo.reset``), and a model that
    was compiled by the bare name goes on under the new ones: give it options of its own.
    """
    parse(options)
    if options != _defaults:
        # Dynamo knows the bare name alone: a model like one that it has compiled would get that.
        torch._dynamo.reset()
    _defaults.clear()
    _defaults.update(options)


def overlaid(options: Mapping[str, Any] | None, **said: Any) -> dict[str, Any]:
    """Options, with those in their place that a call says beside them (not None).

    What is said by an iterator is read here, once.
    """
    read = {k: tuple(v) if isinstance(v, Iterator) else v for k, v in said.items()}
    return {**(options or {}), **{k: v for k, v in read.items() if v is not None}}


def parse(options: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
    """Options from what torch.compile was given, the environment and the defaults set before.

    Keys that are not lpcompile's are Inductor's; OptionError names the nearest to one that is
    neither. ``mode`` is one of Inductor's ("max-autotune", ...).
    """
    given = {**_defaults, **_environment(), **(options or {})}
    own = {k: v for k, v in given.items() if k in _OWN}
    inductor = {k: v for k, v in given.items() if k not in _OWN}
    known = torch._inductor.list_options()
    for key in inductor:
        # "triton.cudagraphs" and "triton_cudagraphs" both reach Inductor's config.
        if key.replace("-", "_") not in known:
            raise OptionError(f"no option {key!r}: {did_you_mean_option(key, known)}")
    if mode is not None:
        inductor = {**torch._inductor.list_mode_options(mode), **inductor}
    settings = tuple(sorted((k.replace("-", "_"), v) for k, v in inductor.items()))
    return replace(Options(**own), inductor=settings)


def did_you_mean_option(key: str, inductor: list[str]) -> str:
    """The nearest own or Inductor option, then the own ones (Inductor has hundreds)."""
    hint = did_you_mean(key, [*_OWN, *inductor]).partition("known:")[0]
    return f"{hint}lpcompile has {', '.join(sorted(_OWN))}; any Inductor option is taken too"


def _environment() -> dict[str, Any]:
    text = os.environ.get("LPCOMPILE_OPTIONS", "")
    if not text:
        return {}
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionError(
            f"LPCOMPILE_OPTIONS is not JSON ({error}): write "
            """LPCOMPILE_OPTIONS='{"recipe": "fp8_rowwise"}'"""
        ) from error
    if not isinstance(options, dict):
        raise OptionError(f"LPCOMPILE_OPTIONS is a JSON object of options, got {text!r}")
    return options


def _rule(given: Any) -> Rule:
    if isinstance(given, Rule):
        return given
    if isinstance(given, Mapping):
        unknown = set(given) - {f.name for f in fields(Rule)}
        if unknown:
            raise RuleError(
                f"a rule has no {sorted(unknown)[0]!r}: "
                f"{did_you_mean(sorted(unknown)[0], [f.name for f in fields(Rule)])}"
            )
        return Rule(**given)
    if isinstance(given, (tuple, list)) and 2 <= len(given) <= 4:
        return Rule(*given)
    raise RuleError(f"a rule is a Rule, a (pattern, recipe) pair or a dict, got {given!r}")


def _is_amount(at: Any) -> bool:
    """Whether it is a number of blocks, or a share of them."""
    if isinstance(at, float):
        return 0 < at < 1
    return isinstance(at, int) and not isinstance(at, bool) and at > 0


def _one_of(name: str, got: Any, known: tuple[str, ...]) -> None:
    if got not in known:
        raise OptionError(f"{name} has no {got!r}: {did_you_mean(str(got), known)}")
