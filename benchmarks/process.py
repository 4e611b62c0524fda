"""Memory of this process; Linux only."""

from __future__ import annotations

import resource
from pathlib import Path


def resident() -> int:
    """Bytes that are in memory now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def highest() -> int:
    """The most bytes that have been in memory since the process began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
