"""Graph passes, in the order they run. Imported as lpcompile.passes."""

from lpcompile.passes import deduplicate, fuse, linear

__all__ = ["deduplicate", "fuse", "linear"]

if __name__ != "lpcompile.passes":
    raise ImportError("import lpcompile.passes, not passes: a second copy would register twice")
