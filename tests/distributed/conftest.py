"""The two processes, started once for every test of this folder."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import WORLD

HERE = Path(__file__).parent
KINDS = [
    pytest.param("cpu", id="gloo"),
    pytest.param("cuda", id="nccl", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="session", params=KINDS)
def world(request, tmp_path_factory):
    """The folder in which two processes, which ran every case, left what they saw."""
    if request.param == "cuda" and torch.cuda.device_count() < WORLD:
        pytest.skip(f"needs {WORLD} GPUs")
    folder = tmp_path_factory.mktemp("world")
    parts = [str(HERE.parent), os.environ["PYTHONPATH"]]  # of what tests import, too
    env = os.environ | {"PYTHONPATH": os.pathsep.join(parts)}
    # On a hit no pass runs, and no row would be left to look at; ranks compile the same C++, once.
    env |= dict.fromkeys(("TORCHINDUCTOR_FX_GRAPH_CACHE", "TORCHINDUCTOR_AUTOGRAD_CACHE"), "0")
    processes = []
    for rank in range(WORLD):
        arguments = [str(HERE / "program.py"), str(rank), request.param, str(folder)]
        with (folder / f"log {rank}").open("w") as log:
            started = subprocess.Popen(
                [sys.executable, *arguments], env=env, stdout=log, stderr=log
            )
        processes.append(started)
    with contextlib.suppress(subprocess.TimeoutExpired):
        for process in processes:
            process.wait(timeout=1200)  # a minute where nothing else runs
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
    logs = [(folder / f"log {rank}").read_text()[-4000:] for rank in range(WORLD)]
    assert codes == [0] * WORLD, "\n".join(logs)
    return request.param, folder
