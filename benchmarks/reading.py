"""Value ranges of a pair of checkpoints on disk, end to end, each contestant in a process of its own.

`python -m benchmarks.reading CONTESTANT BASE FINETUNED` measures one and prints it as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open

import delta_analysis as da
from benchmarks.checkpoints import LLAMA_7B, LLAMA_70B, Shape, make_pair
from benchmarks.process import highest, resident
from benchmarks.timing import THREADS
from delta_analysis.tally import DECILES, MAGNITUDE_QUANTILES, THRESHOLDS

BUFFER = 2**20
ROUNDS = 3


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


CONTESTANTS: dict[str, Callable[[Path, Path], None]] = {
    "reading both, nothing else": read_only,
    "`value_ranges`": ours,
    "torch, a histogram of bits": lean,
    "torch and numpy, plain": plain,
}
OURS, READ, PLAIN = "`value_ranges`", "reading both, nothing else", "torch and numpy, plain"


def readings(shape: Shape) -> dict[str, list[Reading]]:
    """Every contestant's rounds, in turns, the slowest only once, over files that are in the page cache."""
    with TemporaryDirectory(prefix="pair-", dir=Path.cwd()) as folder:
        base, finetuned = make_pair(Path(folder), shape)
        read_only(base, finetuned)
        found: dict[str, list[Reading]] = {name: [] for name in CONTESTANTS}
        for turn in range(ROUNDS):
            for name in CONTESTANTS:
                if turn == 0 or name != PLAIN:
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


def minutes(shape: Shape, nanoseconds: float) -> str:
    taken = shape.numel * nanoseconds / 1e9 / 60
    return f"{taken:.1f} minutes" if taken < 10 else f"{taken:.0f} minutes"


def outlook(nanoseconds: float) -> str:
    """What larger models would take at the same speed, and the speed of the disk that this asks for."""
    return (
        f"At this speed a 7B pair ({LLAMA_7B.numel / 1e9:.1f} billion entries) takes {minutes(LLAMA_7B, nanoseconds)} and "
        f"a 70B pair ({LLAMA_70B.numel / 1e9:.1f} billion) {minutes(LLAMA_70B, nanoseconds)}, if the disk gives "
        f"{4 / nanoseconds:.1f} GB a second; a slower disk sets the time: 4 bytes an entry. The memory stays the same."
    )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
