"""A Llama-shaped pair of checkpoints with random weights, for measuring at the size of real ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

SHARDS = 8
WEIGHT_STD, DELTA_STD = 0.02, 5e-4


class Shape(NamedTuple):
    """Dimensions of a Llama model whose output head is its own."""

    layers: int
    hidden: int
    intermediate: int
    keys: int
    vocabulary: int = 32_000

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight."""
        square, keys = (self.hidden, self.hidden), (self.keys, self.hidden)
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": square,
            "self_attn.k_proj": keys,
            "self_attn.v_proj": keys,
            "self_attn.o_proj": square,
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        outside = {"model.embed_tokens": (self.vocabulary, self.hidden), "lm_head": (self.vocabulary, self.hidden)}
        inside = {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in layer.items()}
        return {f"{name}.weight": shape for name, shape in {**outside, **inside, "model.norm": (self.hidden,)}.items()}

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.tensors().values()))


LLAMA_1B = Shape(layers=22, hidden=2048, intermediate=5632, keys=256)
LLAMA_7B = Shape(layers=32, hidden=4096, intermediate=11008, keys=4096)
LLAMA_70B = Shape(layers=80, hidden=8192, intermediate=28672, keys=1024)
SMALL_PAIR = Shape(layers=2, hidden=256, intermediate=704, keys=64)


def make_pair(folder: Path, shape: Shape) -> tuple[Path, Path]:
    """Write base and fine-tune in bfloat16, each in shards with an index; their folders."""
    base, finetuned = folder / "base", folder / "finetuned"
    generator = torch.Generator().manual_seed(0)
    names = list(shape.tensors().items())
    for path in (base, finetuned):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = names[len(names) * shard // SHARDS : len(names) * (shard + 1) // SHARDS]
        weights = {name: torch.randn(size, generator=generator) * WEIGHT_STD for name, size in part}
        save_file({name: weight.to(torch.bfloat16) for name, weight in weights.items()}, base / file)
        for weight in weights.values():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=DELTA_STD)
        save_file({name: weight.to(torch.bfloat16) for name, weight in weights.items()}, finetuned / file)
        weight_map.update(dict.fromkeys(weights, file))
    for path in (base, finetuned):
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return base, finetuned
