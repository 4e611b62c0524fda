"""The scope of an edit: which tensors of a delta are pruned; the others stay whole."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from delta_analysis.checkpoints import NO_LAYER, parse_name

PARTS = ("attention", "mlp", "embeddings", "norms")
"""Scopes no two of which have a tensor in common."""
SCOPES = ("all", "linear", *PARTS)
CLASSIFIER = "ForSequenceClassification"
"""How the architecture of a model with a classification head ends."""
HEADS = ("classifier.", "score.", "classification_head.")
"""Modules of a classification head: not pruned, as in DARE's scripts for GLUE (its pooler is)."""


def _part(layer: int, module: str, kind: str) -> str:
    """Which of `PARTS` a tensor belongs to; none for what stands outside the layers, such as a head."""
    last = module.removesuffix(".bias").rsplit(".", 1)[-1].lower()
    if kind == "embedding":
        return "embeddings"
    if kind == "norm" or "norm" in last or last.startswith("ln_"):
        return "norms"
    if layer == NO_LAYER:
        return ""
    # `attn`, `self_attention`, `EncDecAttention`: each family has its own.
    return "attention" if "attn" in module.lower() or "attention" in module.lower() else "mlp"


def in_scope(scope: str, tensors: Mapping[str, int]) -> list[str]:
    """The names of the tensors that a scope selects, in their order.

    Parameters
    ----------
    scope : as `Delta.select` takes it.
    tensors : name of each tensor of a delta -> its number of dimensions.

    Raises
    ------
    ValueError
        A part of the scope that selects nothing.

    Examples
    --------
    >>> tensors = {"model.embed_tokens.weight": 2, "model.norm.weight": 1}
    >>> in_scope("norms", tensors), in_scope("*embed*", tensors)
    (['model.norm.weight'], ['model.embed_tokens.weight'])
    """
    chosen: set[str] = set()
    for part in (each.strip() for each in scope.split(",")):
        found = {name for name, ndim in tensors.items() if _selects(part, name, ndim)}
        if not found:
            raise ValueError(
                f"scope {part!r} selects none of the {len(tensors)} tensors, which begin with {list(tensors)[:3]}; "
                f"expected {', '.join(SCOPES)} or a glob pattern such as '*.layers.0.*'"
            )
        chosen |= found
    return [name for name in tensors if name in chosen]


def parts_and_layers(tensors: Mapping[str, int], *, most_layers: int = 4) -> dict[str, list[str]]:
    """Scopes that take a model apart: each of `PARTS` that it has, and single layers evenly from first to last.

    Each scope comes with the tensors that it selects. Of two stacks, an encoder's and a decoder's, layers
    are those of the one that comes first.

    Parameters
    ----------
    tensors : name of each tensor of a delta -> its number of dimensions.
    most_layers : how many layers at most, at least 0.

    Examples
    --------
    >>> list(parts_and_layers({"model.embed_tokens.weight": 2, "model.layers.0.mlp.up_proj.weight": 2}))
    ['mlp', 'embeddings', 'model.layers.0.*']
    """
    parsed = {name: parse_name(name, ndim) for name, ndim in tensors.items()}
    found = {part: [name for name, ndim in tensors.items() if _selects(part, name, ndim)] for part in PARTS}
    first = {layer: name for name, (layer, _, _) in reversed(parsed.items()) if layer != NO_LAYER}
    depths = sorted(first)
    count = min(most_layers, len(depths))
    for i in range(count):
        layer = depths[round(i * (len(depths) - 1) / max(count - 1, 1))]
        pattern = first[layer].split(f".{layer}.")[0] + f".{layer}.*"
        found[pattern] = in_scope(pattern, tensors)
    return {scope: names for scope, names in found.items() if names}


def _selects(part: str, name: str, ndim: int) -> bool:
    if part not in SCOPES:
        return fnmatchcase(name, part)
    layer, module, kind = parse_name(name, ndim)
    return part in ("all", _part(layer, module, kind)) or (part == "linear" and kind == "linear" and layer != NO_LAYER)
