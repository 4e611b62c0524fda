"""Accuracy of a sequence classifier."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis._errors import checked_number
from delta_analysis.evaluation.protocol import SPEED, Evaluation, Kind, Outcomes
from delta_analysis.evaluation.tokens import Batch, Held, by_batch, token_batches


@dataclass(frozen=True)
class Labelled:
    """A text, and the number of its class: 0 or more."""

    text: str
    label: int


def load_labelled(path: str | Path, count: int | None = None) -> list[Labelled]:
    r"""The first `count` examples of a JSONL file (all, if it has fewer), one object a line.

    A line is `{"text": …, "label": …}`, the label a whole number from 0 on.

    Raises
    ------
    ValueError
        A line that is no such object, or whose text is empty.

    Examples
    --------
    >>> from delta_analysis.checkpoints.paths import find_root
    >>> load_labelled(find_root() / "data" / "zoo" / "tasks" / "strings-right.jsonl", 1)
    [Labelled(text='qdkg in capitals is HZES\n', label=0)]
    """
    examples = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").rstrip().split("\n"), start=1):
        try:
            fields = json.loads(line)
            example = Labelled(fields["text"], fields["label"])
            if not isinstance(example.text, str):
                raise TypeError("text must be text")
            if not example.text:
                raise ValueError("an empty text")
            # A bool is an int to Python.
            if type(example.label) is not int or example.label < 0:
                raise ValueError("label must be a whole number from 0 on")
            examples.append(example)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: expected {{"text": …, "label": …}}, got {line[:80]!r} ({error})'
            ) from error
    return examples[:count]


@dataclass(frozen=True)
class Classification:
    r"""Accuracy of a sequence classifier: whether the largest logit of a text is that of its label.

    Texts go to the tokenizer with its special tokens, cut to what the model can take. Calling it, or
    what `prepared` returns, gives metric `accuracy`: 0 or 1 an example, in their order.

    Parameters
    ----------
    examples : at least one.
    name : what tables call it.
    batch_size : how many texts a forward pass reads at most; 1 or more.

    Raises
    ------
    ValueError
        No example, `batch_size` below 1, a text without tokens, a model that is no sequence
        classifier, or a label that it does not have.

    Examples
    --------
    >>> from delta_analysis.checkpoints.checkpoint import open_checkpoint
    >>> from delta_analysis.evaluation.models import load_model, load_tokenizer
    >>> checkpoint = open_checkpoint("zoo:encoder/strings")
    >>> examples = Labelled("fqn spelled backwards is nqf\n", 1), Labelled("qdkg in capitals is HZES\n", 0)
    >>> Classification(examples)(load_model(checkpoint), load_tokenizer(checkpoint))
    {'accuracy': array([1., 1.])}
    """

    kind: ClassVar[Kind] = "score"

    examples: tuple[Labelled, ...]
    name: str = "classification"
    batch_size: int = field(default=50, metadata=SPEED)

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError("there is no example to judge a model on; expected at least one")
        checked_number("batch_size", self.batch_size, 1, whole=True)

    @property
    def protocol(self) -> str:
        return (
            f"Accuracy: share of {len(self.examples)} labelled texts whose largest logit is that of their label (texts "
            "with the tokenizer's special tokens, cut to the model's context). Intervals resample the examples."
        )

    @property
    def chance(self) -> float:
        """The accuracy of always saying the label that most examples have."""
        labels = [example.label for example in self.examples]
        return max(map(labels.count, set(labels))) / len(labels)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of the examples, without their labels."""
        return tuple(example.text for example in self.examples)

    def prepared(self, untouched: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        """The same with its batches of tokens at hand."""
        classes = getattr(untouched, "num_labels", None)
        if classes is None:
            raise _no_classifier(untouched)
        for number, example in enumerate(self.examples):
            if not 0 <= example.label < classes:
                raise ValueError(
                    f"example {number} has label {example.label}; expected 0 to {classes - 1}, "
                    f"the classes of {type(untouched).__name__}: {example.text[:80]!r}"
                )
        labels = torch.tensor([example.label for example in self.examples], device=untouched.device)
        batches = token_batches(self.texts, untouched, tokenizer, most_texts=self.batch_size)
        return by_batch(self, tuple((batch, (labels[batch.places],)) for batch in batches), _judge)

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Outcomes:
        return self.prepared(model, tokenizer)(model, tokenizer)


def _judge(model: PreTrainedModel, batch: Batch, held: Held) -> dict[str, torch.Tensor]:
    logits = model(**batch.inputs(model)).logits
    if logits.dim() != 2:
        raise _no_classifier(model)
    return {"accuracy": (logits.argmax(-1) == held[0].to(logits.device)).double()}


def _no_classifier(model: PreTrainedModel) -> ValueError:
    return ValueError(
        f"{type(model).__name__} is no sequence classifier; expected num_labels and logits of shape (texts, labels): "
        "load a checkpoint whose architecture ends in ForSequenceClassification"
    )
