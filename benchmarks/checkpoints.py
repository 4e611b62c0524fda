"""Llama-shaped checkpoints with random weights, for measuring at the size of real ones."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from delta_analysis.checkpoints.paths import zoo_model

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


def make_models(folder: Path, shape: Shape, finetuned: int = 1) -> list[Path]:
    """Write a base and fine-tunes of it in bfloat16, as transformers loads them; their folders, the base first."""
    paths = [folder / "base", *(folder / f"finetuned-{k}" for k in range(finetuned))]
    generator = torch.Generator().manual_seed(0)
    names = list(shape.tensors().items())
    for path in paths:
        path.mkdir(parents=True)
        (path / "config.json").write_text(config(shape).to_json_string(use_diff=False))
        for file in zoo_model("zoo:small/base").glob("tokenizer*"):
            shutil.copy(file, path)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = names[len(names) * shard // SHARDS : len(names) * (shard + 1) // SHARDS]
        weights = {name: torch.randn(size, generator=generator) * WEIGHT_STD for name, size in part}
        for path in paths:
            std = 0 if path == paths[0] else DELTA_STD
            save_file(
                {name: noisy(weight, std, generator).to(torch.bfloat16) for name, weight in weights.items()},
                path / file,
            )
        weight_map.update(dict.fromkeys(weights, file))
    for path in paths:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


def noisy(weight: torch.Tensor, std: float, generator: torch.Generator) -> torch.Tensor:
    return weight + std * torch.randn(weight.shape, generator=generator) if std else weight


def config(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
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
