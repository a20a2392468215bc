"""What this machine is and how Python is made fast on it: a line of description, bf16, and glibc's allocator.

    python -m mage_core.machine                                     # the line that every run prints first
    env $(python -m mage_core.machine --allocator) jupyter lab      # notebooks with the fast allocator
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

# glibc gives every large temporary back to the kernel and asks for it again: the page faults took up to half of a
# training step. These keep freed memory in the process, and let the kernel back it with 2 MB pages where it can.
ALLOCATOR = {
    "glibc.malloc.hugetlb": "1",                   # madvise(MADV_HUGEPAGE); a no-op on a kernel without them
    "glibc.malloc.mmap_max": "0",                  # large blocks come from the heap, not from a mapping of their own
    "glibc.malloc.trim_threshold": str(16 << 30),  # the heap's free end is not given back
    "glibc.malloc.top_pad": str(256 << 20),        # and grows in large steps
}
TUNABLES = "GLIBC_TUNABLES"
RELAUNCHED = "MAGE_RELAUNCHED"


def glibc_version() -> str | None:
    """The version of the GNU C library that this process runs on, such as "2.36"; None on any other."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (AttributeError, OSError, ValueError):  # not POSIX, or another C library
        return None
    return version if name == "glibc" and sys.platform == "linux" else None


def fast_allocator_environment() -> dict[str, str]:
    """The environment variable to start Python with for a fast allocator: `GLIBC_TUNABLES`, or nothing without glibc.

    What the user's own GLIBC_TUNABLES says stays, and wins where both name the same setting.
    """
    if glibc_version() is None:
        return {}
    theirs = os.environ.get(TUNABLES, "")
    named = {setting.partition("=")[0] for setting in theirs.split(":")}
    ours = [f"{name}={value}" for name, value in ALLOCATOR.items() if name not in named]
    return {TUNABLES: ":".join([*ours, theirs] if theirs else ours)}


def relaunch_with_fast_allocator() -> None:
    """Start this command again, once, with `fast_allocator_environment`; return where there is nothing to do.

    glibc reads its settings only when a process starts, so a command line calls this before its work begins. It
    acts only in a process that was started as `python -m mage_core...`: never in a notebook, a test or another's
    program. The process id, the arguments and the open files stay the same.
    """
    if not _is_our_command() or not sys.executable or os.environ.get(RELAUNCHED):
        return
    settings = fast_allocator_environment()
    if all(os.environ.get(name) == value for name, value in settings.items()):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    arguments = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, arguments, {**os.environ, **settings, RELAUNCHED: "1"})


def _is_our_command() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)  # set by `python -m`, and only by it
    return getattr(spec, "name", "").partition(".")[0] == "mage_core"


def device_of(named: str | torch.device | None = None) -> torch.device:
    """The device of a name, by default a GPU where there is one; ValueError for one that this machine has not."""
    if named is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(named)
        there = (device.type == "cpu" or device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
                 or device.type == "mps" and torch.backends.mps.is_available())
    except (RuntimeError, TypeError):
        there = False
    if not there:
        known = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count())),
                 *["mps"] * torch.backends.mps.is_available()]
        raise ValueError(f"device is {named!r}: this machine has {', '.join(map(repr, known))}")
    return device


def has_fast_bf16(device: str | torch.device = "cpu") -> bool:
    """Whether bf16 arithmetic is much faster than fp32 on this device: a CPU with AMX, or a GPU that has bf16.

    A CPU that only has AVX-512's bf16 instructions, or none, counts as slow. Raises RuntimeError for a device that
    torch does not know.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return {"amx_tile", "amx_bf16"} <= _cpu_flags()
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: str | torch.device) -> torch.autocast:
    """A context that computes in bf16 where the device is fast in it, else in fp32."""
    device = torch.device(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bf16(device))


def waits(device: str | torch.device) -> bool:
    """Whether asking a device for a number means to wait until it has done all before: true of a GPU.

    Where it is true, training asks seldom, keeps its data there and its shapes fixed.
    """
    return torch.device(device).type == "cuda"


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Whether a GPU may round fp32 products to TF32 meanwhile: 10 bits, enough to train with,
    too few to compare with."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = on
        yield
    finally:
        for flag, value in zip(flags, before):
            flag.allow_tf32 = value


def matmul_rate(device: str | torch.device, size: int = 8192, rounds: int = 10) -> float:
    """Operations a second of a product of two random bf16 matrices of size x size:
    what a training step is compared with."""
    device = torch.device(device)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    for _ in range(3):
        a @ b
    wait()
    start = time.perf_counter()
    for _ in range(rounds):
        a @ b
    wait()
    return 2 * size ** 3 * rounds / (time.perf_counter() - start)


def describe() -> str:
    """This machine in one line that begins with "machine:": CPU, cores, threads, versions, bf16, allocator, GPUs."""
    counts = ((_usable_cores(), "core"), (torch.get_num_threads(), "torch thread"))
    cpu = ", ".join([_cpu_name(), *(f"{number} {what}{'s' * (number != 1)}" for number, what in counts)])
    bf16 = "bf16 by AMX" if has_fast_bf16("cpu") else "no fast bf16"
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    parts = [cpu, bf16, f"GPU {', '.join(gpus)}" if gpus else "no GPU",
             f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if glibc_version() is not None:
        fast = os.environ.get(TUNABLES) == fast_allocator_environment()[TUNABLES]
        parts.append(f"{'fast' if fast else 'default'} allocator (glibc {glibc_version()})")
    return "machine: " + "; ".join(parts)


def _usable_cores() -> int:
    """The cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    if sys.platform == "darwin":
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return asked.stdout.strip() or platform.machine()
    return _cpu_info().get("model name") or platform.processor() or platform.machine() or "unknown CPU"


def _cpu_flags() -> frozenset[str]:
    return frozenset(_cpu_info().get("flags", "").split())


@cache
def _cpu_info(path: str = "/proc/cpuinfo") -> dict[str, str]:
    """What Linux says of the first CPU; nothing elsewhere."""
    try:
        text = Path(path).read_text(errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def main(arguments: list[str] | None = None) -> None:
    """The command line: `describe`, or with `--allocator` the settings that another program is to start with."""
    parser = argparse.ArgumentParser(prog="python -m mage_core.machine", description=__doc__.splitlines()[0])
    parser.add_argument("--allocator", action="store_true",
                        help="print glibc's settings as NAME=VALUE, for `env`; nothing where there is no glibc")
    if parser.parse_args(arguments).allocator:
        print(*(f"{name}={value}" for name, value in fast_allocator_environment().items()))
    else:
        relaunch_with_fast_allocator()
        print(describe())


if __name__ == "__main__":
    main()
