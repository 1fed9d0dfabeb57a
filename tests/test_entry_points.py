"""``backend="lowprec"`` is found with nothing imported, in a process of its own."""

import subprocess
import sys

SCRIPT = """
import torch

layer = torch.nn.Linear(32, 32).bfloat16()
x = torch.randn(16, 32).bfloat16()
y = {}
for backend in ("eager", "lowprec_eager"):
    y[backend] = torch.compile(layer, backend=backend)(x)
    torch._dynamo.reset()
error = (y["eager"] - y["lowprec_eager"]).norm() / y["eager"].norm()
assert 0.005 < error < 0.05, error
"""


def test_the_backend_is_found_with_nothing_imported(tmp_path, monkeypatch):
    monkeypatch.setenv("LPCOMPILE_OPTIONS", '{"rewrite": "all"}')
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, cwd=tmp_path)
