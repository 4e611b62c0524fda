"""How far an edit turns the hidden states of a model, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis.evaluation.protocol import Evaluation, Kind, Outcomes
from delta_analysis.evaluation.tokens import Batch, Held, by_batch, check_texts, text_means, token_batches


@dataclass(frozen=True)
class HiddenSimilarity:
    """Cosine similarity of the hidden states of the judged and the untouched model, by layer.

    cos(u, v) = u·v / (|u| |v|) of the states u and v of one token, in float32; 1 if both are zero, 0
    if one is. The outcome of a text is the mean over its tokens, padding left out.

    Metric `similarity/0` is of the input of the first block, which is the embedding output;
    `similarity/l` is of the output of block l of 1 … L, as the block gives it. The last one too: the
    final norm of a Llama is not applied, unlike in the last of the `hidden_states` of transformers.

    The quantity is that of section 4.4 of DARE (arXiv 2311.03099), which does not say on which texts,
    tokens and layers; what is said here is this package's own choice.

    `prepared` keeps (L + 1) × tokens × hidden size float32 on the device of the untouched model.
    Calling what it returns gives one outcome a text, in their order.

    Parameters
    ----------
    texts : at least one, each of at least one token. A model that generates text reads them as they
        are; any other, such as a classifier, with the special tokens of its tokenizer.
    most_tokens : texts are cut to so many tokens, or to what the model can take; 1 or more.
    name : what tables call it.

    Raises
    ------
    ValueError
        No text, a text without tokens, `most_tokens` below 1, a model whose blocks are not in one
        list, or a call without `prepared`.

    Examples
    --------
    >>> from delta_analysis.checkpoints.checkpoint import open_checkpoint
    >>> from delta_analysis.evaluation.models import load_model, load_tokenizer
    >>> base, instruct = open_checkpoint("zoo:small/base"), open_checkpoint("zoo:small/instruct")
    >>> tokenizer = load_tokenizer(instruct)
    >>> evaluation = HiddenSimilarity(("abc spelled backwards is cba",)).prepared(load_model(instruct), tokenizer)
    >>> outcomes = evaluation(load_model(base), tokenizer)
    >>> list(outcomes)
    ['similarity/0', 'similarity/1', 'similarity/2', 'similarity/3', 'similarity/4']
    >>> bool(outcomes["similarity/4"][0] < outcomes["similarity/0"][0] < 1)
    True
    """

    kind: ClassVar[Kind] = "score"

    texts: tuple[str, ...]
    most_tokens: int = 256
    name: str = "hidden similarity"

    def __post_init__(self) -> None:
        check_texts(self.texts, self.most_tokens)

    @property
    def protocol(self) -> str:
        return (
            "Cosine similarity between the hidden states of the edited and the unedited model, token by token in "
            f"float32 (two zero vectors: 1; one: 0), meaned over the tokens of each of {len(self.texts)} texts cut to "
            f"{self.most_tokens} tokens or the model's context (decoders after their beginning-of-text token if "
            "they have one, encoders with their tokenizer's; padding left out). Layer 0 is the embedding output, "
            "layer l the output of block l before any final norm. Intervals resample the texts."
        )

    @torch.inference_mode()
    def prepared(self, untouched: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        """Ready to be called, with the hidden states of the untouched model."""
        batches = token_batches(self.texts, untouched, tokenizer, most_tokens=self.most_tokens)
        return by_batch(self, tuple((batch, tuple(_directions(untouched, batch))) for batch in batches), _judge)

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Outcomes:
        raise ValueError(f"{self.name} compares with the untouched model: call .prepared(untouched, tokenizer) first")


def _judge(model: PreTrainedModel, batch: Batch, untouched: Held) -> dict[str, torch.Tensor]:
    cosines = []
    for own, other in zip(untouched, _directions(model, batch), strict=True):
        own = own.to(other.device)
        both_zero = ~(own.any(-1) | other.any(-1))
        # Rounding may lead beyond 1.
        cosines.append(torch.linalg.vecdot(own, other).clamp(-1, 1).masked_fill(both_zero, 1.0))
    means = text_means(torch.stack(cosines), batch.lengths)
    return {f"similarity/{layer}": values for layer, values in enumerate(means)}


def _directions(model: PreTrainedModel, batch: Batch) -> list[torch.Tensor]:
    """Of each layer, the hidden states of the tokens as (tokens, hidden size) vectors of length 1 or 0."""
    with _recorded(model) as states:
        # Without its head, whose output is not needed.
        model.base_model(**batch.inputs(model))
    return [torch.nn.functional.normalize(batch.tokens(state).float(), dim=-1, eps=1e-30) for state in states]


@contextmanager
def _recorded(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Where the next forward pass leaves the input of the first block, then the output of each."""
    states: list[torch.Tensor] = []

    def before(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        states.append(inputs[0])

    def after(_: torch.nn.Module, __: Any, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    blocks = _blocks(model)
    handles = [blocks[0].register_forward_pre_hook(before), *(block.register_forward_hook(after) for block in blocks)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _blocks(model: PreTrainedModel) -> torch.nn.ModuleList:
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} has no list of its {count} blocks, so their outputs cannot be compared")
