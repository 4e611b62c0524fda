"""Parameters of the report on merging: the embedded family, models of one's own, errors that name their parameter."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.checkpoints.paths import find_root
from delta_analysis.evaluation.models import load_model
from delta_analysis.reports.family import questions_file, trail, tuned_on_trail
from delta_analysis.reports.merge_parameters import MergeParameters, Stop
from delta_analysis.reports.parameter_checks import ParameterError, parse_scalings
from delta_analysis.sweeps.pairs import Pair

EMBEDDED = MergeParameters(
    base="",
    finetuned="",
    evaluation="",
    continued="",
    continued_evaluation="",
    drop_rates=[0.5],
    scalings=[1.0],
    first_seed=0,
    n_seeds=2,
    n_questions=20,
    chat_template=False,
    device="cpu",
    out_dir="runs/test",
)
TINY = {"base": "zoo:tiny/base", "finetuned": "zoo:tiny/instruct,zoo:tiny/math", "evaluation": "instruct,math"}
CONTINUED = {**TINY, "continued": "zoo:tiny/code-cpt", "continued_evaluation": "code"}


def parameters(**given: Any) -> MergeParameters:
    return replace(EMBEDDED, **given)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with models and questions of one's own."""
    for name in ("base", "instruct", "math", "code-cpt"):
        shutil.copytree(find_root() / "data" / "zoo" / "tiny" / name, tmp_path / f"my-{name}")
    for name in ("one", "two", "three"):
        questions = [{"prompt": f"{name} {i}", "answer": str(i)} for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return tmp_path


def models(own: Path, *names: str) -> str:
    return ", ".join(str(own / name) for name in names)


def test_the_embedded_family_is_the_default() -> None:
    assert EMBEDDED.embedded
    assert EMBEDDED.sources() == ["zoo:small/instruct", "zoo:small/math"]
    assert [relation.pair for relation in EMBEDDED.relations()] == [
        Pair("base → instruct", "zoo:small/base", "zoo:small/instruct"),
        Pair("base → math", "zoo:small/base", "zoo:small/math"),
    ]
    judges = EMBEDDED.evaluations()
    assert {name: len(each.questions) for name, each in judges.items()} == {"instruct": 20, "math": 20, "code": 20}
    assert list(judges) == ["instruct", "math", "code"]
    assert EMBEDDED.evaluation_files() == [questions_file(task) for task in ("instruct", "math", "code")]


def test_stops_of_the_family_are_those_that_were_fine_tuned_too() -> None:
    tuned = tuned_on_trail()
    stops = EMBEDDED.stops()
    assert [stop.steps for stop in stops] == [steps for steps, _ in trail() if steps in tuned]
    assert len(stops) >= 3
    for stop in stops:
        assert stop.tuned is not None
        assert stop.pair.base == stop.tuned.base == "zoo:small/base"
        assert (stop.pair.finetuned, stop.tuned.finetuned) == (dict(trail())[stop.steps], tuned[stop.steps])
    assert stops[-1].pair.finetuned == "zoo:small/code-cpt"
    names = [pair.name for stop in stops for pair in (stop.pair, stop.tuned) if pair]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1.4, 0.6, 1], (0.6, 1.0, 1.4)),
        ("0.8", (0.8,)),
        (" 1.0 , 0.5,1", (0.5, 1.0)),
        (2, (2.0,)),
        ((0.5, 0.5), (0.5,)),
        ("1e-3", (0.001,)),
    ],
)
def test_scalings_from_lists_numbers_and_text(given: Any, expected: tuple[float, ...]) -> None:
    assert parse_scalings(given) == expected


@pytest.mark.parametrize(
    "wrong", ["", [], "a", "1,,2", "0", -1, [1, 0.0], math.nan, "inf", [math.inf], None, [[1]], "1;2"]
)
def test_other_scalings_are_refused(wrong: Any) -> None:
    with pytest.raises(ParameterError, match="parameter scalings: must be finite numbers above 0, as .0.5, 1.0.; not "):
        parameters(scalings=wrong)


def test_models_of_ones_own(own: Path) -> None:
    chosen = parameters(
        base=str(own / "my-base"),
        finetuned=models(own, "my-instruct", "my-math"),
        evaluation=models(own, "one.jsonl", "two.jsonl"),
    )
    assert not chosen.embedded
    assert [relation.pair for relation in chosen.relations()] == [
        Pair(f"my-base → {name}", str(own / "my-base"), str(own / name)) for name in ("my-instruct", "my-math")
    ]
    assert {name: each.questions[0].prompt for name, each in chosen.evaluations().items()} == {
        "one.jsonl": "one 0",
        "two.jsonl": "two 0",
    }
    assert chosen.evaluation_files() == [own / "one.jsonl", own / "two.jsonl"]
    assert chosen.stops() == []
    # A task of the family may stand among files.
    mixed = replace(chosen, evaluation=f"math, {own / 'two.jsonl'}", n_questions=5, chat_template=True)
    assert [(name, len(each.questions)) for name, each in mixed.evaluations().items()] == [
        ("math", 5),
        ("two.jsonl", 5),
    ]
    assert all(each.chat_template for each in mixed.evaluations().values())


def test_a_continued_model_of_ones_own(own: Path) -> None:
    chosen = parameters(
        base=str(own / "my-base"),
        finetuned=models(own, "my-instruct", "my-math"),
        evaluation=models(own, "one.jsonl", "two.jsonl"),
        continued=str(own / "my-code-cpt"),
        continued_evaluation=str(own / "three.jsonl"),
    )
    pair = Pair("my-base → my-code-cpt", str(own / "my-base"), str(own / "my-code-cpt"))
    assert chosen.stops() == [Stop(0, pair, None)]
    assert list(chosen.evaluations()) == ["one.jsonl", "two.jsonl", "three.jsonl"]
    assert chosen.evaluation_files()[-1] == own / "three.jsonl"


def test_paths_become_whole_and_embedded_names_stay(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own)
    chosen = parameters(
        base="my-base", finetuned="my-instruct,./my-math", evaluation="instruct,math", continued="my-code-cpt",
        continued_evaluation="code",
    )  # fmt: skip
    assert chosen.base == str(own / "my-base")
    assert chosen.sources() == [str(own / "my-instruct"), str(own / "my-math")]
    assert chosen.continued == str(own / "my-code-cpt")
    from_root = parameters(**{**TINY, "base": "data/zoo/tiny/base"})
    assert from_root.base == str(find_root() / "data" / "zoo" / "tiny" / "base")
    assert parameters(**TINY).sources() == ["zoo:tiny/instruct", "zoo:tiny/math"]


def test_more_than_two_are_merged(own: Path) -> None:
    chosen = parameters(
        **{**TINY, "finetuned": TINY["finetuned"] + ", zoo:tiny/code-cpt", "evaluation": "instruct,math,code"}
    )
    assert [relation.task for relation in chosen.relations()] == ["instruct", "math", "code"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_questions": 3}, "n_questions: must be a whole number of at least 4; not 3"),
        ({"evaluation": "math"}, "evaluation: needs base and finetuned; the embedded family brings its own"),
        ({"continued": "zoo:tiny/code-cpt"}, "continued: needs base and finetuned"),
        ({"continued_evaluation": "code"}, "continued_evaluation: needs base and finetuned"),
        ({"base": "zoo:tiny/base"}, "finetuned: must name at least two fine-tunes, commas between; not ''"),
        ({**TINY, "finetuned": "zoo:tiny/math"}, "finetuned: must name at least two fine-tunes"),
        ({**TINY, "finetuned": "zoo:tiny/math,"}, "finetuned: must name at least two fine-tunes"),
        ({**TINY, "base": ""}, "base: is empty while finetuned is not"),
        ({**TINY, "base": "zoo:tiny/bse"}, "base: .*no such embedded model; known are .*zoo:tiny/base"),
        ({**TINY, "finetuned": "zoo:tiny/instruct,no/such/folder"}, "finetuned: no/such/folder: no such file"),
        ({**TINY, "base": "pair:x"}, "base: 'pair:x' names two models; give base and fine-tunes by themselves"),
        ({**TINY, "finetuned": "zoo:tiny/math, pair:x"}, "finetuned: 'pair:x' names two models"),
        ({**CONTINUED, "continued": "pair:x"}, "continued: 'pair:x' names two models"),
        ({**TINY, "base": "zoo:small/base"}, "base: .*share .* names but no shape"),
        ({**TINY, "finetuned": "zoo:tiny/math,zoo:tiny/math"}, "finetuned: two models .* called 'base → math'"),
        ({**CONTINUED, "continued": "zoo:tiny/math"}, "finetuned: two models .* called 'base → math'"),
        (
            {**TINY, "evaluation": ""},
            "evaluation: must name questions for each of 2 fine-tunes, commas between; not ''",
        ),
        ({**TINY, "evaluation": "math"}, "evaluation: must name questions for each of 2"),
        ({**TINY, "evaluation": "math,"}, "evaluation: must name questions for each of 2"),
        ({**TINY, "evaluation": "math,math"}, "evaluation: 'math' bears the name of another file, or serves twice"),
        ({**TINY, "evaluation": "instruct,maths"}, "evaluation: must be one of instruct, math"),
        ({**TINY, "evaluation": "instruct,README.md"}, "evaluation: 'README.md' holds no questions"),
        ({**TINY, "evaluation": "instruct,code-right"}, "evaluation: 'code-right' holds no questions"),
        ({**TINY, "evaluation": "instruct,lm-eval:gsm8k"}, "evaluation: 'lm-eval:gsm8k' holds no questions"),
        ({**TINY, "continued": "zoo:tiny/code-cpt"}, "continued_evaluation: is empty; give a continually pre-trained"),
        ({**TINY, "continued_evaluation": "code"}, "continued: is empty; give a continually pre-trained model"),
        ({**CONTINUED, "continued": "zoo:tiny/cod"}, "continued: .*no such embedded model"),
        ({**CONTINUED, "continued_evaluation": "cod"}, "continued_evaluation: must be one of instruct, math, code"),
        ({**CONTINUED, "continued_evaluation": "README.md"}, "continued_evaluation: 'README.md' holds no questions"),
        ({**CONTINUED, "continued_evaluation": "math"}, "continued_evaluation: 'math' bears the name of another"),
    ],
)
def test_wrong_values_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=f"^parameter {message}"):
        parameters(**change)


def test_files_of_questions_are_checked(own: Path) -> None:
    few, broken, folder = own / "few.jsonl", own / "broken.jsonl", own / "sub"
    few.write_text('{"prompt": "a", "answer": "b"}\n' * 3)
    broken.write_text("{}\n" * 4)
    folder.mkdir()
    shutil.copy(own / "one.jsonl", folder / "one.jsonl")
    for file, message in {
        few: "holds 3 questions; give at least 4",
        broken: "line 1",
        folder / "one.jsonl": "bears the name of another file",
    }.items():
        with pytest.raises(ParameterError, match=f"^parameter evaluation: .*{message}"):
            parameters(**{**TINY, "evaluation": f"{own / 'one.jsonl'},{file}"})
        with pytest.raises(ParameterError, match=f"^parameter continued_evaluation: .*{message}"):
            parameters(**{**CONTINUED, "evaluation": f"{own / 'one.jsonl'},math", "continued_evaluation": str(file)})


def test_models_that_do_not_fit_together_are_refused(own: Path) -> None:
    file = own / "my-math" / "model.safetensors"
    weights = load_file(file)
    whole = dict(weights)
    given = {
        "base": str(own / "my-base"),
        "finetuned": models(own, "my-instruct", "my-math"),
        "evaluation": "instruct,math",
    }
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ParameterError, match="^parameter finetuned: .*my-math: 1 of 38 tensors of the other deltas"):
        parameters(**given)
    save_file(whole, file, metadata={"format": "pt"})
    (own / "my-math" / "config.json").unlink()
    with pytest.raises(
        ParameterError, match="^parameter finetuned: .*my-math: evaluation needs a directory with config"
    ):
        parameters(**given)
    with pytest.raises(ParameterError, match="^parameter continued: .*my-math: evaluation needs a directory"):
        parameters(
            **{
                **CONTINUED,
                "base": str(own / "my-base"),
                "finetuned": models(own, "my-instruct", "my-code-cpt"),
                "continued": str(own / "my-math"),
            }
        )
    # A bare file of weights is no model.
    with pytest.raises(ParameterError, match="^parameter finetuned: .*evaluation needs a directory"):
        parameters(**{**given, "finetuned": models(own, "my-instruct", "my-math/model.safetensors")})


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_comes_after_what_changes_all(own: Path) -> None:
    wrapped = get_peft_model(load_model(open_checkpoint("zoo:tiny/base")), LoraConfig(r=2, target_modules=["up_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.01)
    wrapped.save_pretrained(str(own / "adapter"))
    adapter = str(own / "adapter")
    chosen = parameters(**{**TINY, "finetuned": f"zoo:tiny/math,{adapter}"})
    assert chosen.sources()[1] == adapter
    with pytest.raises(
        ParameterError, match="^parameter finetuned: .*adapter leaves '.*' alone, which another one changes"
    ):
        parameters(**{**TINY, "finetuned": f"{adapter},zoo:tiny/math"})
    with pytest.raises(ParameterError, match="^parameter continued: .*adapter leaves '.*' alone"):
        parameters(**{**CONTINUED, "continued": adapter})
