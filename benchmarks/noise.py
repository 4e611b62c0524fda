"""Noise in the layers of a Llama-shaped pair, beside a mere forward pass, each in a process of its own.

`python -m benchmarks.noise CONTESTANT BASE FINETUNED` measures one and prints it as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import delta_analysis as da
from benchmarks.checkpoints import Shape, make_models
from benchmarks.process import anonymous, watching
from benchmarks.timing import THREADS
from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.checkpoints.paths import zoo_model
from delta_analysis.evaluation.models import load_model, load_tokenizer
from delta_analysis.reports.family import sample_text_file

TOKENS = 256


def forward(base: Path, finetuned: Path) -> None:
    """The fine-tuned model reads the text: the least that a pass over inputs has to do."""
    checkpoint = open_checkpoint(str(finetuned))
    model, tokenizer = load_model(checkpoint, dtype="auto"), load_tokenizer(checkpoint)
    ids = tokenizer(_text(), return_tensors="pt", truncation=True, max_length=TOKENS)["input_ids"]
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)


def with_inputs(base: Path, finetuned: Path) -> None:
    da.layer_noise(str(base), str(finetuned), [_text()], pruners=[da.Dare(0.9)], most_tokens=TOKENS, dtype="auto")


def without_inputs(base: Path, finetuned: Path) -> None:
    da.layer_noise(str(base), str(finetuned), pruners=[da.Dare(0.9)])


FORWARD, WITH, WITHOUT = "loading and one forward pass", "`layer_noise`, one text", "`layer_noise` without inputs"
CONTESTANTS: dict[str, Callable[[Path, Path], None]] = {FORWARD: forward, WITH: with_inputs, WITHOUT: without_inputs}


def report(shape: Shape) -> tuple[str, ...]:
    """Title, sentence and table, as markdown."""
    with TemporaryDirectory() as folder:
        base, finetuned = make_models(Path(folder), shape)
        found = {}
        for name in CONTESTANTS:
            command = [sys.executable, "-m", "benchmarks.noise", name, str(base), str(finetuned)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[name] = json.loads(printed.splitlines()[-1])
    least = found[FORWARD]["seconds"]
    lines = [
        f"| {name} | {own['seconds']:.1f} | {own['seconds'] / least:.1f} × | {own['anonymous'] / 1e6:.0f} MB |"
        for name, own in found.items()
    ]
    largest = max(shape.tensors().values(), key=lambda size: size[0] * size[-1])
    return (
        "## Noise in the layers",
        f"{shape.numel / 1e9:.2g} billion parameters in bfloat16, one text of {TOKENS} tokens, `Dare(0.9)`, {THREADS} "
        "threads; the model stays mapped from disk. Memory is what a contestant adds to its process at the peak and "
        f"is no mapped file; the largest tensor, {' × '.join(map(str, largest))}, takes "
        f"{4 * largest[0] * largest[1] / 1e6:.0f} MB in float32.",
        "| work | seconds | of the forward pass | memory |\n|---|--:|--:|--:|\n" + "\n".join(lines),
    )


def _text() -> str:
    return sample_text_file().read_text(encoding="utf-8")


def main() -> None:
    name, base, finetuned = sys.argv[1:]
    # What is compiled, and read for the first time, is not on the clock.
    CONTESTANTS[name](zoo_model("zoo:tiny/base"), zoo_model("zoo:tiny/instruct"))
    before = anonymous()
    started = time.perf_counter()
    with watching() as most:
        CONTESTANTS[name](Path(base), Path(finetuned))
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "anonymous": most() - before}))


if __name__ == "__main__":
    main()
