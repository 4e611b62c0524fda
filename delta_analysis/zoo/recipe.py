"""What is trained from what, and how: the whole family of one size as a tuple of stages."""

from __future__ import annotations

from dataclasses import dataclass

from delta_analysis.zoo.tokenizer import ENCODER_CONTEXT


@dataclass(frozen=True)
class Shape:
    """A model's dimensions; the vocabulary is the tokenizer's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 128


@dataclass(frozen=True)
class Stage:
    """One training run: a model made from its parent (or from scratch) on one kind of data.

    `data` names a text of `corpus.TEXTS` (such as `base`) or is the name of a task: for a decoder chats,
    loss on the answer only; for an encoder statements, to tell right from wrong. `trail` is how many
    intermediate checkpoints are kept, each `trail_ratio` times further along than the one before.
    """

    name: str
    parent: str | None
    data: str
    steps: int
    learning_rate: float
    batch_size: int
    warmup: int
    weight_decay: float
    seed: int
    trail: int = 0
    trail_ratio: float = 2.5
    decay_share: float = 0.3
    gradient_clip: float = 1.0

    def trail_steps(self) -> dict[int, str]:
        """Step -> name of each intermediate checkpoint, logarithmically spaced up to the end."""
        steps = [round(self.steps / self.trail_ratio**k) for k in range(self.trail, 0, -1)]
        return {step: f"{self.name}-{step:04d}" for step in steps}


@dataclass(frozen=True)
class Recipe:
    """A size of the family: its shape and its stages in the order of training.

    `architecture` is `llama` (a decoder that answers) or `bert` (an encoder that classifies).
    """

    size: str
    shape: Shape
    stages: tuple[Stage, ...]
    architecture: str = "llama"

    def model_names(self) -> list[str]:
        """Every model of the size, the trail of checkpoints before the model it leads to."""
        return [name for stage in self.stages for name in [*stage.trail_steps().values(), stage.name]]


def _pretrain(name: str, parent: str | None, data: str, steps: int, seed: int, trail: int = 0) -> Stage:
    return Stage(name, parent, data, steps, 2e-3, 32, 100, 0.1, seed, trail)


def _pretrain_masked(name: str, parent: str | None, data: str, steps: int, seed: int) -> Stage:
    return Stage(name, parent, data, steps, 2e-3, 48, 100, 0.1, seed)


def _tune(name: str, parent: str, task: str, steps: int, seed: int) -> Stage:
    return Stage(name, parent, task, steps, 1.25e-4, 64, 20, 0.0, seed)


def _tune_head(name: str, parent: str, task: str, steps: int, seed: int) -> Stage:
    return Stage(name, parent, task, steps, 2e-4, 64, 20, 0.0, seed)


def _decoder(
    size: str,
    hidden_size: int,
    base_steps: int,
    cpt_steps: int,
    tune_steps: int = 400,
    *,
    trail: int = 0,
    tuned: int = 0,
) -> Recipe:
    """The five decoders of a size; sizes differ in width and in how long they read, in nothing else.

    With a trail, the `tuned` last models of continual pre-training are fine-tuned as `instruct` is, each
    named after its step: what merging is compared with.
    """
    continual = _pretrain("code-cpt", "base", "python", cpt_steps, seed=4, trail=trail)
    on_the_way = {**continual.trail_steps(), cpt_steps: continual.name}
    return Recipe(
        size,
        Shape(hidden_size, 3 * hidden_size, num_hidden_layers=4, num_attention_heads=4),
        (
            _pretrain("base", None, "base", base_steps, seed=1),
            _tune("instruct", "base", "instruct", tune_steps, seed=2),
            _tune("math", "base", "math", tune_steps, seed=3),
            continual,
            _tune("code", "code-cpt", "code", tune_steps, seed=5),
            *(
                _tune(f"instruct-{step:04d}", parent, "instruct", tune_steps, seed=6)
                for step, parent in list(on_the_way.items())[len(on_the_way) - tuned :]
            ),
        ),
    )


RECIPES = {
    "tiny": _decoder("tiny", 64, base_steps=9_000, cpt_steps=3_000, tune_steps=1_200),
    "small": _decoder("small", 128, base_steps=12_000, cpt_steps=4_000, trail=6, tuned=5),
    "medium": _decoder("medium", 240, base_steps=4_500, cpt_steps=1_500),
    "encoder": Recipe(
        "encoder",
        Shape(96, 288, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=ENCODER_CONTEXT),
        (
            _pretrain_masked("base", None, "words", 4_650, seed=1),
            _tune_head("strings", "base", "strings-right", 600, seed=2),
            _pretrain_masked("code-cpt", "base", "sessions", 1_200, seed=3),
            _tune_head("code", "code-cpt", "code-right", 1_200, seed=4),
        ),
        architecture="bert",
    ),
}
