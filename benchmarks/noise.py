"""Noise in the layers of a Llama-shaped pair, beside a mere forward pass, each in a process of its own.

`python -m benchmarks.noise CONTESTANT BASE FINETUNED` measures one and prints it as JSON.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

import torch
from transformers import LlamaConfig

import delta_analysis as da
from benchmarks.checkpoints import Shape, make_pair
from benchmarks.timing import THREADS
from delta_analysis.checkpoint import open_checkpoint
from delta_analysis.family import sample_text_file
from delta_analysis.loading import load_model, load_tokenizer
from delta_analysis.paths import zoo_model

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
        base, finetuned = make_model_pair(Path(folder), shape)
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


def make_model_pair(folder: Path, shape: Shape) -> tuple[Path, Path]:
    """A pair that transformers loads, with the tokenizer of an embedded model."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.keys // 64,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    pair = make_pair(folder, shape)
    for path in pair:
        (path / "config.json").write_text(config.to_json_string(use_diff=False))
        for file in zoo_model("zoo:small/base").glob("tokenizer*"):
            shutil.copy(file, path)
    return pair


def _text() -> str:
    return sample_text_file().read_text(encoding="utf-8")


def _anonymous() -> int:
    """Bytes of this process that are no mapped file."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def main() -> None:
    name, base, finetuned = sys.argv[1:]
    # What is compiled, and read for the first time, is not on the clock.
    CONTESTANTS[name](zoo_model("zoo:tiny/base"), zoo_model("zoo:tiny/instruct"))
    before, peak = _anonymous(), 0
    stop = Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.005):
            peak = max(peak, _anonymous())

    watcher = Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    CONTESTANTS[name](Path(base), Path(finetuned))
    seconds = time.perf_counter() - started
    stop.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "anonymous": peak - before}))


if __name__ == "__main__":
    main()
