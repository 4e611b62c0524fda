"""Settings that change what weights mean, where two configurations differ in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import pandas as pd
from huggingface_hub.errors import StrictDataclassError

Config = Mapping[str, Any]
UNSTATED = "not stated"
READ = (
    "model_type", "vocab_size", "tie_word_embeddings", "hidden_act", "activation_function", "hidden_activation",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "hidden_size", "n_embd",
    "sliding_window", "use_sliding_window", "num_experts_per_tok",
)  # fmt: skip
"""What the settings below are read from: transformers would make lists as long as others say, such as num_labels."""


def config_differences(base: Config, finetuned: Config) -> pd.DataFrame:
    """The settings that give weights another meaning and differ between two `config.json`.

    A setting that a configuration leaves out has the default of its model type.

    Parameters
    ----------
    base, finetuned : the two configurations; an empty one, of a bare file or an adapter, differs in nothing.

    Returns
    -------
    DataFrame with columns `setting, base, finetuned`, the values as text.

    Examples
    --------
    >>> llama, code = {"rope_theta": 10000.0, "vocab_size": 32000}, {"rope_theta": 1000000, "vocab_size": 32000}
    >>> config_differences(llama, code).to_dict("records")
    [{'setting': 'rope theta', 'base': '10000', 'finetuned': '1000000'}]
    """
    rows = []
    if base and finetuned:
        sides = _with_defaults(base), _with_defaults(finetuned)
        for setting, read in SETTINGS.items():
            ours, theirs = (_text(read(side)) for side in sides)
            if ours != theirs:
                rows.append({"setting": setting, "base": ours, "finetuned": theirs})
    return pd.DataFrame(rows, columns=["setting", "base", "finetuned"])


def text_settings(config: Config) -> dict[str, Any]:
    """The settings of the language model, which a model of text and images keeps one level down."""
    inner = config.get("text_config")
    return {**config, **(inner if isinstance(inner, dict) else {})}


def _with_defaults(config: Config) -> Config:
    # Here, since reading alone should not wait for it.
    from transformers import CONFIG_MAPPING

    stated = text_settings(config)
    kind = stated.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return stated
    try:
        # A copy, since transformers writes into the dicts that it is given.
        return CONFIG_MAPPING[kind].from_dict({key: deepcopy(stated[key]) for key in READ if key in stated}).to_dict()
    except (
        StrictDataclassError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
        ArithmeticError,
        RecursionError,
    ):
        # Settings that this version of transformers refuses are still compared as they are stated.
        return stated


def _first_of(*keys: str) -> Callable[[Config], object]:
    return lambda config: next((config[key] for key in keys if config.get(key) is not None), UNSTATED)


def _rope(config: Config) -> dict[str, dict[str, Any]]:
    """All about rotary positions by kind of layer; one kind, without a name, where all layers have the same."""
    stated = config.get("rope_parameters") or config.get("rope_scaling")
    rope = stated if isinstance(stated, dict) else {}
    by_kind = {kind: each for kind, each in rope.items() if isinstance(each, dict)}
    if by_kind:
        return by_kind
    # Older files call the type so, and state theta beside the scaling.
    renamed = {"rope_type" if key == "type" else key: value for key, value in rope.items()}
    return {"": {**({"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}), **renamed}}


def _rope_theta(config: Config) -> object:
    return {kind: rope.get("rope_theta", UNSTATED) for kind, rope in _rope(config).items()}


def _rope_scaling(config: Config) -> object:
    return {kind: _scaling(rope) for kind, rope in _rope(config).items()}


def _scaling(rope: dict[str, Any]) -> object:
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return scaling if scaling.get("rope_type", "default") != "default" else "none"


def _text(value: object, levels: int = 3) -> str:
    if isinstance(value, dict) and levels:
        return ", ".join(f"{key} {_text(each, levels - 1)}".strip() for key, each in sorted(value.items()))
    # As text 10000.0 is 10000.
    return f"{value:.15g}" if isinstance(value, float) else str(value)


SETTINGS: dict[str, Callable[[Config], object]] = {
    "model type": _first_of("model_type"),
    "vocabulary size": _first_of("vocab_size"),
    "tied embeddings": _first_of("tie_word_embeddings"),
    "activation": _first_of("hidden_act", "activation_function", "hidden_activation"),
    "norm epsilon": _first_of("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "rope theta": _rope_theta,
    "rope scaling": _rope_scaling,
    "attention heads": _first_of("num_attention_heads", "n_head"),
    "key-value heads": _first_of("num_key_value_heads"),
    "head size": _first_of("head_dim"),
    "sliding window": _first_of("sliding_window"),
    "experts a token": _first_of("num_experts_per_tok"),
}
