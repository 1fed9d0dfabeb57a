"""What a measurement was made on: GPU, clocks, versions."""

import argparse
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from statistics import median
from typing import Any

import torch

CPU_NOTE = (
    "On a CPU the formats are emulated: this checks that the benchmark runs and says nothing of "
    "speed."
)


def device(name: str) -> torch.device:
    """The device that a command line names; argparse says why where there is none."""
    if not name.startswith(("cpu", "cuda")):
        raise argparse.ArgumentTypeError(f"lpcompile runs on cpu and on cuda, got {name!r}")
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"no device {name!r} here: {why}") from None
    return torch.device(name)


def describe(device: torch.device) -> dict[str, Any]:
    """Versions and the device, for the head of every table."""
    about: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "torchao", "lpcompile"):
        if version := version_of(name):
            about[name] = version
    if device.type != "cuda":
        return about | {"device": f"{platform.machine()} CPU"}
    gpu = torch.cuda.get_device_properties(device)
    about |= {
        "device": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "memory GiB": round(gpu.total_memory / 2**30, 1),
        "CUDA": torch.version.cuda,
    }
    fields = {"driver_version": "driver", "clocks.max.sm": "max SM MHz", "power.limit": "limit W"}
    values = _nvidia_smi(device, list(fields))
    return about | dict(zip(fields.values(), values, strict=False))


def version_of(package: str) -> str:
    """The version of an installed package, or an empty string."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


@contextmanager
def watch_clocks(device: torch.device) -> Iterator[dict[str, Any]]:
    """Fills the dict it yields with the SM clock and the power drawn while the GPU was busy."""
    seen: dict[str, Any] = {}
    if device.type != "cuda":
        yield seen
        return
    fields = ["clocks.sm", "power.draw", "utilization.gpu"]
    command = [*_smi_command(device, fields), "-lms", "100"]
    try:
        watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except OSError:
        yield seen
        return
    try:
        yield seen
    finally:
        watcher.terminate()
        samples = [_numbers(line) for line in watcher.communicate()[0].splitlines()]
        samples = [s for s in samples if len(s) == len(fields) and s[2] > 50]
        if samples:
            clocks, watts, _ = zip(*samples, strict=True)
            seen["SM MHz"] = f"median {median(clocks):.0f}, lowest {min(clocks):.0f}"
            seen["W drawn"] = f"median {median(watts):.0f}, highest {max(watts):.0f}"


def _numbers(line: str) -> list[float]:
    with suppress(ValueError):
        return [float(field) for field in line.split(",")]
    return []


def _smi_command(device: torch.device, fields: list[str]) -> list[str]:
    uuid = torch.cuda.get_device_properties(device).uuid
    query = f"--query-gpu={','.join(fields)}"
    return ["nvidia-smi", "-i", f"GPU-{uuid}", query, "--format=csv,noheader,nounits"]


def _nvidia_smi(device: torch.device, fields: list[str]) -> list[str]:
    """The fields that nvidia-smi gives, or nothing where it does not run."""
    try:
        made = subprocess.run(
            _smi_command(device, fields), capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in made.stdout.split(",")]
