"""Every error and warning a user can meet, and the sentence that names the nearest right name."""

import difflib
from collections.abc import Iterable

from torch.nn import Module


class LowPrecisionError(Exception):
    """The base of what lpcompile raises."""


class RecipeError(LowPrecisionError, ValueError):
    """A recipe, an operand or a format that cannot be built, or a name that is not known."""


class OptionError(LowPrecisionError, ValueError):
    """An option of the backend that is not known, or a value that it does not take."""


class RuleError(LowPrecisionError, ValueError):
    """A rule that matched nothing, or a pattern that cannot match."""


class StrictError(LowPrecisionError, RuntimeError):
    """Under ``strict``, a GEMM that a rule asks for cannot be rewritten."""


class VerifyError(LowPrecisionError, RuntimeError):
    """A graph broke what lpcompile promises between two passes: a bug here, please report it."""


class ShapeError(LowPrecisionError, ValueError):
    """A tensor whose shape, dtype or device an operation does not take."""


class LowPrecisionWarning(UserWarning):
    """What deserves a look but stops nothing: nothing rewritten, an untested torch."""


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of the known names, then all of them."""
    names = sorted(filter(None, known))  # a model's own path is empty
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(names)}"


def check_module(what: str, given: object) -> None:
    """LowPrecisionError where ``what``, which takes a Module, is given something else."""
    if not isinstance(given, Module):
        raise LowPrecisionError(
            f"{what} takes a torch.nn.Module, got a {type(given).__name__}: "
            "make it the forward of one"
        )
