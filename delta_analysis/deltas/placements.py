"""Where the tensors of a delta stand in the model that is edited, as transformers loads it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints import (
    Checkpoint,
    Placement,
    TensorReference,
    input_embedding,
    model_class,
    model_map,
    output_head,
)
from delta_analysis.deltas.delta import Delta

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def edited_checkpoint(delta: Delta, base: Checkpoint | None = None) -> Checkpoint:
    """The model that an edit changes: the fine-tune, and of an adapter or a published delta its base.

    The base then has what an adapter brings whole and it lacks: heads, rows of a vocabulary that grew, and an output
    head apart from the embeddings to which the base ties it, if both are changed.
    """
    tuned = delta.finetuned
    if not tuned.is_delta:
        return tuned
    base = delta.base if base is None else base
    if base is None:
        raise CheckpointError(f"{tuned.source}: holds differences alone; give the base that they belong to")
    embedding = input_embedding(base)
    added: dict[str, TensorReference] = {}
    config: dict[str, Any] = {}
    matches = {match.tensor: match for match in delta.matches}
    for name, own in tuned.references.items():
        match = matches[name]
        whole = not tuned.is_difference(name)
        held = base.references.get(match.base_name)
        if output_head([name]) and match.base_name == embedding and embedding is not None:
            if whole or embedding in delta.compared:
                added[name] = base.references[embedding]
                config["tie_word_embeddings"] = False
        elif whole and held is None:
            added[name] = own
        elif whole and held is not None and held.shape != own.shape:
            added[match.base_name] = own
            if match.base_name == embedding:
                config["vocab_size"] = own.shape[0]
    text = base.config.get("text_config")
    inner = {"text_config": {**text, **config}} if config and isinstance(text, dict) else {}
    return replace(base, references={**base.references, **added}, config={**base.config, **config, **inner})


def judged_class(checkpoint: Checkpoint) -> type[PreTrainedModel]:
    """The class of transformers that a checkpoint is loaded as.

    Raises
    ------
    CheckpointError
        An architecture that transformers does not know.
    """
    found = model_class(checkpoint.config, checkpoint.shapes)
    if found is None:
        kind = checkpoint.config.get("model_type", "no model_type")
        raise CheckpointError(
            f"{checkpoint.source}: its config.json names an architecture that transformers does not know ({kind}); "
            "the pair can be compared, pruned and saved, but no model of it judged"
        )
    return found


def placements(delta: Delta) -> tuple[Placement, ...]:
    """Which parameters of the model each tensor of the delta becomes, alone or together with others.

    Raises
    ------
    CheckpointError
        An architecture that transformers does not know, a model that has a place for none of the
        tensors, or a fused parameter of which the delta has a part only.

    Warns
    -----
    UserWarning
        Tensors that the model has no place for: they change nothing in it.
    """
    whole = edited_checkpoint(delta)
    found = judged_class(whole)
    shapes = {name: match.shape for name, match in delta.compared.items()}
    placed = model_map(whole.config, shapes, found)
    if not placed.placements:
        raise CheckpointError(
            f"{whole.source}: a {found.__name__} has a place for none of the {len(shapes)} tensors of the delta, such "
            f"as {next(iter(shapes))!r}; its parameters begin with {list(placed.shapes)[:3]}"
        )
    if placed.unplaced:
        warnings.warn(
            f"{whole.source}: a {found.__name__} has no place for {len(placed.unplaced)} tensors of the delta, such as "
            f"{placed.unplaced[0]!r}; they are compared, and change nothing in the model that is judged",
            stacklevel=2,
        )
    for placement in placed.placements:
        for parameter, shape in placement.shapes.items():
            if placement.converts and shape != placed.shapes[parameter]:
                raise CheckpointError(
                    f"{whole.source}: {parameter!r} is made of {len(placement.stored)} tensors such as "
                    f"{placement.stored[0]!r}, and the delta has but those for {shape} of {placed.shapes[parameter]}"
                )
    return placed.placements
