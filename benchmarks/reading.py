"""Value ranges of a pair of checkpoints on disk, end to end, each contestant in a process of its own.

`python -m benchmarks.reading CONTESTANT BASE FINETUNED` measures one and prints it as JSON.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open

import delta_analysis as da
from benchmarks import tables
from benchmarks.checkpoints import LLAMA_7B, LLAMA_70B, SHARDS, Shape, make_models
from benchmarks.process import highest, resident
from benchmarks.timing import THREADS
from delta_analysis.deltas.tally import DECILES, MAGNITUDE_QUANTILES, THRESHOLDS

BUFFER = 2**20
ROUNDS = 3
MOST_NS, LEAST_GAIN = 2.2, 10


class Reading(NamedTuple):
    """Seconds of one pass, and the bytes that it added to its process at the peak."""

    seconds: float
    added: int


def ours(base: Path, finetuned: Path) -> None:
    da.value_ranges(da.load_delta(base=base, finetuned=finetuned))


def read_only(base: Path, finetuned: Path) -> None:
    """Every byte of both, into the same small memory: the least that any of them has to do."""

    def read(file: Path) -> None:
        memory = bytearray(BUFFER)
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(memory):
                pass

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, [*base.glob("*.safetensors"), *finetuned.glob("*.safetensors")]))


def differences(base: Path, finetuned: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Delta and base of each tensor in float32, by safetensors, one tensor of each side at a time."""
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as ours, safe_open(finetuned / file.name, framework="pt") as theirs:
            for name in ours.keys():
                start = ours.get_tensor(name).float()
                yield theirs.get_tensor(name).float() - start, start


def plain(base: Path, finetuned: Path) -> None:
    """The same table by the calls that one would write first, in torch and numpy."""
    rows = []
    for delta, start in differences(base, finetuned):
        values = delta.numpy().ravel()
        magnitudes = np.abs(values)
        rows.append(
            [
                *torch.aminmax(delta),
                np.quantile(values, [decile / 100 for decile in DECILES]),
                values.mean(dtype=np.float64),
                values.std(dtype=np.float64),
                np.quantile(magnitudes, list(MAGNITUDE_QUANTILES.values())),
                [(magnitudes < threshold).mean() for threshold in THRESHOLDS],
                (values == 0).mean(),
                torch.linalg.vector_norm(start, dtype=torch.float64),
            ]
        )


def lean(base: Path, finetuned: Path) -> None:
    """The same by one histogram of the bits for all quantiles, in torch."""
    rows = []
    for delta, start in differences(base, finetuned):
        magnitudes = delta.abs()
        buckets = torch.bincount((delta.view(torch.int32) >> 16).view(-1) + 2**15, minlength=2**16)
        norms = [torch.linalg.vector_norm(each, dtype=torch.float64) for each in (delta, start)]
        below = [torch.count_nonzero(magnitudes < threshold) for threshold in THRESHOLDS]
        rows.append([*torch.aminmax(delta), buckets, *norms, delta.mean(), *below, torch.count_nonzero(delta)])


def mergelens_distances(base: Path, finetuned: Path) -> None:
    """Cosine and L2 distance of each tensor, without its spectra: less than the table, and what comes nearest to it."""
    from mergelens import compare_models

    compare_models([str(base), str(finetuned)], metrics=["cosine_similarity", "l2_distance"], show_progress=False)


READ, OURS = "reading both, nothing else", "`value_ranges`"
LEAN, PLAIN = "torch, one histogram of bits", "torch and numpy, plain"
MERGELENS = "mergelens, cosine and L2 distance only"
CONTESTANTS: dict[str, Callable[[Path, Path], None]] = {
    READ: read_only,
    OURS: ours,
    LEAN: lean,
    PLAIN: plain,
    MERGELENS: mergelens_distances,
}
ONCE = (LEAN, PLAIN, MERGELENS)
"""So slow that one round is enough."""


def readings(shape: Shape, names: Sequence[str]) -> dict[str, list[Reading]]:
    """The contestants' rounds, in turns, over files that are in the page cache."""
    with TemporaryDirectory(prefix=".pair-", dir=Path.cwd()) as folder:
        base, finetuned = make_models(Path(folder), shape)
        read_only(base, finetuned)
        found: dict[str, list[Reading]] = {name: [] for name in names}
        for turn in range(ROUNDS):
            for name in names:
                if turn == 0 or name not in ONCE:
                    found[name].append(measure_apart(name, base, finetuned))
    return found


def measure_apart(name: str, base: Path, finetuned: Path) -> Reading:
    command = [sys.executable, "-m", "benchmarks.reading", name, str(base), str(finetuned)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return Reading(*json.loads(result.stdout))


def measure(name: str, base: Path, finetuned: Path) -> Reading:
    torch.set_num_threads(THREADS)
    before = resident()
    started = time.perf_counter()
    CONTESTANTS[name](base, finetuned)
    taken = time.perf_counter() - started
    return Reading(taken, highest() - before)


def report(shape: Shape, small: Shape) -> list[str]:
    """Sections of the README: targets, times and memory, and what larger models would take."""
    found = readings(shape, [name for name in CONTESTANTS if name != MERGELENS])
    peer = readings(small, [OURS, MERGELENS])
    ns = {
        name: statistics.median(each.seconds for each in rounds) / shape.numel * 1e9 for name, rounds in found.items()
    }
    added = {name: max(each.added for each in rounds) for name, rounds in found.items()}
    largest = max(math.prod(size) for size in shape.tensors().values())
    limit = 8 * largest + 300 * 10**6
    targets = [
        (f"at most {MOST_NS} ns an entry, end to end", f"{ns[OURS]:.2f}", met(ns[OURS] <= MOST_NS)),
        (
            f"at least {LEAST_GAIN} × as fast as plain",
            f"{ns[PLAIN] / ns[OURS]:.0f} ×",
            met(ns[PLAIN] >= LEAST_GAIN * ns[OURS]),
        ),
        (f"memory at most {megabytes(limit)} more", megabytes(added[OURS]), met(added[OURS] <= limit)),
    ]
    rows = [
        (name, f"{ns[name]:.2f}", f"{ns[name] / ns[READ]:.1f}", f"{4 / ns[name]:.2f}", megabytes(added[name]))
        for name in found
    ]
    small_ns = {name: min(each.seconds for each in rounds) / small.numel * 1e9 for name, rounds in peer.items()}
    return [
        f"## Value ranges of a pair of checkpoints: {shape.numel / 1e9:.2f} billion entries, bfloat16, two threads",
        f"A Llama-shaped pair with random weights in {SHARDS} shards each, made for this; both in the page cache; "
        "each contestant in a process of its own, from opening the files to the table. Memory: what the pass adds "
        "to what the process has after its imports, at the peak.",
        tables.table(("target", "reached", ""), targets),
        tables.table(("work", "ns an entry", "times reading", "GB a second", "memory"), rows),
        f"{MERGELENS}, on a small pair of the same kind ({small.numel / 1e6:.0f} million entries): "
        f"{small_ns[MERGELENS]:.0f} ns an entry, where `value_ranges`, with the loading of its compiled loops, takes "
        f"{small_ns[OURS]:.1f}.",
        outlook(ns[OURS], added[OURS]),
    ]


def met(reached: bool) -> str:  # noqa: FBT001
    return "met" if reached else "**not met**"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


def outlook(ns: float, added: int) -> str:
    """What larger models would take at the same speed."""

    def taken(shape: Shape) -> str:
        billions = shape.numel / 1e9
        return f"{billions:.1f} billion entries, {4 * billions:.0f} GB: {billions * ns:.0f} seconds"

    return (
        f"What larger pairs would take: 7B ({taken(LLAMA_7B)}), 70B ({taken(LLAMA_70B)}), where the disk gives "
        f"{4 / ns:.1f} GB a second; from a slower disk the time is that of reading. Nothing in memory grows with the "
        f"model but the table, so {megabytes(added)} hold for them too."
    )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
