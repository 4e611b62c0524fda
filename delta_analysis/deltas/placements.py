"""Where the tensors of a delta stand in the model that is edited, as transformers loads it."""

from __future__ import annotations

import warnings

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints import Checkpoint, Placement, model_class, model_map
from delta_analysis.deltas.delta import Delta


def edited_checkpoint(delta: Delta) -> Checkpoint:
    """The model that an edit changes: the fine-tune, and of an adapter or a published delta its base."""
    if not delta.finetuned.is_delta:
        return delta.finetuned
    if delta.base is None:
        raise CheckpointError(f"{delta.finetuned.source}: holds differences alone; give the base that they belong to")
    return delta.base


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
    found = model_class(whole.config, {name: reference.shape for name, reference in whole.references.items()})
    if found is None:
        kind = whole.config.get("model_type", "no model_type")
        raise CheckpointError(
            f"{whole.source}: its config.json names an architecture that transformers does not know ({kind}); "
            "the pair can be compared, pruned and saved, but no model of it judged"
        )
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
