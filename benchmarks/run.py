"""Speed of the package against the machine's own limit, a copy: `make bench`.

Prints a table and writes it into benchmarks/README.md.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import delta_analysis as da
from delta_analysis.ranges import tally

SIZES = (10_000, 1_000_000, 4096 * 11008)
RUNS = 7
README = Path(__file__).with_name("README.md")
MARK = "<!-- table -->"


def seconds(work: Callable[[], object]) -> float:
    """Median time of a call after one warm-up."""
    work()
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure() -> list[str]:
    rows = ["| entries | work | ns an entry | times a copy |", "|---|---|---|---|"]
    for size in SIZES:
        tensor = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 1e-3
        dare = da.Dare(0.9)
        works: dict[str, Callable[[], object]] = {
            "copy (`torch.clone`)": tensor.clone,
            "`Dare(0.9)`": partial(dare, tensor, name="w", seed=0),
            "`value_ranges`, one tensor": partial(tally, tensor),
        }
        times = {name: seconds(work) for name, work in works.items()}
        copy = next(iter(times.values()))
        for name, taken in times.items():
            rows.append(f"| {size:,} | {name} | {taken / size * 1e9:.2f} | {taken / copy:.1f} |")
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    rows = measure()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32"
    head = README.read_text(encoding="utf-8").split(MARK)[0]
    README.write_text(f"{head}{MARK}\n\nMeasured on {machine}.\n\n" + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
