"""``backend="lowprec"`` is found with nothing imported, and in a checkout that is not installed."""

import subprocess
import sys

import pytest

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
assert {"lowprec", "lowprec_eager"} < set(torch._dynamo.list_backends())
"""
NOT_INSTALLED = """
import importlib.metadata

entry_points = importlib.metadata.entry_points


def without_ours(**which):
    found = entry_points(**which)
    ours = which == {"group": "torch_dynamo_backends"}
    return importlib.metadata.EntryPoints(()) if ours else found


importlib.metadata.entry_points = without_ours
import lpcompile
"""


@pytest.mark.parametrize(
    "before", ["", "import lpcompile", NOT_INSTALLED], ids=["alone", "imported", "not installed"]
)
def test_the_backend_is_found(before, tmp_path, monkeypatch):
    monkeypatch.setenv("LPCOMPILE_OPTIONS", '{"rewrite": "all"}')
    subprocess.run([sys.executable, "-c", before + SCRIPT], check=True, cwd=tmp_path)
