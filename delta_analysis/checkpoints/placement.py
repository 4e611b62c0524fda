"""Which parameters of the model the stored tensors become: asked of transformers, which is what loads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.tensors import TensorReference

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.core_model_loading import WeightConverter

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Placement:
    """Stored tensors that become parameters of the model together.

    Attributes
    ----------
    stored : names in the files. One tensor that is renamed, or several that are fused, as experts are.
    shapes : parameter -> its shape; several where a stored tensor is split.
    """

    stored: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    _first: str = field(repr=False)
    _patterns: tuple[str | None, ...] = field(repr=False)
    _converter: WeightConverter | None = field(repr=False)
    _model: PreTrainedModel = field(repr=False)

    @property
    def converts(self) -> bool:
        """Whether the stored tensors are more than renamed."""
        return self._converter is not None

    def to_model(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameter -> its weight, made of the stored tensors; entries are moved, never computed with."""
        return _converted(self._first, self.stored, self._patterns, self._converter, self._model, tensors)


@dataclass(frozen=True, eq=False)
class Converted:
    """A parameter of the model as a tensor reference, made of stored tensors when it is read."""

    parameter: str
    placement: Placement
    parts: tuple[TensorReference, ...] = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.placement.shapes[self.parameter]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(file for part in self.parts for file in part.files))

    def read(self) -> torch.Tensor:
        stored = zip(self.placement.stored, (part.read() for part in self.parts), strict=True)
        return self.placement.to_model(dict(stored))[self.parameter].contiguous()


@dataclass(frozen=True, eq=False)
class ModelMap:
    """How the tensors of a checkpoint become a model.

    Attributes
    ----------
    placements : one for each group of stored tensors.
    tied : parameter -> the parameter that is the same matrix, where the configuration ties them.
    unplaced : stored names that are nothing to the model, apart from buffers that it computes itself.
    missing : parameter -> shape of those that no stored tensor becomes.
    shapes : parameter -> the shape that the configuration gives it.
    """

    placements: tuple[Placement, ...]
    tied: dict[str, str]
    unplaced: tuple[str, ...]
    missing: dict[str, tuple[int, ...]]
    shapes: dict[str, tuple[int, ...]]


def model_class(config: Mapping[str, Any], shapes: Shapes) -> type[PreTrainedModel] | None:
    """The class of transformers that a configuration names, None where it knows none; never remote code.

    A model that was saved without its head, to which its embeddings are tied, is the language model.
    """
    import transformers

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        return None
    settings = transformers.CONFIG_MAPPING[kind]
    bare, language = (_first(auto, settings) for auto in (transformers.AutoModel, transformers.AutoModelForCausalLM))
    names = [name for name in config.get("architectures") or [] if isinstance(name, str) and name.isidentifier()]
    known = (getattr(transformers, name, None) for name in names)
    classes = [each for each in known if isinstance(each, type) and issubclass(each, transformers.PreTrainedModel)]
    found = classes[0] if classes else language or bare
    if found is bare and language is not None and not model_map(config, shapes, language).missing:
        return language
    return found


def _first(auto: Any, settings: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    classes = auto._model_mapping[settings] if settings in auto._model_mapping else None
    # Some model types have several, of which the first is the usual one.
    return classes[0] if isinstance(classes, tuple) else classes


def model_map(config: Mapping[str, Any], shapes: Shapes, model_class: type[PreTrainedModel]) -> ModelMap:
    """Where transformers would put each stored tensor of a model of that configuration; no weight is read.

    Parameters
    ----------
    config : as `config.json` states it.
    shapes : stored name -> shape.
    model_class : as `model_class` finds it, the fine-tune's for both sides of a pair.

    Raises
    ------
    CheckpointError
        A configuration that the class does not accept, or tensors that do not fit together.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    model = _empty_model(config, model_class)
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    converter_of = {pattern: each for each in converters for pattern in each.source_patterns}
    state = model.state_dict()
    groups: dict[str, list[tuple[str, str | None]]] = {}
    # No model has as many layers, and transformers cannot read such a number.
    unplaced = [name for name in shapes if re.search(r"\d{19}", name)]
    # In the order of loading, which is that of the experts.
    for name in sorted(shapes.keys() - set(unplaced), key=dot_natural_key):
        prefix = model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            groups.setdefault(target, []).append((name, pattern))
        elif not any(re.search(each, name) for each in model._keys_to_ignore_on_load_unexpected or ()):
            unplaced.append(name)
    placements = []
    for target, members in groups.items():
        stored, patterns = zip(*members, strict=True)
        converter = converter_of.get(patterns[0])
        hollow = {name: torch.empty(shapes[name], device="meta") for name in stored}
        try:
            made = _converted(target, stored, patterns, converter, model, hollow)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise CheckpointError(
                f"{stored[0]!r} and {len(stored) - 1} more do not make {target!r} of a {model_class.__name__} "
                f"({error}); tensors are missing, or the configuration is another model's"
            ) from error
        becomes = {name: tuple(tensor.shape) for name, tensor in made.items()}
        placements.append(Placement(stored, becomes, target, patterns, converter, model))
    tied = dict(model.all_tied_weights_keys)
    made_names = {name for placement in placements for name in placement.shapes}
    missing = {
        name: tuple(tensor.shape)
        for name, tensor in state.items()
        if name not in made_names and not _shared_with(name, tied) & made_names
    }
    sizes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return ModelMap(tuple(placements), tied, tuple(unplaced), missing, sizes)


def _shared_with(name: str, tied: Mapping[str, str]) -> set[str]:
    """The parameters that are one matrix with this."""
    root = tied.get(name, name)
    return {root, *(each for each, source in tied.items() if source == root)}


def settings_of(config: Mapping[str, Any], model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """The configuration as transformers reads it.

    Raises
    ------
    CheckpointError
        One that the class does not accept.
    """
    from huggingface_hub.errors import StrictDataclassError

    make: Any = model_class.config_class
    try:
        # A copy, since transformers writes into the dicts that it is given.
        return make.from_dict(deepcopy(dict(config)))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unfit(model_class, error) from error


def _empty_model(config: Mapping[str, Any], model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """The model without weights."""
    make: Any = model_class
    settings = settings_of(config, model_class)
    try:
        with torch.device("meta"):
            return make(settings)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise _unfit(model_class, error) from error


def _unfit(model_class: type[PreTrainedModel], error: Exception) -> CheckpointError:
    first = str(error).split("\n", 1)[0]
    return CheckpointError(f"config.json: not one of a {model_class.__name__} ({first})")


def _converted(
    target: str,
    stored: tuple[str, ...],
    patterns: tuple[str | None, ...],
    converter: WeightConverter | None,
    model: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    if converter is None:
        return {target: tensors[stored[0]]}
    # A copy, since a converter collects what it is given.
    once: Any = deepcopy(converter)
    for name, pattern in zip(stored, patterns, strict=True):
        once.add_tensor(target, name, pattern, tensors[name])
    made = once.convert(target, model=model, config=model.config)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}
