"""What a run was made with, in words fit to be published: devices and package versions."""

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("prune-opd-hf", "torch", "transformers", "accelerate", "datasets", "tokenizers", "peft")


def package_versions() -> dict[str, str]:
    """Version of Python and of each package that matters here and is installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def describe_hardware() -> str:
    """The accelerators of this process by name, or the processor's architecture and the threads in use."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names))
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def today() -> str:
    """The date, YYYY-MM-DD (UTC)."""
    return datetime.now(timezone.utc).date().isoformat()
