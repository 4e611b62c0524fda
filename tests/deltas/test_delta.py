from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from delta_analysis._errors import CheckpointError, NotHomologousError
from delta_analysis._kernels.philox import random_bits
from delta_analysis.deltas.delta import Delta, drop_summary, load_delta
from delta_analysis.pruning import Dare, Magnitude, MagPrune, Pruner
from tests.conftest import SaveCheckpoint

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LAYERS = ["model.norm.weight", "model.layers.2.a.weight", "model.layers.2.b.bias", "model.layers.10.a.weight"]


class Recorder:
    """A pruner that keeps its calls and multiplies by a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.calls: list[tuple[str, int]] = []

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        self.calls.append((name, seed))
        return tensor * self.factor


def zero_first(tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
    return torch.where(torch.arange(tensor.numel()).reshape(tensor.shape) < seed, 0.0, tensor)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair(save_checkpoint: SaveCheckpoint) -> Delta:
    """Four tensors of three layers, their deltas all different from zero."""
    base = {name: normal(i, 3, 4) for i, name in enumerate(LAYERS)}
    finetuned = {name: tensor + normal(9, 3, 4) for name, tensor in base.items()}
    return load_delta(base=save_checkpoint("base", base), finetuned=save_checkpoint("finetuned", finetuned))


def one_tensor(save_checkpoint: SaveCheckpoint, base: torch.Tensor, finetuned: torch.Tensor) -> torch.Tensor:
    delta = load_delta(
        base=save_checkpoint("base", {"a.weight": base}),
        finetuned=save_checkpoint("finetuned", {"a.weight": finetuned}),
    )
    return delta["a.weight"]


def stored_as_float32(tensor: torch.Tensor) -> np.ndarray:
    """What a stored tensor means in float32, by numpy alone."""
    if tensor.dtype == torch.bfloat16:
        return (tensor.view(torch.uint16).numpy().astype(np.uint32) << 16).view(np.float32)
    return tensor.numpy().astype(np.float32)


@pytest.mark.parametrize("base_dtype", FLOATS)
@pytest.mark.parametrize("finetuned_dtype", FLOATS)
def test_the_delta_is_a_float32_difference_for_all_dtypes(
    save_checkpoint: SaveCheckpoint, base_dtype: torch.dtype, finetuned_dtype: torch.dtype
) -> None:
    base = normal(0, 5, 7).double().mul(1.1).to(base_dtype)
    finetuned = normal(1, 5, 7).double().mul(1.3).to(finetuned_dtype)
    delta = one_tensor(save_checkpoint, base, finetuned)
    assert delta.dtype == torch.float32
    np.testing.assert_array_equal(delta.numpy(), stored_as_float32(finetuned) - stored_as_float32(base), strict=True)


def test_the_difference_is_not_rounded_to_the_stored_dtype(save_checkpoint: SaveCheckpoint) -> None:
    base = torch.tensor([1.0078125], dtype=torch.bfloat16)
    finetuned = torch.tensor([256.0], dtype=torch.bfloat16)
    assert (finetuned - base).item() == 255.0
    assert one_tensor(save_checkpoint, base, finetuned).item() == 254.9921875


def test_float64_is_rounded_before_the_difference(save_checkpoint: SaveCheckpoint) -> None:
    base = torch.tensor([1.0, 1.0], dtype=torch.float64)
    finetuned = torch.tensor([1 + 2**-30, 1 + 2**-23], dtype=torch.float64)
    assert one_tensor(save_checkpoint, base, finetuned).tolist() == [0.0, 2**-23]


def test_delta_by_hand(save_checkpoint: SaveCheckpoint) -> None:
    base = torch.tensor([[1.0, 2.0, -3.0]], dtype=torch.float16)
    finetuned = torch.tensor([[1.5, 2.0, 5.0]], dtype=torch.bfloat16)
    assert one_tensor(save_checkpoint, base, finetuned).tolist() == [[0.5, 0.0, 8.0]]


def test_nan_and_infinities_are_passed_on(save_checkpoint: SaveCheckpoint) -> None:
    base = torch.tensor([0.0, torch.inf, torch.inf])
    finetuned = torch.tensor([torch.nan, torch.inf, 1.0])
    np.testing.assert_array_equal(one_tensor(save_checkpoint, base, finetuned), [np.nan, np.nan, -np.inf])


@pytest.mark.parametrize("dtype", FLOATS)
def test_without_a_base_the_delta_is_the_model(save_checkpoint: SaveCheckpoint, dtype: torch.dtype) -> None:
    tensors = {name: normal(i, 2, 3).to(dtype) for i, name in enumerate(LAYERS)}
    delta = load_delta(base=None, finetuned=save_checkpoint("model", tensors))
    assert delta.base is None
    assert list(delta) == LAYERS
    for name, tensor in tensors.items():
        assert delta[name].dtype == torch.float32
        np.testing.assert_array_equal(delta[name].numpy(), stored_as_float32(tensor))


def test_base_plus_delta_is_the_model_that_transformers_loads(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    for seed, name in enumerate(("base", "finetuned")):
        torch.manual_seed(seed)
        # The two are sharded differently, which must not matter.
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / name, max_shard_size=(1 + seed) * 1000)
    delta = load_delta(base=tmp_path / "base", finetuned=tmp_path / "finetuned")
    states = {
        name: dict(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").named_parameters())
        for name in ("base", "finetuned")
    }
    assert set(delta) == set(states["base"])
    for name, tensor in delta.items():
        assert torch.equal(tensor, states["finetuned"][name].detach().float() - states["base"][name].detach().float())


def test_it_is_a_mapping_in_order_of_layers(pair: Delta) -> None:
    assert isinstance(pair, Mapping)
    assert len(pair) == 4
    assert list(pair) == list(pair.keys()) == LAYERS
    assert [name for name, _ in pair.items()] == LAYERS
    assert "model.norm.weight" in pair
    assert "absent" not in pair
    assert pair.get("absent") is None
    with pytest.raises(KeyError, match="absent"):
        pair["absent"]
    with pytest.raises(KeyError, match="absent"):
        pair.read("absent")


def test_a_tensor_that_is_not_compared_is_a_key_error(save_checkpoint: SaveCheckpoint) -> None:
    base = save_checkpoint("base", {"a.weight": torch.ones(2), "b.weight": torch.ones(2)})
    finetuned = save_checkpoint("finetuned", {"a.weight": torch.ones(2), "b.weight": torch.ones(3)})
    delta = load_delta(base=base, finetuned=finetuned)
    assert list(delta) == ["a.weight"]
    with pytest.raises(KeyError, match=r"b\.weight"):
        delta["b.weight"]


def test_items_are_computed_when_read(save_checkpoint: SaveCheckpoint, pair: Delta) -> None:
    name = LAYERS[0]
    first = pair[name]
    first.zero_()
    assert torch.count_nonzero(pair[name]) == 12
    assert pair.base is not None
    (pair.base.path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        pair[name]


def test_read_gives_the_delta_and_its_base_in_float32(save_checkpoint: SaveCheckpoint) -> None:
    base = torch.tensor([1.0, 2.0], dtype=torch.float16)
    finetuned = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    folder = save_checkpoint("finetuned", {"a.weight": finetuned})
    against_base = load_delta(base=save_checkpoint("base", {"a.weight": base}), finetuned=folder)
    cases = [
        (against_base, [0.5, -4.0], [1.0, 2.0]),
        (against_base.pruned(Recorder(2.0), seed=0), [1.0, -8.0], [1.0, 2.0]),
        (load_delta(base=None, finetuned=folder), [1.5, -2.0], None),
    ]
    for delta, tensor, subtracted in cases:
        found = delta.read("a.weight")
        assert [each if each is None else each.tolist() for each in found] == [tensor, subtracted]
        assert {each.dtype for each in found if each is not None} == {torch.float32}


def test_pruned_applies_any_callable_and_remembers_it(pair: Delta) -> None:
    recorder = Recorder(2.0)
    pruned = pair.pruned(recorder, seed=7)
    assert recorder.calls == []
    assert pruned.edits == ((recorder, 7),)
    assert list(pruned) == list(pair)
    for name in LAYERS:
        assert torch.equal(pruned[name], 2 * pair[name])
    assert recorder.calls == [(name, 7) for name in LAYERS]


def test_pruned_leaves_the_delta_as_it_was(pair: Delta) -> None:
    before = {name: tensor.clone() for name, tensor in pair.items()}
    pair.pruned(Dare(1.0), seed=0)
    assert pair.edits == ()
    assert all(torch.equal(pair[name], before[name]) for name in LAYERS)


def test_pruners_are_applied_in_the_order_given(pair: Delta) -> None:
    def plus_one(tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        return tensor + 1

    double = Recorder(2.0)
    name = LAYERS[1]
    doubled_last = pair.pruned(plus_one, seed=1).pruned(double, seed=2)
    doubled_first = pair.pruned(double, seed=2).pruned(plus_one, seed=1)
    assert doubled_last.edits == ((plus_one, 1), (double, 2))
    assert torch.equal(doubled_last[name], (pair[name] + 1) * 2)
    assert torch.equal(doubled_first[name], pair[name] * 2 + 1)


def test_summary_by_hand(save_checkpoint: SaveCheckpoint) -> None:
    tensors = {
        "a.weight": torch.tensor([[0.0, 1.0, 2.0, 0.0], [3.0, 4.0, 5.0, 6.0]]),
        "b.weight": torch.zeros(3),
        "c.weight": torch.empty(0, 2),
    }
    delta = load_delta(base=None, finetuned=save_checkpoint("model", tensors)).pruned(zero_first, seed=5)
    # Of the first five entries of a, which become zero, 1, 2 and 3 were not zero before.
    expected = pd.DataFrame(
        {
            "tensor": ["a.weight", "b.weight", "c.weight"],
            "numel": [8, 3, 0],
            "zero_before": [2 / 8, 1.0, 0.0],
            "achieved_drop_rate": [3 / 6, 0.0, 0.0],
        }
    )
    pd.testing.assert_frame_equal(delta.summary(), expected)


@given(
    entries=st.lists(
        st.tuples(st.floats(-9, 9, width=32, allow_subnormal=False), st.booleans()), min_size=1, max_size=50
    )
)
def test_drop_summary_counts_what_was_dropped(entries: list[tuple[float, bool]]) -> None:
    before = torch.tensor([value for value, _ in entries])
    after = torch.tensor([0.0 if dropped else value for value, dropped in entries])
    row = drop_summary("a", before, after)
    nonzero = [dropped for value, dropped in entries if value != 0]
    assert row["numel"] == len(entries)
    assert row["zero_before"] == pytest.approx((len(entries) - len(nonzero)) / len(entries))
    assert row["achieved_drop_rate"] == pytest.approx(sum(nonzero) / len(nonzero) if nonzero else 0.0)


def test_coverage_tells_every_status(save_checkpoint: SaveCheckpoint) -> None:
    embeddings = torch.ones(4, 2)
    base = {
        "model.embed_tokens.weight": embeddings,
        "model.layers.0.a.weight": torch.ones(2, 3, dtype=torch.bfloat16),
        "model.layers.0.b.weight": torch.ones(2, 3),
        "model.layers.1.old.weight": torch.ones(5, dtype=torch.float16),
        "lm_head.weight": embeddings.clone(),
    }
    finetuned = {
        "model.embed_tokens.weight": embeddings,
        "model.layers.0.a.weight": torch.ones(2, 3, dtype=torch.float64),
        "model.layers.0.b.weight": torch.ones(4, 3),
        "model.layers.1.new.weight": torch.ones(6),
        "lm_head.weight": embeddings.clone(),
    }
    config = {"tie_word_embeddings": True}
    delta = load_delta(
        base=save_checkpoint("base", base, config=config),
        finetuned=save_checkpoint("finetuned", finetuned, config=config),
    )
    coverage = delta.coverage()
    assert coverage.columns.tolist() == [
        "tensor",
        "status",
        "reason",
        "base_shape",
        "base_dtype",
        "finetuned_shape",
        "finetuned_dtype",
        "numel",
        "numel_compared",
    ]
    columns = ["tensor", "status", "base_shape", "base_dtype", "finetuned_shape", "finetuned_dtype"]
    columns += ["numel", "numel_compared"]
    rows = {row[0]: row[1:] for row in coverage[columns].itertuples(index=False, name=None)}
    assert rows.pop("lm_head.weight")[0] == "skipped"
    assert rows == {
        "model.embed_tokens.weight": ("compared", "(4, 2)", "float32", "(4, 2)", "float32", 8, 8),
        "model.layers.0.a.weight": ("compared", "(2, 3)", "bfloat16", "(2, 3)", "float64", 6, 6),
        "model.layers.0.b.weight": ("shape differs", "(2, 3)", "float32", "(4, 3)", "float32", 12, 0),
        "model.layers.1.old.weight": ("only in base", "(5,)", "float16", "", "", 5, 0),
        "model.layers.1.new.weight": ("only in finetuned", "", "", "(6,)", "float32", 6, 0),
    }
    reasons = dict(zip(coverage["tensor"], coverage["reason"], strict=True))
    assert reasons["lm_head.weight"] == "tied to model.embed_tokens.weight, counted there"
    assert reasons["model.layers.0.b.weight"] == "(2, 3) against (4, 3)"
    assert all(reasons[name] for name, (status, *_) in rows.items() if status != "compared")
    assert coverage.loc[coverage["status"] == "compared", "tensor"].tolist() == list(delta)


def test_coverage_is_in_reading_order(save_checkpoint: SaveCheckpoint) -> None:
    base = save_checkpoint("base", {"z.weight": torch.ones(1), "l.10.a.weight": torch.ones(1)})
    finetuned = save_checkpoint(
        "finetuned",
        {"z.weight": torch.ones(1), "l.2.a.weight": torch.ones(1), "l.2.ids": torch.arange(2)},
    )
    coverage = load_delta(base=base, finetuned=finetuned).coverage()
    assert coverage["tensor"].tolist() == ["z.weight", "l.2.a.weight", "l.2.ids", "l.10.a.weight"]
    assert coverage["status"].tolist() == ["compared", "only in finetuned", "skipped", "only in base"]


def test_a_head_that_only_the_finetuned_model_unties_is_compared_with_the_embeddings(
    save_checkpoint: SaveCheckpoint,
) -> None:
    embeddings, head = normal(0, 4, 2), normal(1, 4, 2)
    base = {"model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings.clone()}
    finetuned = {"model.embed_tokens.weight": embeddings + 1, "lm_head.weight": head}
    delta = load_delta(
        base=save_checkpoint("base", base, config={"tie_word_embeddings": True}),
        finetuned=save_checkpoint("finetuned", finetuned, config={"tie_word_embeddings": False}),
    )
    # What the base computes its logits with is its embeddings.
    assert list(delta) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert torch.equal(delta["lm_head.weight"], head - embeddings)
    row = delta.coverage().set_index("tensor").loc["lm_head.weight"]
    assert (row["status"], row["reason"]) == ("compared", "with model.embed_tokens.weight of the base")
    assert (row["finetuned_shape"], row["numel"], row["numel_compared"]) == ("(4, 2)", 8, 8)


def test_coverage_without_a_base(save_checkpoint: SaveCheckpoint) -> None:
    tensors = {"a.weight": torch.ones(2, 2, dtype=torch.float16), "a.ids": torch.arange(3)}
    coverage = load_delta(base=None, finetuned=save_checkpoint("model", tensors)).coverage().set_index("tensor")
    assert coverage["status"].to_dict() == {"a.ids": "skipped", "a.weight": "compared"}
    assert coverage.loc["a.ids", "reason"] == "int64 buffer, not a weight"
    assert coverage.loc["a.weight", ["base_shape", "base_dtype"]].tolist() == ["", ""]
    assert coverage.loc["a.weight", ["finetuned_shape", "finetuned_dtype", "numel"]].tolist() == [
        "(2, 2)",
        "float16",
        4,
    ]


@pytest.mark.parametrize("table", ["summary", "coverage"])
def test_tables_are_written_to_parquet(pair: Delta, tmp_path: Path, table: str) -> None:
    frame = getattr(pair.pruned(Dare(0.5), seed=0), table)()
    frame.to_parquet(tmp_path / "table.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), frame)


def test_checkpoints_without_a_common_tensor_are_refused(save_checkpoint: SaveCheckpoint) -> None:
    base = save_checkpoint("base", {f"h.{i}.w.weight": torch.ones(2) for i in range(5)})
    finetuned = save_checkpoint("finetuned", {f"layers.{i}.w.weight": torch.ones(2) for i in range(5)})
    with pytest.raises(NotHomologousError) as caught:
        load_delta(base=base, finetuned=finetuned)
    message = str(caught.value)
    assert message.startswith(f"{base} and {finetuned} have no tensor in common: ")
    assert "the first begins with h.0.w.weight, h.1.w.weight, h.2.w.weight," in message
    assert "the second with layers.0.w.weight, layers.1.w.weight, layers.2.w.weight;" in message
    assert message.endswith("a delta needs the base that was fine-tuned")


def test_checkpoints_whose_shapes_all_differ_are_refused(save_checkpoint: SaveCheckpoint) -> None:
    base = save_checkpoint("base", {f"l.{i}.w.weight": torch.ones(2, 3) for i in range(5)})
    finetuned = save_checkpoint("finetuned", {f"l.{i}.w.weight": torch.ones(4, 3) for i in range(5)})
    with pytest.raises(NotHomologousError) as caught:
        load_delta(base=base, finetuned=finetuned)
    message = str(caught.value)
    assert message.startswith(f"{base} and {finetuned} share 5 names but no shape: ")
    differing = "; ".join(f"l.{i}.w.weight (2, 3) against (4, 3)" for i in range(3))
    assert f"{differing}; " in message
    assert message.endswith("of the same size")


def test_shapes_of_equal_size_are_not_broadcast(save_checkpoint: SaveCheckpoint) -> None:
    base = save_checkpoint("base", {"a.weight": torch.ones(1, 6)})
    finetuned = save_checkpoint("finetuned", {"a.weight": torch.ones(6, 1)})
    with pytest.raises(NotHomologousError, match=r"a\.weight \(1, 6\) against \(6, 1\)"):
        load_delta(base=base, finetuned=finetuned)


def test_a_partial_mismatch_is_no_error(save_checkpoint: SaveCheckpoint) -> None:
    shared = {"a.weight": torch.ones(2), "resized.weight": torch.ones(3)}
    base = save_checkpoint("base", {**shared, "gone.weight": torch.ones(1)})
    finetuned = save_checkpoint(
        "finetuned", {"a.weight": torch.full((2,), 3.0), "resized.weight": torch.ones(4), "new.weight": torch.ones(1)}
    )
    delta = load_delta(base=base, finetuned=finetuned)
    assert {name: tensor.tolist() for name, tensor in delta.items()} == {"a.weight": [2.0, 2.0]}


def test_either_source_that_cannot_be_read_is_an_error(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    good, absent = save_checkpoint("good", {"a.weight": torch.ones(2)}), tmp_path / "absent"
    for base, finetuned in ((good, absent), (absent, good), (None, absent)):
        with pytest.raises(CheckpointError, match="absent: no such file"):
            load_delta(base=base, finetuned=finetuned)


def test_refusals_are_value_errors(save_checkpoint: SaveCheckpoint) -> None:
    base = save_checkpoint("base", {"a.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="no tensor in common"):
        load_delta(base=base, finetuned=save_checkpoint("finetuned", {"b.weight": torch.ones(2)}))


EVERY = [
    Dare(0.6),
    Dare(0.6, "l1"),
    Magnitude(0.6),
    Magnitude(0.6, "row"),
    Magnitude(0.6, "model"),
    MagPrune(0.6),
    MagPrune(0.6, within="tensor"),
]


def tied(seed: int, *shape: int) -> torch.Tensor:
    return (2 * normal(seed, *shape)).round()


@pytest.fixture
def coarse(save_checkpoint: SaveCheckpoint) -> Delta:
    """A delta from zero with many entries of equal size, in tensors of several shapes and dtypes."""
    shapes = [(30,), (20, 30), (4, 5, 6), (1,)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32]
    tensors = {
        name: tied(i, *shape).to(dtype)
        for i, (name, shape, dtype) in enumerate(zip(LAYERS, shapes, dtypes, strict=True))
    }
    return load_delta(base=None, finetuned=save_checkpoint("coarse", tensors))


def least_of_all(delta: Delta, drop_rate: float, seed: int) -> dict[str, torch.Tensor]:
    """The tensors less the round(p · N) least entries of all, by sorting."""
    places = [
        (abs(value), number, name, i)
        for name, tensor in delta.items()
        for i, (value, number) in enumerate(
            zip(tensor.flatten().tolist(), random_bits(tensor.numel(), seed=seed, name=name).tolist(), strict=True)
        )
    ]
    left = {name: tensor.clone() for name, tensor in delta.items()}
    for _, _, name, i in sorted(places)[: round(drop_rate * len(places))]:
        left[name].view(-1)[i] = 0
    return left


@pytest.mark.parametrize("drop_rate", [0, 0.1, 0.5, 0.77, 0.99, 1])
def test_the_least_entries_of_the_whole_model_are_dropped(coarse: Delta, drop_rate: float) -> None:
    pruned = coarse.pruned(Magnitude(drop_rate, "model"), seed=5)
    for name, expected in least_of_all(coarse, drop_rate, 5).items():
        assert torch.equal(pruned[name], expected)


def test_a_share_of_the_whole_model_is_no_share_of_each_tensor(save_checkpoint: SaveCheckpoint) -> None:
    tensors = {name: normal(i, 50, 40) * 2**i for i, name in enumerate(LAYERS)}
    delta = load_delta(base=None, finetuned=save_checkpoint("model", tensors)).pruned(Magnitude(0.7, "model"), seed=0)
    kept = [int(torch.count_nonzero(tensor)) for tensor in delta.values()]
    assert sum(kept) == 8000 - round(0.7 * 8000)
    assert kept[0] < kept[1] < kept[2] < kept[3]


def test_the_whole_model_is_read_when_its_first_item_is_and_then_no_more(
    coarse: Delta, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    real = Delta._read

    def read(self: Delta, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.edits:
            reads.append(name)
        return real(self, name)

    monkeypatch.setattr(Delta, "_read", read)
    pruned = coarse.pruned(Magnitude(0.5, "model"), seed=0)
    assert not reads
    first = pruned[LAYERS[2]]
    before = list(reads)
    assert set(before) == set(LAYERS)
    assert all(before.count(name) <= 3 for name in LAYERS)
    for name in reversed(LAYERS):
        pruned[name]
    assert reads == before
    assert torch.equal(first, pruned[LAYERS[2]])


def test_the_whole_model_after_another_pruner(coarse: Delta) -> None:
    halved = coarse.pruned(MagPrune(0.5), seed=1)
    both = halved.pruned(Magnitude(0.8, "model"), seed=2)
    again = both.pruned(Magnitude(0.9, "model"), seed=3).pruned(Dare(0.5), seed=4)
    expected = least_of_all(halved, 0.8, 2)
    for name in LAYERS:
        assert torch.equal(both[name], expected[name])
    for name, tensor in least_of_all(both, 0.9, 3).items():
        assert torch.equal(again[name], Dare(0.5)(tensor, name=name, seed=4))


@pytest.mark.parametrize(("rescale", "power"), [("l1", 1), ("l2", 2)])
def test_the_whole_model_is_cut_together_and_rescaled_by_tensor(coarse: Delta, rescale: str, power: int) -> None:
    pruned = coarse.pruned(Magnitude(0.5, "model", rescale), seed=0)
    plain = coarse.pruned(Magnitude(0.5, "model"), seed=0)
    for name, tensor in coarse.items():
        kept = plain[name].double().abs().pow(power).sum()
        ratio = (tensor.double().abs().pow(power).sum() / kept) ** (1 / power) if kept else 1.0
        torch.testing.assert_close(pruned[name].double(), plain[name].double() * ratio, rtol=2e-7, atol=0)


@pytest.mark.parametrize("pruner", EVERY, ids=lambda pruner: pruner.method)
def test_without_a_base_every_pruner_prunes_the_weights(coarse: Delta, pruner: Pruner) -> None:
    pruned = coarse.pruned(pruner, seed=3)
    backwards = {name: pruned[name] for name in reversed(LAYERS)}
    afresh = coarse.pruned(pruner, seed=3)
    whole = least_of_all(coarse, 0.6, 3)
    for name, weights in coarse.items():
        expected = whole[name] if getattr(pruner, "within", "") == "model" else pruner(weights, name=name, seed=3)
        assert torch.equal(afresh[name], expected)
        assert torch.equal(backwards[name], expected)
        assert pruned.read(name)[1] is None


def test_summary_of_magnitude_pruning(coarse: Delta) -> None:
    # Zeros are dropped first, so that of the others fewer than p are.
    summary = coarse.pruned(Magnitude(0.6), seed=0).summary().set_index("tensor")
    for name, tensor in coarse.items():
        zero = 1 - int(torch.count_nonzero(tensor)) / tensor.numel()
        dropped = round(0.6 * tensor.numel()) / tensor.numel()
        row = summary.loc[name]
        assert row["zero_before"] == pytest.approx(zero)
        expected = max((dropped - zero) / (1 - zero), 0) if zero < 1 else 0.0
        assert row["achieved_drop_rate"] == pytest.approx(expected)
    assert 0.1 < summary.loc[LAYERS[1], "zero_before"] < 0.3
    together = coarse.pruned(Magnitude(0.6, "model"), seed=0).summary()
    total = together["numel"].sum()
    zero = (together["zero_before"] * together["numel"]).sum()
    dropped = (together["achieved_drop_rate"] * (1 - together["zero_before"]) * together["numel"]).sum()
    assert zero + dropped == pytest.approx(round(0.6 * total))


def test_nobody_writes_into_a_module_by_way_of_its_delta() -> None:
    base, finetuned = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in finetuned.state_dict().items()}
    alone, against = load_delta(base=None, finetuned=finetuned), load_delta(base=base, finetuned=finetuned)
    for name in before:
        alone[name].zero_()
        for tensor in against.read(name):
            assert tensor is not None
            tensor.zero_()
        alone.finetuned[name].zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in finetuned.state_dict().items())
    assert base.weight.abs().min() > 0


def test_a_module_without_data_is_refused() -> None:
    with torch.device("meta"):
        empty = torch.nn.Linear(3, 2)
    for sides in ({"base": None, "finetuned": empty}, {"base": empty, "finetuned": torch.nn.Linear(3, 2)}):
        with pytest.raises(CheckpointError, match="Linear: has parameters without data; load its weights first"):
            load_delta(**sides)
