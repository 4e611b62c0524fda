"""The guide's evaluation does what the guide says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.checkpoints.paths import find_root
from delta_analysis.deltas.delta import load_delta
from delta_analysis.evaluation.models import load_model, load_tokenizer
from delta_analysis.pruning import Dare
from delta_analysis.sweeps.engine import sweep
from delta_analysis.sweeps.pairs import Pair

TEXTS = ("12+30=42\n", "hello spelled backwards is olleh\n")


@pytest.fixture
def guide(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The evaluation that the guide shows, as a module of its own."""
    text = (find_root() / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python evaluation\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    module = ModuleType("guide")
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, "guide", module)
    exec(code, module.__dict__)
    return module


def last_probabilities(model: torch.nn.Module) -> list[float]:
    tokenizer = load_tokenizer(open_checkpoint("zoo:small/math"))
    found = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1]).logits[0, -1]
        found.append(float((logits - logits.logsumexp(0)).exp()[ids[0, -1]]))
    return found


def test_the_guides_evaluation_in_a_sweep(guide: Any, tmp_path: Path) -> None:
    evaluation = guide.LastTokenProbability(TEXTS)
    assert "2 texts" in evaluation.protocol
    pair = Pair("base → math", "zoo:small/base", "zoo:small/math")
    table = sweep([pair], [Dare(0), Dare(0.9), Dare(1)], [evaluation], [3], tmp_path)
    assert set(table["evaluation"]) == {"last token"}
    assert set(table["metric"]) == {"probability"}

    pruned = load_model(open_checkpoint("zoo:small/math"))
    delta = load_delta(base=pair.base, finetuned=pair.finetuned)
    with torch.no_grad():
        for name in delta:
            tensor, base = delta.read(name)
            assert base is not None
            pruned.get_parameter(name).copy_(base + Dare(0.9)(tensor, name=name, seed=3))
    models = [load_model(open_checkpoint("zoo:small/math")), pruned, load_model(open_checkpoint("zoo:small/base"))]
    for outcomes, model in zip(table["outcomes"], models, strict=True):
        assert list(outcomes) == pytest.approx(last_probabilities(model), rel=1e-4, abs=1e-8)
    assert len({tuple(outcomes) for outcomes in table["outcomes"]}) == 3
