"""The scope of an edit: which tensors of a delta are pruned; the others stay whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from delta_analysis.names import NO_LAYER, parse_name

ATTENTION = ("attn", "attention", "self_attn", "self_attention", "selfattention", "crossattention", "attn_module")


def _is_norm(module: str, kind: str) -> bool:
    last = module.removesuffix(".bias").rsplit(".", 1)[-1].lower()
    return kind == "norm" or "norm" in last or last.startswith("ln_")


def _in_attention(module: str) -> bool:
    return any(part.lower() in ATTENTION for part in module.split("."))


def _attention(layer: int, module: str, kind: str) -> bool:
    return layer != NO_LAYER and _in_attention(module) and not _is_norm(module, kind)


def _mlp(layer: int, module: str, kind: str) -> bool:
    return layer != NO_LAYER and not _in_attention(module) and not _is_norm(module, kind)


SCOPES: dict[str, Callable[[int, str, str], bool]] = {
    "all": lambda layer, module, kind: True,
    "linear": lambda layer, module, kind: layer != NO_LAYER and kind == "linear",
    "attention": _attention,
    "mlp": _mlp,
    "embeddings": lambda layer, module, kind: kind == "embedding",
    "norms": lambda layer, module, kind: _is_norm(module, kind),
}
"""Name of a scope -> whether a tensor, by its layer, module and kind, belongs to it."""


def in_scope(scope: str, tensors: Mapping[str, int]) -> list[str]:
    """The names of the tensors that a scope selects, in their order.

    Parameters
    ----------
    scope : `all` (what the delta has, as DARE's scripts for language models do); `linear`, the
        matrices inside the layers, without the output head; `attention` and `mlp`, the matrices and
        biases of a layer's attention and those beside it; `embeddings`; `norms`; a glob pattern
        such as `*.layers.0.*`; or several of these with commas between.
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


def _selects(part: str, name: str, ndim: int) -> bool:
    return SCOPES[part](*parse_name(name, ndim)) if part in SCOPES else fnmatchcase(name, part)
