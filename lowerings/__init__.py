"""Inductor lowerings of the custom ops. Imported as lpcompile.lowerings."""

if __name__ != "lpcompile.lowerings":
    raise ImportError("import lpcompile.lowerings, not lowerings: a copy would register twice")
