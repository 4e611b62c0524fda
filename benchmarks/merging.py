"""Three Llama-shaped fine-tunes merged by DARE and TIES, beside mergekit, each contestant in a process of its own.

`python -m benchmarks.merging CONTESTANT FOLDER` measures one and prints it as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import yaml

import delta_analysis as da
from benchmarks import tables
from benchmarks.checkpoints import Shape, make_models
from benchmarks.process import highest, watching
from benchmarks.reading import met, read_only
from benchmarks.timing import THREADS
from delta_analysis.checkpoints.paths import zoo_model
from delta_analysis.deltas import Delta
from delta_analysis.merging.mergekit import mergekit_recipe
from delta_analysis.merging.merger import merge
from delta_analysis.merging.ties import Ties

FINETUNED, DROP_RATE, ROUNDS = 3, 0.9, 2
BUFFER = 2**24
MOST_MEMORY = 2 * 10**9
METHOD, PRUNER = Ties(0.0), da.Dare(DROP_RATE)


class Merging(NamedTuple):
    """Seconds of one merge, and the highest memory of its process: all of it, and what is no mapped file."""

    seconds: float
    peak: int
    anonymous: int


def load(models: list[Path]) -> list[Delta]:
    return [da.load_delta(base=models[0], finetuned=each) for each in models[1:]]


def ours(models: list[Path], out: Path) -> None:
    merged = merge(str(models[0]), load(models), METHOD, PRUNER)
    da.save_checkpoint(da.open_checkpoint(models[0]), merged, out, dtype="bfloat16")


def copy(models: list[Path], out: Path) -> None:
    """Every byte of the inputs, and as many as the output has: the least that any of them has to do."""
    out.mkdir()

    def read(file: Path) -> None:
        memory = memoryview(bytearray(BUFFER))
        place = out / file.name if file.parent == models[0] else Path(os.devnull)
        with file.open("rb", buffering=0) as opened, place.open("wb", buffering=0) as written:
            while count := opened.readinto(memory):
                written.write(memory[:count])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, [file for model in models for file in model.glob("*.safetensors")]))


def mergekit(models: list[Path], out: Path, dtype: str = "float32", **options: Any) -> None:
    """The recipe that is saved beside our merge, in a dtype of the arithmetic."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    recipe = mergekit_recipe(str(models[0]), load(models), METHOD, [PRUNER] * FINETUNED, [1.0] * FINETUNED)
    settings = {**yaml.safe_load(recipe or ""), "dtype": dtype, "out_dtype": "bfloat16"}
    run_merge(MergeConfiguration.model_validate(settings), str(out), MergeOptions(random_seed=0, quiet=True, **options))


SPARING = {"lazy_unpickle": True, "low_cpu_memory": True, "out_shard_size": 10**8}
COPY, OURS = "reading all inputs once, writing as much as the output", "`merge` and `save_checkpoint`"
KIT, KIT_SMALL, KIT_BF16 = "mergekit, defaults", "mergekit, sparing memory", "mergekit, sparing memory, bfloat16"
CONTESTANTS: dict[str, Callable[[list[Path], Path], None]] = {
    COPY: copy,
    OURS: ours,
    KIT: mergekit,
    KIT_SMALL: partial(mergekit, **SPARING),
    KIT_BF16: partial(mergekit, dtype="bfloat16", **SPARING),
}


def report(shape: Shape) -> tuple[str, ...]:
    """Title, sentences and tables, as markdown."""
    with TemporaryDirectory() as folder:
        make_models(Path(folder), shape, FINETUNED)
        found: dict[str, list[Merging]] = {name: [] for name in CONTESTANTS}
        for _ in range(ROUNDS):
            for name, rounds in found.items():
                rounds.append(measure_apart(name, Path(folder)))
    seconds = {name: min(each.seconds for each in rounds) for name, rounds in found.items()}
    peak = {name: max(each.peak for each in rounds) for name, rounds in found.items()}
    own = {name: max(each.anonymous for each in rounds) for name, rounds in found.items()}
    rivals = [name for name in CONTESTANTS if name not in (COPY, OURS)]
    fastest = min(rivals, key=seconds.__getitem__)
    gain = seconds[fastest] / seconds[OURS]
    targets = [
        ("memory of the process at most 2 GB", gigabytes(peak[OURS]), met(peak[OURS] <= MOST_MEMORY)),
        ("faster than the fastest mergekit", f"{gain:.1f} ×", met(gain > 1)),
    ]
    rows = [
        (name, f"{taken:.1f}", f"{taken / seconds[COPY]:.1f} ×", gigabytes(peak[name]), gigabytes(own[name]))
        for name, taken in seconds.items()
    ]
    return (
        "## Merging three fine-tunes",
        f"{FINETUNED} fine-tunes of {shape.numel / 1e9:.2g} billion parameters and their base, bfloat16, merged by "
        f"`Dare({DROP_RATE})` and `Ties(0.0)` (mergekit: `dare_ties`, density {1 - DROP_RATE:.1g}) and saved in "
        f"bfloat16, {THREADS} threads; the inputs are in the page cache, and the output is on the disk at the end. "
        f"The least of {ROUNDS} rounds in turns; the highest memory of the whole process, and what of it is no "
        "mapped file. Sparing memory: `--lazy-unpickle --low-cpu-memory --out-shard-size 100M`. The arithmetic is "
        "float32, in the last row bfloat16.",
        tables.table(("target", "reached", ""), targets),
        tables.table(("work", "seconds", "of reading and writing", "memory", "no mapped file"), rows),
    )


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def measure_apart(name: str, folder: Path) -> Merging:
    command = [sys.executable, "-m", "benchmarks.merging", name, str(folder)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Merging(*json.loads(printed.splitlines()[-1]))


def measure(name: str, folder: Path) -> Merging:
    torch.set_num_threads(THREADS)
    with TemporaryDirectory(dir=folder) as scratch:
        # What is compiled, and imported for the first time, is not on the clock.
        small = [zoo_model(f"zoo:tiny/{each}") for each in ("base", "instruct", "math", "code")]
        CONTESTANTS[name](small, Path(scratch) / "small")
        models, out = sorted(folder.glob("[bf]*")), Path(scratch) / "out"
        for each in models:
            read_only(each, each)
        started = time.perf_counter()
        with watching() as most:
            CONTESTANTS[name](models, out)
        for file in out.iterdir():
            with file.open("rb") as written:
                os.fsync(written)
        return Merging(time.perf_counter() - started, highest(), most())


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
