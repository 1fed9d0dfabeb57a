"""Graph passes, in the order they run. Imported as lpcompile.passes."""

from lpcompile.passes import deduplicate, fuse, fuse_micro, grouped_mm, linear, schedule

__all__ = ["deduplicate", "fuse", "fuse_micro", "grouped_mm", "linear", "schedule"]

if __name__ != "lpcompile.passes":
    raise ImportError("import lpcompile.passes, not passes: a second copy would register twice")
