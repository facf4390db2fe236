"""`prune-opd env`: versions, devices, and what is optional and missing: the part of a bug report that nobody knows by heart.

It works where Transformers or torch are broken or missing.
"""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from prune_opd_hf import __version__
from prune_opd_hf.records.environment import available_cores, describe_hardware, package_versions

PACKAGE = "prune-opd-hf"
EXTRAS = {
    "figures": "figures of training, preflights, studies and cards",
    "peft": "LoRA adapters",
    "quantized": "load_in_4bit, load_in_8bit, teacher_quantization_config, 8-bit optimizers",
    "tensorboard": "report_to: tensorboard",
    "trackio": "report_to: trackio",
    "wandb": "report_to: wandb",
}
"""What each extra for users brings; pyproject.toml has its packages."""

BESIDE = {
    "vllm": "rollout_engine: vllm, in an environment of its own or on a server",
    "deepspeed": "ZeRO-2",
    "liger-kernel": "use_liger_kernel",
}
"""What works beside the package and is brought by no extra."""


@dataclass(frozen=True)
class EnvArguments:
    """`prune-opd env` takes none."""


def env(arguments: EnvArguments) -> int:
    print("\n".join(environment()))
    return 0


def environment() -> Iterator[str]:
    yield _line(PACKAGE, __version__)
    yield _line("python", platform.python_version(), f"{platform.system()} {platform.machine()}")
    yield _line("devices", _devices())
    try:
        needed = [Requirement(each) for each in requires(PACKAGE) or ()]
    except PackageNotFoundError:
        yield from (_line(name, found) for name, found in package_versions().items())
        yield f"{PACKAGE} is not installed: it runs from a folder"
        return
    yield ""
    for need in (each for each in needed if _applies(each)):
        yield _line(need.name, *_found(need))
    yield "\noptional"
    for extra, what in EXTRAS.items():
        for need in (each for each in needed if _applies(each, extra) and not _applies(each)):
            found, *wrong = _found(need)
            remedy = [f"pip install '{PACKAGE}[{extra}]'"] if found == "missing" else wrong
            yield _line(need.name, found, "; ".join([what, *remedy]))
    for name, what in BESIDE.items():
        yield _line(name, _found(Requirement(name))[0], what)


def _line(name: str, found: str, note: str = "") -> str:
    return f"{name:<20}{found:<14}{note}".rstrip()


def _applies(need: Requirement, extra: str = "") -> bool:
    """Whether this machine needs it with an extra, or with none."""
    return need.marker is None or need.marker.evaluate({"extra": extra})


def _found(need: Requirement) -> tuple[str, ...]:
    """The installed version, and what is wrong with it."""
    try:
        found = version(need.name)
    except PackageNotFoundError:
        return ("missing",)
    return (found,) if need.specifier.contains(found, prereleases=True) else (found, f"needed: {need.specifier}")


def _devices() -> str:
    """Cores, memory, and accelerators with what torch says of them."""
    words = [f"{available_cores()} cores"]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        words.append(f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB")
    try:
        import torch

        found = describe_hardware() if torch.accelerator.is_available() else "no accelerator that torch finds"
        toolkit = [f"CUDA {torch.version.cuda}"] if torch.version.cuda else []
    except Exception as error:  # whatever keeps torch from being imported belongs into the report
        found, toolkit = f"torch cannot be imported: {type(error).__name__}: {error}", []
    return ", ".join([*words, found, *toolkit])
