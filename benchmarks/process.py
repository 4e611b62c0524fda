"""Memory of this process; Linux only."""

from __future__ import annotations

import resource
from pathlib import Path


def resident() -> int:
    """Bytes that are in memory now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def highest() -> int:
    """The most bytes that have been in memory at once; what getrusage tells includes those of the parent process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
