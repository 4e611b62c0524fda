"""A model and its tokenizer in, outcomes of items out."""

from delta_analysis.evaluation.classification import Classification, Labelled, load_labelled
from delta_analysis.evaluation.drift import OutputDrift
from delta_analysis.evaluation.exact_match import ExactMatch, Question, load_questions
from delta_analysis.evaluation.harness import LmEval
from delta_analysis.evaluation.hidden_states import HiddenSimilarity
from delta_analysis.evaluation.margins import Margins, first_items, margins_of
from delta_analysis.evaluation.models import (
    check_device,
    finetuned_model,
    load_model,
    load_tokenizer,
    parameters_of,
    write_weights,
)
from delta_analysis.evaluation.perplexity import TextPerplexity
from delta_analysis.evaluation.protocol import Evaluation, Kind, Outcomes
from delta_analysis.evaluation.tokens import Batch, check_texts, token_batches

__all__ = [
    "Batch",
    "Classification",
    "Evaluation",
    "ExactMatch",
    "HiddenSimilarity",
    "Kind",
    "Labelled",
    "LmEval",
    "Margins",
    "Outcomes",
    "OutputDrift",
    "Question",
    "TextPerplexity",
    "check_device",
    "check_texts",
    "finetuned_model",
    "first_items",
    "load_labelled",
    "load_model",
    "load_questions",
    "load_tokenizer",
    "margins_of",
    "parameters_of",
    "token_batches",
    "write_weights",
]
