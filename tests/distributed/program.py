"""The program of one of the two processes: every job, and what it saw of each, left in a folder.

    python program.py RANK cpu|cuda FOLDER

Gloo on CPUs, NCCL on GPUs.
"""

import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import dense
import experts
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import WORLD


def main(rank, device, folder):
    """Run every job as this rank, and leave what it saw in ``folder``."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # attention's backward, on a GPU
    if device == "cuda":
        torch.cuda.set_device(rank)
    kind = "nccl" if device == "cuda" else "gloo"
    place, patience = f"file://{folder}/meet", timedelta(minutes=3)
    dist.init_process_group(kind, place, rank=rank, world_size=WORLD, timeout=patience)
    mesh = dist.init_device_mesh(device, (WORLD,))
    jobs = {**dense.jobs(mesh, folder), **experts.jobs(mesh)}
    for name, (job, *args) in jobs.items():
        began = time.monotonic()
        try:
            result = job(*args)
        except (Exception, dcp.CheckpointException):  # which is no Exception
            result = {"error": traceback.format_exc()}
        torch.save(result, folder / f"{name} {rank}.pt")
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)  # the log shows a hang
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
