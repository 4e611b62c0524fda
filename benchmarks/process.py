"""Memory of this process; Linux only."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread


def resident() -> int:
    """Bytes that are in memory now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def highest() -> int:
    """The most bytes that have been in memory at once; what getrusage tells includes those of the parent process."""
    return _status("VmHWM")


def anonymous() -> int:
    """Bytes that are in memory now and are no mapped file."""
    return _status("RssAnon")


@contextmanager
def watching() -> Iterator[Callable[[], int]]:
    """Look at `anonymous()` all the time; what is given tells the most that it has been."""
    peak, stop = anonymous(), Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.005):
            peak = max(peak, anonymous())

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield lambda: peak
    finally:
        stop.set()
        watcher.join()


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
