"""Graph passes, in the order they run. Imported as lpcompile.passes."""

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

__all__ = [
    "addend",
    "deduplicate",
    "emulate",
    "expert_loop",
    "fuse",
    "fuse_columns",
    "fuse_micro",
    "fuse_whole",
    "grouped_mm",
    "hoist",
    "linear",
    "pair_amax",
    "schedule",
]

if __name__ != "lpcompile.passes":
    raise ImportError("import lpcompile.passes, not passes: a second copy would register twice")
