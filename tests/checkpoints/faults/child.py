"""Read good and then faulty checkpoints, one after another, under limits, and tell how each ends.

    python -m tests.faults.child FOLDER [PART OF LABELS]

FOLDER is made, and gets `label`, that of the case under way, and `results.json`.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import logging
import math
import os
import resource
import shutil
import signal
import sys
import sysconfig
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from delta_analysis._errors import CheckpointError, NotHomologousError
from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.deltas.delta import Delta, load_delta
from delta_analysis.deltas.ranges import value_ranges
from delta_analysis.deltas.streaming import tally_delta
from tests.checkpoints.faults.archives import zip_faults
from tests.checkpoints.faults.damaged import config_faults, index_faults, safetensors_faults, shard_faults
from tests.checkpoints.faults.good import BASE, CONFIG, INDEX, SINGLE, TENSORS, TORCH_INDEX, Fault, good
from tests.checkpoints.faults.pickles import WITNESS, hostile_pickles, legacy_faults, pickle_faults
from tests.checkpoints.faults.torch_files import raw

ROOM = 2**30
"""Bytes of address space beyond what the process has after its first reads."""
GROWTH = 200 * 2**10
"""Kilobytes by which the memory in use may grow in one case."""
SECONDS = 120
"""For one case, which takes some milliseconds unless it waits for ever; and of processor time for all of them."""
FAULTS = (
    safetensors_faults,
    shard_faults,
    index_faults,
    config_faults,
    zip_faults,
    pickle_faults,
    legacy_faults,
    hostile_pickles,
)
FORBIDDEN = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.", "socket.",
    "ctypes.dlopen", "os.startfile", "webbrowser.", "shutil.copyfile", "os.putenv", "urllib.",
)  # fmt: skip


def main(folder: Path, wanted: str = "", first: int = 0, step: int = 1) -> None:
    """Of all faults read every `step`-th from the first on, if its label holds `wanted`."""
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    base, case = folder / "base", folder / "case"
    base.mkdir(parents=True)
    (base / SINGLE).write_bytes(save(BASE))
    (base / CONFIG).write_text('{"model_type": "llama", "vocab_size": 3}')
    watched = Watched(folder)
    results: list[tuple[str, str]] = []

    def run(kind: str, number: int, fault: Fault) -> None:
        label, files = f"{kind} {number}, {fault[0]}", fault[1]
        (folder / "label").write_text(label, encoding="utf-8", errors="backslashreplace")
        case.mkdir()
        for name, content in files.items():
            if isinstance(content, bytes):
                (case / name).write_bytes(content)
            else:
                content(case / name)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # The first cases load libraries and compile loops, which on a busy machine takes its time.
        signal.alarm(0 if kind == "warm-up" else SECONDS)
        outcome = watched(lambda: outcome_of(base, case))
        signal.alarm(0)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > GROWTH:
            outcome = f"memory grew by {grown // 2**10} MB; {outcome}"
        if (folder / WITNESS).exists() or Path(WITNESS).exists():
            outcome = f"its code was run; {outcome}"
        if kind == "good" and outcome != "read":
            outcome = f"good, but {outcome}"
        results.append((label, outcome))
        shutil.rmtree(case)

    for number, fault in enumerate(good()):
        run("warm-up", number, fault)
    results.clear()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
    used = math.ceil(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS,) * 2)
    faults = enumerate(itertools.chain.from_iterable(group() for group in FAULTS))
    for number, fault in itertools.islice(faults, first, None, step):
        if wanted in fault[0]:
            run("faulty", number, fault)
    # What was refused leaves nothing behind that would spoil a later reading.
    for number, fault in enumerate(good()):
        run("good", number, fault)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


class Watched:
    """Calls a function and notes the files that it opens and the processes that it starts."""

    def __init__(self, folder: Path) -> None:
        paths = sysconfig.get_paths()
        self.inside = tuple(
            f"{Path(each).resolve()}{os.sep}"
            for each in (
                folder,
                paths["stdlib"],
                paths["purelib"],
                paths["platlib"],
                Path(__file__).parents[2] / "delta_analysis",
            )
        )
        self.seen: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.seen is None:
            return
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(self.inside):
                self.seen.append(f"opens {path}")
        elif event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {arguments!r:.100}")

    def __call__(self, call: Any) -> str:
        self.seen = []
        outcome = call()
        seen, self.seen = self.seen, None
        return "; ".join([*seen, outcome])


def outcome_of(base: Path, case: Path) -> str:
    """`read`, `refused`, or what is wrong."""
    try:
        checkpoint = open_checkpoint(case)
        tensors = dict(checkpoint.items())
        delta = load_delta(base=base, finetuned=case)
        delta.coverage()
        differences = value_ranges(delta)
        alone = tally_delta(load_delta(base=None, finetuned=case)).tensors
        delta.config_differences()
    except (CheckpointError, NotHomologousError) as error:
        return _refusal(error, case)
    except Exception:
        return traceback.format_exc(limit=-4)
    try:
        return _compare(case, tensors, delta, differences.to_dict("records"), int(alone["numel"].sum()))
    except Exception:
        return "not compared: " + traceback.format_exc(limit=-4)


def _refusal(error: BaseException, case: Path) -> str:
    text = str(error)
    reason = text.partition(": ")[2] if text.startswith(str(case)) else text if str(case) in text else ""
    if len(reason) < 20:
        return f"names no file or no reason: {text[:300]}"
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, MemoryError):
            return f"took all the memory: {text[:300]}"
        each = each.__cause__ or each.__context__
    return "refused"


def _compare(case: Path, tensors: dict[str, torch.Tensor], delta: Delta, rows: list[dict[str, Any]], alone: int) -> str:
    try:
        expected = oracle(case)
    except Exception:
        # What the library refuses for a reason that does not matter to the numbers is what was saved.
        expected = TENSORS
    for name, tensor in tensors.items():
        if tensor.dtype != expected[name].dtype or not equal_bits(tensor, expected[name]):
            return f"{name} is {tensor}, not {expected[name]}"
    if alone != sum(tensor.numel() for tensor in tensors.values()):
        return f"{alone} numbers in all"
    for row in rows:
        match = delta.compared[row["tensor"]]
        assert match.finetuned is not None
        shape = match.finetuned.shape
        tuned, start = (each[: shape[0]] if shape else each for each in (expected[match.tensor], BASE[match.base_name]))
        values = (tuned.to(torch.float32) - start.to(torch.float32)).numpy().astype(np.float64)
        finite = values[np.isfinite(values)]
        want = {"numel": values.size, "nonfinite": values.size - finite.size}
        if finite.size:
            want |= {"min": finite.min(), "max": finite.max(), "mean": finite.mean(), "std": finite.std()}
            want["zero_share"] = (finite == 0).mean()
        for key, value in want.items():
            if not math.isclose(row[key], value, rel_tol=1e-9, abs_tol=1e-9 * max(np.abs(finite), default=1)):
                return f"{match.tensor}: {key} is {row[key]}, not {value}"
    return "read"


def oracle(case: Path) -> dict[str, torch.Tensor]:
    """All tensors, as the libraries read them that define the formats."""
    if (case / SINGLE).exists():
        return load_file(case / SINGLE)
    index = next((case / name for name in (INDEX, TORCH_INDEX) if (case / name).exists()), None)
    names = (
        set(json.loads(index.read_text())["weight_map"].values())
        if index
        else sorted(p.name for p in case.iterdir() if p.suffix != ".json")
    )
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        tensors.update(
            load_file(case / name)
            if name.endswith(".safetensors")
            else torch.load(case / name, weights_only=True, map_location="cpu")
        )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and raw(one) == raw(other)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
    sys.stdout.flush()
