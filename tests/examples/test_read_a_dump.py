"""The example of dumps prints one linear's GEMMs before and after, and graphs that ran."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "02_read_a_dump.py"


def test_the_gemms_of_one_linear_are_shown_and_both_graphs_make_the_same(tmp_path, capsys):
    runpy.run_path(str(EXAMPLE))["main"](str(tmp_path / "dump"))
    sections = capsys.readouterr().out.split("== ")[1:]
    gemms = sections[1]
    products = [line.split()[1] for line in gemms.splitlines() if line.startswith("w1 ")]
    assert sorted(products) == ["dgrad", "fprop", "wgrad"]
    assert gemms.count(" = aten.mm.default(") == gemms.count(" = lpcompile.scaled_mm(") == 3
    before, after = (
        [line.split(" ", 1)[1] for line in s.splitlines()[1:] if "torch." in line]
        for s in sections[-2:]
    )
    assert len(before) == 5  # the output, and the gradients of x and three weights
    assert before == after
