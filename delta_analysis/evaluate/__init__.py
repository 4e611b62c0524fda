"""Evaluations: what a model is judged by, each a callable on (model, tokenizer) that gives outcomes of items."""

from delta_analysis.evaluate.classification import Classification, Labelled, load_labelled
from delta_analysis.evaluate.drift import OutputDrift
from delta_analysis.evaluate.exact_match import ExactMatch, Question, load_questions
from delta_analysis.evaluate.harness import LmEval
from delta_analysis.evaluate.perplexity import TextPerplexity
from delta_analysis.evaluate.protocol import Evaluation, Outcomes
from delta_analysis.evaluate.similarity import HiddenSimilarity
from delta_analysis.evaluate.weights import WeightDamage

__all__ = [
    "Classification",
    "Evaluation",
    "ExactMatch",
    "HiddenSimilarity",
    "Labelled",
    "LmEval",
    "Outcomes",
    "OutputDrift",
    "Question",
    "TextPerplexity",
    "WeightDamage",
    "load_labelled",
    "load_questions",
]
