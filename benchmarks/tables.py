"""The tables of the README, out of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from benchmarks.memory import Shares
from benchmarks.ours import CLONE, OPERATORS, READY_COPY, STATISTICS
from benchmarks.peers import PEERS, RIVALS
from benchmarks.timing import THREADS, Setting

Times = Mapping[str, float]
"""Nanoseconds an entry by name."""
Races = Mapping[Setting, Times]
DTYPES = (torch.float32, torch.bfloat16)
MOST_COPIES, MOST_MEMORY = 1.5, 1.1
LEAST_GAIN = {"Dare(0.9)": 6, "Magnitude(0.9)": 8, "MagPrune(0.9)": 15}


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """Markdown; all columns but the first `words` hold numbers."""
    lines = [head, ["---"] * words + ["--:"] * (len(head) - words), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(name: str) -> str:
    return f"`{name}`"


def package_of(peer: str) -> str:
    return peer.split()[0]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def short(number: float) -> str:
    """About three digits, without an exponent."""
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 100 else f"{number:.0f}"


def times_faster(times: Times, name: str, peer: str) -> str:
    """A peer's time, and how many of ours it is; bold where the peer is faster."""
    gain = times[peer] / times[name]
    return f"{short(times[peer])} ({f'{short(gain)} ×' if gain >= 1 else f'**{short(gain)} ×**'})"


def fastest(times: Times, name: str) -> str:
    return min(RIVALS[name], key=times.__getitem__)


def by_operator(races: Races, shape: tuple[int, int], threads: int, last: tuple[str, Mapping]) -> str:
    """A row for each piece of work and dtype; the last column's head, and its cells by (name, dtype)."""
    packages = list(dict.fromkeys(package_of(peer) for peer in PEERS))
    rows = []
    for name in (CLONE, READY_COPY, *OPERATORS, *STATISTICS):
        for dtype in DTYPES:
            times = races[Setting(shape, dtype, threads)]
            peers = {package_of(peer): times_faster(times, name, peer) for peer in RIVALS.get(name, ())}
            numbers = short(times[name]), short(times[name] / times[CLONE])
            cells = (*numbers, *(peers.get(package, "") for package in packages), last[1].get((name, dtype), ""))
            rows.append((code(name), dtype_name(dtype), *cells))
    return table(("work", "dtype", "ns an entry", "copies", *packages, last[0]), rows, words=2)


def second_thread(races: Races, shape: tuple[int, int]) -> tuple[str, Mapping]:
    """How many times faster two threads are than one, for `by_operator`."""
    gains = {
        (name, dtype): short(races[Setting(shape, dtype, 1)][name] / races[Setting(shape, dtype, THREADS)][name]) + " ×"
        for dtype in DTYPES
        for name in races[Setting(shape, dtype, THREADS)]
    }
    return "two threads", gains


def targets(races: Races, shape: tuple[int, int], shares: Shares) -> str:
    """The aims, what was reached, and whether that is enough."""

    def cell(value: float, unit: str, *, met: bool) -> str:
        return f"{short(value)}{unit}, {'met' if met else '**not met**'}"

    main = {dtype: races[Setting(shape, dtype, THREADS)] for dtype in DTYPES}
    copies = [times["Dare(0.9)"] / times[CLONE] for times in main.values()]
    rows = [
        (f"`Dare(0.9)` at most {MOST_COPIES} copies", *(cell(each, "", met=each <= MOST_COPIES) for each in copies))
    ]
    for name, least in LEAST_GAIN.items():
        cells = []
        for times in main.values():
            peer = fastest(times, name)
            gain = times[peer] / times[name]
            cells.append(cell(gain, f" × ({package_of(peer)})", met=gain >= least))
        rows.append((f"`{name}` at least {least} × faster than the fastest peer", *cells))
    if shares:
        worst = [max(OPERATORS, key=lambda name: shares[name, dtype]) for dtype in DTYPES]
        most = [(shares[name, dtype], name) for name, dtype in zip(worst, DTYPES, strict=True)]
        cells = [cell(share, f" (`{name}`)", met=share <= MOST_MEMORY) for share, name in most]
        rows.append((f"peak memory of every operator at most {MOST_MEMORY} of input + output", *cells))
    return table(("target", *map(dtype_name, DTYPES)), rows)


def size_name(shape: tuple[int, int]) -> str:
    numel = shape[0] * shape[1]
    digits = str(numel)
    power = digits.startswith("1") and set(digits[1:]) <= {"0"}
    return "10" + "⁰¹²³⁴⁵⁶⁷⁸⁹"[len(digits) - 1] if power else f"{shape[0]} × {shape[1]}"


def by_size(races: Races, shapes: Sequence[tuple[int, int]]) -> str:
    """Nanoseconds an entry, and in parentheses the number of copies."""
    rows = []
    for name in (CLONE, *OPERATORS, *STATISTICS):
        for dtype in DTYPES:
            cells = [races[Setting(shape, dtype, THREADS)] for shape in shapes]
            texts = [f"{short(times[name])} ({short(times[name] / times[CLONE])})" for times in cells]
            rows.append((code(name), dtype_name(dtype), *texts))
    return table(("work", "dtype", *map(size_name, shapes)), rows, words=2)


def peers_by_size(races: Races, shapes: Sequence[tuple[int, int]]) -> str:
    rows = []
    for name, peers in RIVALS.items():
        for peer in peers:
            for dtype in DTYPES:
                texts = [times_faster(races[Setting(shape, dtype, THREADS)], name, peer) for shape in shapes]
                rows.append((code(name), package_of(peer), dtype_name(dtype), *texts))
    return table(("work", "peer", "dtype", *map(size_name, shapes)), rows, words=3)


def where_slower(races: Races) -> str:
    """A sentence on every operator and size at which a peer is faster."""
    found: dict[tuple[str, str], set[str]] = {}
    for setting, times in races.items():
        for name, peers in RIVALS.items():
            faster = {package_of(peer) for peer in peers if times[peer] < times[name]}
            if faster and setting.threads == THREADS:
                found.setdefault((name, size_name(setting.shape)), set()).update(faster)
    places = [f"`{name}` at {size} ({', '.join(sorted(faster))})" for (name, size), faster in found.items()]
    return f"A peer is faster, in one dtype at least, at: {'; '.join(places)}." if found else "No peer is faster."


def memory(shares: Shares) -> str:
    names = dict.fromkeys(name for name, _ in shares)
    rows = [
        (code(name) if name in OPERATORS else name, *(f"{shares[name, dtype]:.2f}" for dtype in DTYPES))
        for name in names
    ]
    return table(("work", *map(dtype_name, DTYPES)), rows)


def stages(times: Mapping[torch.dtype, Mapping[tuple[str, str], float]]) -> str:
    rows = [
        (
            code(operator) if operator in OPERATORS else operator,
            stage,
            *(short(times[d][operator, stage]) for d in DTYPES),
        )
        for operator, stage in times[DTYPES[0]]
    ]
    return table(("operator", "stage", *map(dtype_name, DTYPES)), rows, words=2)
