"""Speed and memory of the operators beside a copy and beside other packages: `make bench`.

Prints its tables and writes them into benchmarks/README.md; with `--quick`, on small tensors, it
only prints them.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks import engine, merging, noise, reading, tables
from benchmarks.checkpoints import LLAMA_1B, SMALL_PAIR
from benchmarks.memory import Shares, memory_shares
from benchmarks.ours import OPERATORS, STATISTICS
from benchmarks.peers import PEERS
from benchmarks.stages import stage_times
from benchmarks.tables import DTYPES, Races
from benchmarks.timing import THREADS, Setting, race, warm_up

MAIN = (4096, 11008)
SHAPES = ((100, 100), (250, 400), (1000, 1000), (2500, 4000), MAIN, (10_000, 10_000))
README = Path(__file__).with_name("README.md")
MARK = "<!-- table -->"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="sizes up to 10⁶, in a minute or two; no file is written")
    quick = parser.parse_args().quick
    shapes = SHAPES[:3] if quick else SHAPES
    text = measure(shapes, shapes[-1] if quick else MAIN, budget=0.1 if quick else 0.5, quick=quick)
    print(text)
    if not quick:
        head = README.read_text(encoding="utf-8").split(MARK)[0]
        README.write_text(f"{head}{MARK}\n\n{text}\n", encoding="utf-8")


def measure(shapes: tuple[tuple[int, int], ...], main_shape: tuple[int, int], budget: float, *, quick: bool) -> str:
    """All tables as markdown."""
    say("memory")
    shares = memory_shares((*OPERATORS, *PEERS), DTYPES, main_shape)
    for dtype in DTYPES:
        warm_up({**OPERATORS, **STATISTICS, **PEERS}, dtype)
    settings = [Setting(shape, dtype, THREADS) for shape in shapes for dtype in DTYPES]
    settings += [Setting(main_shape, dtype, 1) for dtype in DTYPES]
    # The size that targets are set for is measured longer.
    races = {setting: run(setting, 4 * budget if setting.shape == main_shape else budget) for setting in settings}
    say("stages")
    stages = {dtype: stage_times(main_shape, dtype, budget) for dtype in DTYPES}
    say("value ranges of a pair of checkpoints")
    pair = reading.report(SMALL_PAIR if quick else LLAMA_1B, SMALL_PAIR)
    say("noise in the layers of a pair")
    noises = noise.report(SMALL_PAIR if quick else LLAMA_1B)
    say("a merge of three fine-tunes")
    merged = merging.report(SMALL_PAIR if quick else LLAMA_1B)
    say("a sweep of the embedded family")
    swept = engine.report(quick=quick)
    parts = [
        machine(),
        *swept,
        *pair,
        *noises,
        *merged,
        *speed(races, shapes, main_shape, shares),
        "## Where the time goes",
        f"{tables.size_name(main_shape)}, one thread, ns an entry; a stage writes into memory that is ready.",
        tables.stages(stages),
    ]
    return "\n\n".join(parts)


def run(setting: Setting, budget: float) -> dict[str, float]:
    say(f"{tables.size_name(setting.shape)}, {tables.dtype_name(setting.dtype)}, threads: {setting.threads}")
    return race(setting, PEERS, budget)


def speed(
    races: Races, shapes: tuple[tuple[int, int], ...], main_shape: tuple[int, int], shares: Shares
) -> tuple[str, ...]:
    size = tables.size_name(main_shape)
    memory = "memory", {each: f"{share:.2f}" for each, share in shares.items()}
    return (
        f"## {size}, two threads",
        tables.targets(races, main_shape, shares),
        "ns an entry; `copies`: times as long as `torch.clone`; under a peer: its ns an entry, how many times ours.",
        tables.by_operator(races, main_shape, THREADS, memory),
        f"## {size}, one thread",
        "The last column says how many times faster two threads are.",
        tables.by_operator(races, main_shape, 1, tables.second_thread(races, main_shape)),
        "## Over sizes, two threads",
        "ns an entry (copies):",
        tables.by_size(races, shapes),
        f"Peers, ns an entry (times ours). {tables.where_slower(races)}",
        tables.peers_by_size(races, shapes),
        "## Peak memory",
        f"{size}: (input + what a call adds at its peak) / (input + output).",
        tables.memory(shares) if shares else "Not measured: it takes Linux.",
    )


def machine() -> str:
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "numpy", "numba", "peft", "mergekit", "mergelens")
    )
    return f"Measured on {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}."


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def say(what: str) -> None:
    print(f"== bench: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
