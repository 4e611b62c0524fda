"""What a tensor's name says: its layer, its module, and what kind of weight it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

Kind = Literal["linear", "embedding", "norm", "bias"]

NO_LAYER = -1
"""Layer of tensors that stand outside the stack: embeddings, the last norm, heads."""


INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")
OUTPUT_HEADS = ("lm_head", "lm_head.decoder", "embed_out", "cls.predictions.decoder")
WRAPPERS = (
    "base_model.model.",
    "module.",
    "_orig_mod.",
    "model.",
    "language_model.",
    "transformer.",
    "bert.",
    "roberta.",
    "distilbert.",
    "electra.",
    "deberta.",
    "gpt_neox.",
    "albert.",
    "mpnet.",
    "backbone.",
)
"""What a wrapping module puts before the names of the model inside it."""


WRAPPED = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
"""What torch.compile, FSDP and activation checkpointing put into names, wherever they wrap a module."""


class TensorName(NamedTuple):
    """A parsed name: `layer` (or `NO_LAYER`), `module` within the layer, `kind` of weight."""

    layer: int
    module: str
    kind: Kind


def parse_name(name: str, ndim: int) -> TensorName:
    """Read layer, module and kind out of a parameter's name and number of dimensions.

    The first number in the dotted name is the layer. The module is what follows it, without
    `.weight`, after what tells one stack of layers from another (`encoder`, `vision_tower`); the
    numbers of experts read as `*`. Outside the layers the module is the name without the prefixes of
    wrapping modules. A vector is a bias if it is named so, and a norm otherwise.

    Examples
    --------
    >>> parse_name("model.layers.3.self_attn.q_proj.weight", ndim=2)
    TensorName(layer=3, module='self_attn.q_proj', kind='linear')
    >>> parse_name("bert.encoder.layer.0.attention.output.LayerNorm.bias", ndim=1)
    TensorName(layer=0, module='encoder.attention.output.LayerNorm.bias', kind='bias')
    >>> parse_name("model.embed_tokens.weight", ndim=2)
    TensorName(layer=-1, module='embed_tokens', kind='embedding')
    """
    parts = bare_name(name).removesuffix(".weight").split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal() and len(part) < 10), None)
    # What stands right before the number names the list of layers: layers, layer, h, block.
    inside = parts if at is None else [*parts[: max(at - 1, 0)], *parts[at + 1 :]]
    expert = [part.isdecimal() and i > 0 and inside[i - 1] == "experts" for i, part in enumerate(inside)]
    module = ".".join("*" if each else part for part, each in zip(inside, expert, strict=True)) or name
    return TensorName(NO_LAYER if at is None else int(parts[at]), module, _kind(module, ndim))


def _kind(module: str, ndim: int) -> Kind:
    if ndim >= 2:
        last = module.rsplit(".", 1)[-1]
        # GPT-NeoX calls its output head embed_out.
        embeds = last != "embed_out" and ("embed" in last.lower() or last in (*INPUT_EMBEDDINGS, "wpe"))
        return "embedding" if embeds else "linear"
    return "bias" if module.endswith("bias") else "norm"


def reading_order(name: str) -> tuple[int, str]:
    """Sort key of every table and iteration: by layer, then by name."""
    return parse_name(name, ndim=2).layer, name


def input_embedding(names: Iterable[str]) -> str | None:
    """The name of the token embeddings."""
    return _ending_with(names, INPUT_EMBEDDINGS)


def output_head(names: Iterable[str]) -> str | None:
    """The name of the matrix that turns the last hidden state into logits."""
    return _ending_with(names, OUTPUT_HEADS)


def _ending_with(names: Iterable[str], modules: tuple[str, ...]) -> str | None:
    endings = tuple(f".{module}.weight" for module in modules)
    return next((name for name in names if f".{name}".endswith(endings)), None)


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Name -> the name without what training put into it; one that another tensor would share stays as it is.

    Examples
    --------
    >>> unwrapped(["module._orig_mod.layers.0._fsdp_wrapped_module.norm.weight"])
    {'module._orig_mod.layers.0._fsdp_wrapped_module.norm.weight': 'layers.0.norm.weight'}
    """
    short = {name: re.sub(r"^(module\.)+", "", WRAPPED.sub("", name)) for name in names}
    count = Counter(short.values())
    return {name: bare if bare and count[bare] == 1 else name for name, bare in short.items()}


def bare_name(name: str) -> str:
    """A name without the prefixes of wrapping modules, and with the norms' names of today.

    Examples
    --------
    >>> bare_name("base_model.model.model.layers.0.mlp.up_proj.weight")
    'layers.0.mlp.up_proj.weight'
    """
    while wrapper := next((each for each in WRAPPERS if name.startswith(each)), None):
        name = name.removeprefix(wrapper)
    for old, new in {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name
