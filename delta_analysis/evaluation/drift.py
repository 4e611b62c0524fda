"""How far an edit moves the predictions of a model, without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis._errors import checked_number
from delta_analysis.evaluation.protocol import Evaluation, Kind, Outcomes
from delta_analysis.evaluation.tokens import Batch, Held, by_batch, check_texts, text_means, token_batches


@dataclass(frozen=True)
class OutputDrift:
    """Distance between the predictions of the judged and the untouched model: divergence and logits.

    At each token, with p and z the next-token probabilities and logits of the untouched model, q and
    y those of the judged one, and K the `top_k` places where z is largest:

    `kl` = Σ p ln(p / q), in nats, over the vocabulary; 0 or more.
    `top5_logit_mse` = mean over K of (y − z)²; the name has the number `top_k`.

    The outcome of a text is the mean over its tokens, each of which predicts the next, the last too.
    A sequence classifier makes one prediction a text, of its classes; of fewer classes than `top_k`,
    all count.

    `top5_logit_mse` is the label-free loss by which DAREx (arXiv 2410.09344) chooses its factor for
    decoders, on texts of 256 tokens. Ours are: KL beside it, the mean by text, and the classifiers,
    for which DAREx compares a hidden state instead.

    `prepared` keeps tokens × (vocabulary + 3 `top_k`) × 4 bytes on the device of the untouched model:
    51 MB for 100 texts of 128 tokens and a vocabulary of 1,000, 6.6 GB for one of 128,000.
    Calling what it returns gives one outcome a text, in their order.

    Parameters
    ----------
    texts : at least one, each of at least one token. A model that generates text reads them as they
        are; any other, such as a classifier, with the special tokens of its tokenizer.
    most_tokens : texts are cut to so many tokens, or to what the model can take; 1 or more.
    top_k : how many logits a prediction is judged by; 1 or more.
    name : what tables call it.

    Raises
    ------
    ValueError
        No text, a text without tokens, `most_tokens` or `top_k` below 1, or a call without `prepared`.

    Examples
    --------
    >>> from delta_analysis.checkpoints.checkpoint import open_checkpoint
    >>> from delta_analysis.evaluation.models import load_model, load_tokenizer
    >>> checkpoint = open_checkpoint("zoo:small/base")
    >>> model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    >>> outcomes = OutputDrift(("two", "texts")).prepared(model, tokenizer)(model, tokenizer)
    >>> {metric: values.tolist() for metric, values in outcomes.items()}
    {'kl': [0.0, 0.0], 'top5_logit_mse': [0.0, 0.0]}
    """

    kind: ClassVar[Kind] = "error"

    texts: tuple[str, ...]
    most_tokens: int = 256
    top_k: int = 5
    name: str = "output drift"

    def __post_init__(self) -> None:
        check_texts(self.texts, self.most_tokens)
        checked_number("top_k", self.top_k, 1, whole=True)

    @property
    def protocol(self) -> str:
        return (
            "Divergence KL(unedited ‖ edited) of the next-token predictions in nats, and the mean squared difference "
            f"of the {self.top_k} logits that are largest in the unedited model, each meaned over the tokens of each "
            f"of {len(self.texts)} texts cut to {self.most_tokens} tokens or the model's context (decoders after "
            "their beginning-of-text token if they have one, encoders with their tokenizer's; padding left out; of a "
            "classifier, one prediction a text, of its classes). Intervals resample the texts."
        )

    @torch.inference_mode()
    def prepared(self, untouched: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        """Ready to be called, with the predictions of the untouched model."""

        def kept(batch: Batch) -> Held:
            logits = _predictions(untouched, batch)
            top = logits.topk(min(self.top_k, logits.shape[-1]))
            return logits.log_softmax(-1), top.indices, top.values

        def judge(model: PreTrainedModel, batch: Batch, held: Held) -> dict[str, torch.Tensor]:
            logits = _predictions(model, batch)
            log_p, places, largest = (tensor.to(logits.device) for tensor in held)
            kl = torch.nn.functional.kl_div(logits.log_softmax(-1), log_p, log_target=True, reduction="none").sum(-1)
            # A classifier makes one prediction a text.
            lengths = batch.lengths if len(logits) == sum(batch.lengths) else [1] * len(batch.lengths)
            return {
                # Rounding may lead below 0.
                "kl": text_means(kl.clamp(min=0), lengths),
                f"top{self.top_k}_logit_mse": text_means(
                    (logits.gather(-1, places) - largest).square().mean(-1), lengths
                ),
            }

        batches = token_batches(self.texts, untouched, tokenizer, most_tokens=self.most_tokens)
        return by_batch(self, tuple((batch, kept(batch)) for batch in batches), judge)

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Outcomes:
        raise ValueError(f"{self.name} compares with the untouched model: call .prepared(untouched, tokenizer) first")


def _predictions(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits of each prediction: (tokens, vocabulary), or (texts, classes) of a sequence classifier."""
    logits = model(**batch.inputs(model)).logits.float()
    return batch.tokens(logits) if logits.dim() == 3 else logits
