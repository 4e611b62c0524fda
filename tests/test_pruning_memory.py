"""How much memory an operator takes beside its input: a high-water mark, and no timing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

ENTRIES = 2**24
SLACK = 8 * 2**20

# Each operator runs in a forked child, whose high-water mark is its own.
MEASURE = """
import gc, json, os, resource, sys
import numpy as np
import torch
from delta_analysis import pruning, rows

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

entries = np.random.default_rng(0).standard_normal(2**24, dtype=np.float32)
for call in sys.argv[1:]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        tensor = torch.from_numpy(entries).view(2048, 8192)
        pruner = eval(call, vars(pruning))
        long, rows.LONG_ROW = rows.LONG_ROW, 2**16
        pruner(tensor[:64].clone(), name="w", seed=0)
        rows.LONG_ROW = long
        gc.collect()
        before = peak()
        pruned = pruner(tensor, name="w", seed=0)
        os.write(write, json.dumps(peak() - before).encode())
        os._exit(0)
    os.close(write)
    print(call, os.fdopen(read).read(), sep="\\t")
    os.waitpid(child, 0)
"""
CALLS = ["Dare(0.9)", "Dare(0.9, 'l1')", "Magnitude(0.9)", "MagPrune(0.9)", "MagPrune(0.9, rank='tensor')"]


@pytest.fixture(scope="module")
def extra() -> dict[str, int]:
    """Bytes that each call takes at its peak, its result included."""
    command = [sys.executable, "-c", MEASURE, *CALLS]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    return {call: json.loads(size) for call, size in (line.split("\t") for line in printed.splitlines())}


@pytest.mark.parametrize("call", CALLS)
def test_an_operator_takes_its_result_and_little_more(extra: dict[str, int], call: str) -> None:
    output = 4 * ENTRIES
    assert extra[call] > 0.9 * output
    assert extra[call] <= output + 0.1 * 2 * output + SLACK
