"""Whether deltas can be merged: the base is told by its weights, and what does not fit is refused before it is read."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import delta_analysis as da
from delta_analysis._errors import NotHomologousError
from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.checkpoints.names import reading_order
from delta_analysis.checkpoints.tensors import InFile, InMemory
from delta_analysis.deltas.delta import Delta, load_delta
from delta_analysis.deltas.saving import save_checkpoint as save_model
from delta_analysis.evaluation.models import load_model
from delta_analysis.merging.compatibility import check_mergeable
from delta_analysis.merging.merger import merge
from tests import architectures
from tests.conftest import SaveCheckpoint

Tensors = dict[str, torch.Tensor]
BASE, SOURCES = "zoo:tiny/base", ("zoo:tiny/instruct", "zoo:tiny/math")
NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(one: Delta, other: Delta) -> None:
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each tensor that is read of a file, as often as it is."""
    found: list[str] = []
    read_into = InFile.read_into

    def counted(self: InFile, *arguments: Any) -> None:
        found.append(self.name)
        read_into(self, *arguments)

    monkeypatch.setattr(InFile, "read_into", counted)
    return found


SHAPES = {EMBED: (12, 4), "model.layers.0.mlp.up_proj.weight": (6, 4), NORM: (4,)}
START = {name: normal(*shape, seed=i).bfloat16().float() for i, (name, shape) in enumerate(SHAPES.items())}


def moved(seed: int, **change: torch.Tensor | None) -> Tensors:
    """A fine-tune of these weights."""
    tuned = {
        name: tensor + 0.01 * normal(*tensor.shape, seed=100 * seed + i)
        for i, (name, tensor) in enumerate(START.items())
    }
    return {name: tensor for name, tensor in (tuned | change).items() if tensor is not None}


@pytest.fixture
def made(save_checkpoint: SaveCheckpoint) -> Callable[..., str]:
    return lambda name, tensors: str(save_checkpoint(name, tensors))


@pytest.fixture
def tuned(made: Callable[..., str]) -> list[str]:
    """A base and two fine-tunes of it on disk."""
    return [made("base", START), made("one", moved(1)), made("two", moved(2))]


def loaded(base: Any, *tuned: str, **how: Any) -> list[Delta]:
    return [load_delta(base=base, finetuned=each, **how) for each in tuned]


def test_of_the_same_base_nothing_is_read(tuned: list[str], reads: list[str]) -> None:
    base, one, two = tuned
    given = loaded(base, one, two)
    reads.clear()
    start, found, matches = check_mergeable(base, given)
    assert (start.source, found) == (base, given)
    assert [match.tensor for match in matches] == list(given[0])
    assert [match.status for match in matches] == ["compared"] * 3
    check_mergeable(open_checkpoint(base), given)
    assert reads == []


def test_the_same_base_under_another_path_is_no_other_base(tuned: list[str], tmp_path: Path, reads: list[str]) -> None:
    base, one, two = tuned
    moved_base = str(shutil.copytree(base, tmp_path / "copy"))
    given = [*loaded(base, one), *loaded(moved_base, two), *loaded(moved_base, one)]
    expected = merge(base, loaded(base, one, two, one), da.merging.Average())
    reads.clear()
    found = merge(base, given, da.merging.Average())
    # Each tensor of the two bases is read once, to be hashed, and none of a fine-tune.
    assert sorted(reads) == sorted([*START, *START])
    assert_same(found, expected)
    assert_same(merge(moved_base, given, da.merging.Average()), expected)
    assert_same(merge(open_checkpoint(base), given, da.merging.Average()), expected)


def test_nor_is_one_in_another_dtype(tuned: list[str], made: Callable[..., str]) -> None:
    base, one, two = tuned
    short = made("short", {name: tensor.bfloat16() for name, tensor in START.items()})
    expected = merge(base, loaded(base, one, two), da.merging.Ties(0.5))
    assert_same(merge(base, [*loaded(short, one), *loaded(base, two)], da.merging.Ties(0.5)), expected)
    assert_same(merge(short, loaded(base, one, two), da.merging.Ties(0.5)), expected)
    shards = made("other", {**START, "model.layers.0.input_layernorm.weight": torch.ones(4)})
    # A tensor that no delta has may be there or not.
    assert_same(merge(shards, loaded(base, one, two), da.merging.Ties(0.5)), expected)


def test_a_base_in_memory_is_compared_by_its_weights() -> None:
    model = load_model(open_checkpoint(BASE))
    given = [load_delta(base=model, finetuned=SOURCES[0]), load_delta(base=BASE, finetuned=SOURCES[1])]
    expected = merge(BASE, [load_delta(base=BASE, finetuned=source) for source in SOURCES[:2]], da.merging.Average())
    assert_same(merge(model, given, da.merging.Average()), expected)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(NORM)[5] += 1e-3
    with pytest.raises(NotHomologousError, match=f"another base: tensor {NORM!r} of LlamaForCausalLM"):
        merge(BASE, [load_delta(base=other, finetuned=SOURCES[0]), given[1]], da.merging.Average())


@pytest.mark.parametrize("name", list(START))
def test_one_entry_of_one_tensor_makes_another_base(
    tuned: list[str], made: Callable[..., str], reads: list[str], name: str
) -> None:
    base, one, two = tuned
    changed = {each: tensor.clone() for each, tensor in START.items()}
    changed[name].view(-1)[-1] += 1e-6
    other = made("other", changed)
    given = [*loaded(base, one), *loaded(other, two)]
    reads.clear()
    with pytest.raises(NotHomologousError) as error:
        merge(base, given, da.merging.Average())
    assert str(error.value).startswith(
        f"{two}: is a delta from another base: tensor {name!r} of {other} is not that of {base}"
    )
    # No delta was read: of each tensor the two bases, up to the one that differs.
    order = sorted(START, key=reading_order)
    upto = order[: order.index(name) + 1]
    assert sorted(reads) == sorted([*upto, *upto])
    with pytest.raises(NotHomologousError, match=f"{one}: is a delta from another base"):
        merge(other, given, da.merging.Average())


def test_deltas_of_another_base_are_refused_whatever_their_base_is_called(tuned: list[str]) -> None:
    """As where somebody gives a chat model in place of the base."""
    base, one, two = tuned
    with pytest.raises(NotHomologousError, match="another base"):
        merge(one, loaded(base, one, two), da.merging.Average())
    with pytest.raises(NotHomologousError, match="another base.*load all deltas with the base that they are merged on"):
        merge(
            "zoo:tiny/code-cpt", [load_delta(base=BASE, finetuned=each) for each in SOURCES[:2]], da.merging.Average()
        )


def test_a_base_that_lacks_a_tensor_of_a_delta(tuned: list[str], made: Callable[..., str]) -> None:
    base, one, two = tuned
    less = made("less", {name: tensor for name, tensor in START.items() if name != NORM})
    with pytest.raises(NotHomologousError, match=f"{less}: has no tensor {NORM!r}, which {one} has a delta of"):
        merge(less, loaded(base, one, two), da.merging.Average())


def test_fine_tunes_that_lack_a_tensor_are_refused(tuned: list[str], made: Callable[..., str]) -> None:
    base, one, _ = tuned
    lacking = made("lacking", moved(3, **{NORM: None}))
    for order in ([one, lacking], [lacking, one]):
        with pytest.raises(NotHomologousError) as error:
            merge(base, loaded(base, *order), da.merging.Average())
        text = f"{lacking}: 1 of 3 tensors of the other deltas are not in its delta, such as {NORM!r}"
        assert str(error.value).startswith(text)
    # All that lack it have nothing to merge there, and the base keeps it.
    merged = merge(base, loaded(base, lacking, lacking), da.merging.Average())
    assert set(merged) == set(START) - {NORM}
    assert merged.coverage().set_index("tensor").loc[NORM, "status"] == "only in base"


def test_an_adapter_cannot_change_what_the_fine_tunes_lack(tuned: list[str], made: Callable[..., str]) -> None:
    base, one, _ = tuned
    lacking = made("lacking", moved(3, **{NORM: None}))
    published = made("published", {NORM: torch.ones(4)})
    (difference,) = loaded(base, published, finetuned_is_delta=True)
    with pytest.raises(NotHomologousError, match=f"{published}: changes {NORM!r}, which the other deltas do not have"):
        merge(base, [*loaded(base, lacking), difference], da.merging.Average())
    merged = merge(base, [*loaded(base, one), difference], da.merging.TaskArithmetic())
    assert torch.equal(merged[NORM], loaded(base, one)[0][NORM] + 1)
    assert torch.equal(merged[EMBED], loaded(base, one)[0][EMBED])


def test_deltas_over_the_rows_that_vocabularies_share(
    tuned: list[str], made: Callable[..., str], tmp_path: Path
) -> None:
    base, one, _ = tuned
    grown = made("grown", moved(3, **{EMBED: torch.cat([moved(3)[EMBED], normal(2, 4)])}))
    # Of one that has more tokens the rows of the base are merged.
    with pytest.warns(
        UserWarning, match=f"{grown}: 1 of its tensors, or rows of them, are not in {base}, such as"
    ) as told:
        merged = merge(base, loaded(base, one, grown), da.merging.TaskArithmetic())
    assert told[0].filename == __file__
    expected = sum(delta[EMBED] for delta in loaded(base, one, grown))
    assert merged[EMBED].shape == (12, 4)
    assert torch.equal(merged[EMBED], expected)  # type: ignore[arg-type]
    save_model(open_checkpoint(base), merged, tmp_path / "out")
    assert torch.equal(open_checkpoint(tmp_path / "out")[EMBED], START[EMBED] + expected)
    # Two that have fewer tokens are merged in their rows; the base keeps the others, also one under another path.
    cut = [made(f"cut {k}", moved(k, **{EMBED: moved(k)[EMBED][:9]})) for k in (4, 5)]
    copied = str(shutil.copytree(base, tmp_path / "copy"))
    for start in (base, copied):
        fewer = merge(start, loaded(base, *cut), da.merging.TaskArithmetic())
        assert torch.equal(fewer[EMBED], sum(delta[EMBED] for delta in loaded(base, *cut)))  # type: ignore[arg-type]
    save_model(open_checkpoint(base), fewer, tmp_path / "fewer")
    saved = open_checkpoint(tmp_path / "fewer")[EMBED]
    assert torch.equal(saved, START[EMBED] + torch.cat([fewer[EMBED], torch.zeros(3, 4)]))
    # Otherwise their shapes differ.
    with pytest.raises(NotHomologousError) as error:
        merge(base, loaded(base, one, cut[0]), da.merging.TaskArithmetic())
    assert str(error.value).startswith(f"tensor {EMBED!r}: (12, 4) in {one} and (9, 4) in {cut[0]}")


class Embedded(torch.nn.Module):
    """A base in memory."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding.from_pretrained(tensors[EMBED], freeze=False)
        self.model.norm = torch.nn.Module()
        self.model.norm.weight = torch.nn.Parameter(tensors[NORM])


def test_of_a_base_in_memory_too_the_rows_that_are_shared(made: Callable[..., str]) -> None:
    start = {name: START[name] for name in (EMBED, NORM)}
    base = Embedded(start)
    cut = [made(f"cut {k}", {EMBED: moved(k)[EMBED][:9], NORM: moved(k)[NORM]}) for k in (4, 5)]
    assert isinstance(open_checkpoint(base).references[EMBED], InMemory)
    merged = merge(base, loaded(base, *cut), da.merging.TaskArithmetic())
    assert merged[EMBED].shape == (9, 4)
    stored = made("base", start)
    assert_same(merge(base, loaded(stored, *cut), da.merging.TaskArithmetic()), merged)
    assert_same(merge(stored, loaded(base, *cut), da.merging.TaskArithmetic()), merged)


def test_a_base_with_fewer_tokens_is_another(tuned: list[str], made: Callable[..., str]) -> None:
    base, one, two = tuned
    less = made("less", START | {EMBED: START[EMBED][:9]})
    with pytest.raises(NotHomologousError, match=f"{one}: is a delta from another base: tensor {EMBED!r}"):
        merge(less, loaded(base, one, two), da.merging.Average())
    # The same bytes in another shape are other weights.
    turned = made("turned", START | {EMBED: START[EMBED].reshape(6, 8)})
    with pytest.raises(NotHomologousError, match=f"{one}: is a delta from another base: tensor {EMBED!r}"):
        merge(turned, loaded(base, one, two), da.merging.Average())


def test_what_a_fine_tune_has_beyond_its_base_is_told(tuned: list[str], made: Callable[..., str]) -> None:
    base, one, _ = tuned
    headed = made("headed", moved(3) | {"score.weight": torch.ones(2, 4)})
    with pytest.warns(
        UserWarning, match=f"{headed}: 1 of its tensors, .* such as 'score.weight'; a merge has those of the"
    ):
        merged = merge(base, loaded(base, one, headed), da.merging.Average())
    assert list(merged) == list(loaded(base, one)[0])


def test_settings_that_a_fine_tune_has_changed_are_told(save_checkpoint: SaveCheckpoint) -> None:
    config = {"model_type": "llama", "vocab_size": 12, "rope_theta": 10000.0}
    base = str(save_checkpoint("base", START, config=config))
    same = str(save_checkpoint("same", moved(1), config=config))
    long = str(save_checkpoint("long", moved(2), config=config | {"rope_theta": 500000.0}))
    merge(base, loaded(base, same), da.merging.Average())
    with pytest.warns(
        UserWarning, match=rf"{long}: 1 of its settings .*'rope theta' \(10000 against 500000\); a merge has"
    ):
        merge(base, loaded(base, same, long), da.merging.Average())


def test_a_difference_without_its_base_is_one_from_the_base_of_the_merge(
    tuned: list[str], made: Callable[..., str]
) -> None:
    base, one, _ = tuned
    (alone,) = loaded(None, made("published", {NORM: torch.ones(4)}), finetuned_is_delta=True)
    _, found, _ = check_mergeable(base, [*loaded(base, one), alone])
    assert found[1].base is not None and found[1].base.source == base
    # Whose tensors that base has, in the same shapes.
    for name, tensors, problem in (
        ("other name", {"model.layers.7.mlp.up_proj.weight": torch.ones(6, 4)}, "which the base does not have"),
        ("other shape", {NORM: torch.ones(5)}, r"\(4,\) against \(5,\)"),
    ):
        (strange,) = loaded(None, made(name, tensors), finetuned_is_delta=True)
        with pytest.raises(NotHomologousError, match=f"{name}: changes '.*', {problem}; it is not of the base {base}"):
            merge(base, [*loaded(base, one), strange], da.merging.Average())


def test_weights_themselves_are_no_delta() -> None:
    whole, delta = loaded(None, SOURCES[0])[0], loaded(BASE, SOURCES[1])[0]
    with pytest.raises(
        ValueError, match=r"deltas: number 1 \(zoo:tiny/instruct\) is the fine-tuned weights themselves"
    ):
        merge(BASE, [delta, whole], da.merging.Average())


@pytest.mark.parametrize("wrong", [[], (), None], ids=str)
def test_there_is_at_least_one_delta(wrong: Any) -> None:
    with pytest.raises(ValueError, match="deltas must be a list of at least one delta, such as load_delta gives"):
        merge(BASE, wrong, da.merging.Average())


def test_deltas_are_a_list_of_deltas() -> None:
    (delta,) = loaded(BASE, SOURCES[0])
    with pytest.raises(ValueError, match="must be a list of at least one delta"):
        merge(BASE, delta, da.merging.Average())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"deltas: number 1 is str, not a delta; give load_delta"):
        merge(BASE, [delta, SOURCES[1]], da.merging.Average())  # type: ignore[list-item]
    with pytest.raises(ValueError, match="deltas: number 0 is str"):
        merge(BASE, SOURCES[0], da.merging.Average())  # type: ignore[arg-type]


def test_a_head_of_its_own_beside_a_tied_one_is_told_with_the_way_out(tmp_path: Path) -> None:
    base = architectures.tiny_model("Llama, tied")
    tied, own = architectures.moved(base, seed=1), architectures.moved(base, seed=2)
    own.config.tie_word_embeddings = False
    own.lm_head.weight = torch.nn.Parameter(own.lm_head.weight.detach() + 0.01)
    for name, model in {"base": base, "tied": tied, "own": own}.items():
        model.save_pretrained(tmp_path / name)
    deltas = [load_delta(base=tmp_path / "base", finetuned=tmp_path / name) for name in ("tied", "own")]
    with pytest.raises(NotHomologousError, match=r"tied: ties its output head .* 'lm_head\.weight'; untie it first"):
        check_mergeable(tmp_path / "base", deltas)
