"""Graph passes, in the order they run. Imported as lpcompile.passes."""

if __name__ != "lpcompile.passes":
    raise ImportError("import lpcompile.passes, not passes: a second copy would register twice")
