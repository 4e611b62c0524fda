from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from delta_analysis.checkpoints.names import parse_name
from delta_analysis.deltas.delta import Delta, load_delta
from delta_analysis.deltas.ranges import GROUPS, Grouping, magnitude_histogram, value_ranges
from delta_analysis.deltas.streaming import tally_delta
from delta_analysis.deltas.tally import DECILES, MAGNITUDE_QUANTILES, THRESHOLDS
from tests.conftest import SaveCheckpoint
from tests.deltas.test_tally import assert_rows_agree, by_hand, float32, sparse

LABELS = ["tensor", "layer", "module", "kind", "shape", "tensors"]


NAMES = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.norm.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.mlp.up_proj.bias",
    "model.layers.1.norm.weight",
]


@pytest.fixture
def mixed(save_checkpoint: SaveCheckpoint) -> Delta:
    """Tensors of three layers, four modules and all kinds, each of its own scale."""
    rng = np.random.default_rng(0)
    shapes = [(40, 8), (8,), (24, 8), (8,), (24, 8), (24,), (8,)]
    base = {name: float32(rng.normal(size=shape)) for name, shape in zip(NAMES, shapes, strict=True)}
    finetuned = {
        name: tensor + float32(rng.laplace(scale=10.0**-i, size=tensor.shape))
        for i, (name, tensor) in enumerate(base.items())
    }
    return load_delta(base=save_checkpoint("base", base), finetuned=save_checkpoint("finetuned", finetuned))


def concatenated(delta: Delta, names: list[str]) -> dict[str, float]:
    """Of all entries together, but for the storage step, which is the largest of the tensors'."""
    assert delta.base is not None
    sides = [(delta[name].numpy().reshape(-1), delta.base[name].numpy().reshape(-1)) for name in names]
    values, base = (np.concatenate(side) for side in zip(*sides, strict=True))
    return {**by_hand(values, base), "storage_step": max(by_hand(*side)["storage_step"] for side in sides)}


def test_columns_are_those_of_the_docstring(mixed: Delta) -> None:
    expected = [
        *LABELS,
        *("numel", "nonfinite", "zero_share", "min"),
        *("p10", "p20", "p30", "p40", "p50", "p60", "p70", "p80", "p90", "max"),
        *("mean", "std", "rms", "abs_p50", "abs_p90", "abs_p99", "abs_p999", "abs_max"),
        *("share_below_0.0002", "share_below_0.001", "share_below_0.002"),
        *("share_below_0.005", "share_below_0.01", "share_below_0.03"),
        *("relative_rms", "storage_step"),
    ]
    for by in GROUPS:
        assert value_ranges(mixed, by=by).columns.tolist() == expected


def test_one_row_a_tensor_with_its_labels(mixed: Delta) -> None:
    table = value_ranges(mixed)
    assert table["tensor"].tolist() == list(mixed)
    assert table["tensors"].tolist() == [1] * len(NAMES)
    for row in table.to_dict("records"):
        tensor = mixed[row["tensor"]]
        assert (row["layer"], row["module"], row["kind"]) == parse_name(row["tensor"], tensor.ndim)
        assert row["shape"] == str(tuple(tensor.shape))
        assert_rows_agree({key: row[key] for key in row if key not in LABELS}, concatenated(mixed, [row["tensor"]]))


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        ("layer", {-1: NAMES[:2], 0: NAMES[2:4], 1: NAMES[4:]}),
        (
            "module",
            {
                "embed_tokens": NAMES[:1],
                "norm": [NAMES[1], NAMES[3], NAMES[6]],
                "mlp.up_proj": [NAMES[2], NAMES[4]],
                "mlp.up_proj.bias": [NAMES[5]],
            },
        ),
        (
            "kind",
            {
                "embedding": NAMES[:1],
                "norm": [NAMES[1], NAMES[3], NAMES[6]],
                "linear": [NAMES[2], NAMES[4]],
                "bias": [NAMES[5]],
            },
        ),
    ],
)
def test_a_group_is_that_of_the_concatenated_entries(
    mixed: Delta, by: Grouping, groups: dict[int | str, list[str]]
) -> None:
    table = value_ranges(mixed, by=by)
    assert set(table[by]) == set(groups)
    assert len(table) == len(groups)
    for row in table.to_dict("records"):
        names = groups[row[by]]
        assert row["tensors"] == len(names)
        assert pd.isna(row["tensor"]) == (len(names) > 1)
        assert_rows_agree({key: row[key] for key in row if key not in LABELS}, concatenated(mixed, names))


def test_the_model_is_one_row_of_all_entries(mixed: Delta) -> None:
    (row,) = value_ranges(mixed, by="model").to_dict("records")
    assert row["tensors"] == len(NAMES)
    assert all(pd.isna(row[label]) for label in LABELS[:-1])
    assert_rows_agree({key: row[key] for key in row if key not in LABELS}, concatenated(mixed, NAMES))


def test_a_label_that_a_group_shares_is_kept(mixed: Delta) -> None:
    table = value_ranges(mixed, by="module").set_index("module")
    assert table.loc["mlp.up_proj", ["kind", "shape"]].tolist() == ["linear", "(24, 8)"]
    assert pd.isna(table.loc["mlp.up_proj", "layer"])


def test_a_place_is_a_module_of_one_layer_with_all_its_experts(save_checkpoint: SaveCheckpoint) -> None:
    names = [f"model.layers.{layer}.experts.{expert}.w1.weight" for layer in (0, 1) for expert in range(3)]
    rng = np.random.default_rng(0)
    base = {name: float32(rng.normal(size=(4, 5))) for name in [*names, "model.norm.weight"]}
    finetuned = {name: tensor + float32(rng.normal(size=(4, 5))) for name, tensor in base.items()}
    delta = load_delta(base=save_checkpoint("base", base), finetuned=save_checkpoint("finetuned", finetuned))
    table = value_ranges(delta, by="place")
    assert table[["layer", "module", "tensors"]].to_numpy().tolist() == [
        [-1, "norm", 1],
        [0, "experts.*.w1", 3],
        [1, "experts.*.w1", 3],
    ]
    for row, members in zip(table.to_dict("records"), [["model.norm.weight"], names[:3], names[3:]], strict=True):
        assert_rows_agree({key: row[key] for key in row if key not in LABELS}, concatenated(delta, members))


def test_the_storage_step_of_a_group_is_the_largest_of_its_tensors(save_checkpoint: SaveCheckpoint) -> None:
    # Merged, the large float32 matrix beside the bfloat16 norm would make a step of 2^-4, which no tensor has.
    base = {"layers.0.a.weight": torch.full((1000,), 10.0), "layers.0.b.weight": torch.ones(2, dtype=torch.bfloat16)}
    finetuned = {name: tensor * 2 for name, tensor in base.items()}
    delta = load_delta(base=save_checkpoint("base", base), finetuned=save_checkpoint("finetuned", finetuned))
    found = tally_delta(delta)
    assert value_ranges(found)["storage_step"].tolist() == [2.0**-20, 2.0**-7]
    for by in ("layer", "kind", "model"):
        assert value_ranges(found, by=by)["storage_step"].tolist() == [2.0**-7]


def test_the_two_stacks_of_t5_are_places_of_their_own(tmp_path: Path) -> None:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "vocab_size": 11}
    for side in ("base", "finetuned"):
        T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / side)
    delta = load_delta(base=tmp_path / "base", finetuned=tmp_path / "finetuned")
    table = value_ranges(delta, by="place")
    # One tensor a place: layer 0 of the encoder is not layer 0 of the decoder.
    assert table["tensors"].tolist() == [1] * len(delta)
    attention = table[table["module"].str.endswith("layer.0.SelfAttention.q")]
    assert attention[["layer", "module"]].to_numpy().tolist() == [
        [layer, f"{stack}.layer.0.SelfAttention.q"] for layer in (0, 1) for stack in ("decoder", "encoder")
    ]
    norms = table.loc[table["layer"] == -1, "module"].tolist()
    assert norms == ["decoder.final_layer_norm", "encoder.final_layer_norm", "shared"]


def test_without_a_base_relative_rms_is_missing(mixed: Delta) -> None:
    table = value_ranges(load_delta(base=None, finetuned=mixed.finetuned.source), by="model")
    assert table["relative_rms"].isna().all()
    assert table["storage_step"].isna().all()
    assert table["rms"].notna().all()


def test_nan_and_infinite_entries_are_counted_with_a_warning(save_checkpoint: SaveCheckpoint) -> None:
    broken = torch.tensor([[1.0, torch.nan, 3.0], [torch.inf, -torch.inf, 5.0]])
    folder = save_checkpoint("model", {"broken.weight": broken, "whole.weight": torch.tensor([7.0, 9.0])})
    delta = load_delta(base=None, finetuned=folder)
    with pytest.warns(UserWarning) as caught:
        table = value_ranges(delta)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith(
        f"{folder}: 1 of 2 tensors have NaN or infinite entries on either side: 'broken.weight' has 3 of 6; "
    )
    assert "nonfinite" in message
    assert table["nonfinite"].tolist() == [3, 0]
    assert table["numel"].tolist() == [6, 2]
    assert table["mean"].tolist() == [3.0, 8.0]
    with pytest.warns(UserWarning, match=r"broken\.weight"):
        model = value_ranges(delta, by="model").iloc[0]
    assert (model["nonfinite"], model["min"], model["max"], model["mean"]) == (3, 1.0, 9.0, 5.0)
    with pytest.warns(UserWarning, match=r"broken\.weight"):
        assert magnitude_histogram(delta)["share"].sum() == pytest.approx(1.0)


def test_an_unknown_grouping_or_number_of_bins_is_refused(mixed: Delta) -> None:
    with pytest.raises(ValueError, match="^by must be one of 'tensor', 'place', 'layer', 'module', 'kind', 'model';"):
        value_ranges(mixed, by="rows")  # type: ignore[arg-type]
    for bins in (0, 2.5):
        with pytest.raises(ValueError, match="bins_per_decade must be a whole number of at least 1"):
            magnitude_histogram(mixed, bins_per_decade=bins)  # type: ignore[arg-type]


@pytest.mark.parametrize("bins_per_decade", [1, 10])
def test_the_histogram_agrees_with_numpy(save_checkpoint: SaveCheckpoint, bins_per_decade: int) -> None:
    x = float32(sparse(np.random.default_rng(0), 50_000))
    delta = load_delta(base=None, finetuned=save_checkpoint("model", {"a.weight": x}))
    histogram = magnitude_histogram(delta, bins_per_decade=bins_per_decade)
    magnitudes = np.abs(x.numpy().astype(np.float64))
    edges = np.append(histogram["low"], histogram["high"].iloc[-1])
    expected = np.histogram(magnitudes, bins=edges)[0] / len(magnitudes)
    # An entry may fall on the wrong side of an edge only if it is within a bucket's half width of it.
    near = np.array([(np.abs(magnitudes / edge - 1) < 0.004).mean() for edge in edges])
    slack = near[:-1] + near[1:] + 1e-12
    assert (np.abs(histogram["share"] - expected) <= slack).all()
    assert slack.max() < 0.005
    assert histogram["share"].sum() == pytest.approx(1 - (magnitudes == 0).mean(), rel=1e-12, abs=0)


@pytest.mark.parametrize("bins_per_decade", [3])
def test_histogram_bins_are_equal_on_the_logarithmic_axis(mixed: Delta, bins_per_decade: int) -> None:
    histogram = magnitude_histogram(mixed, bins_per_decade=bins_per_decade)
    assert histogram.columns.tolist() == ["low", "high", "share", "density"]
    np.testing.assert_allclose(np.log10(histogram["high"] / histogram["low"]), 1 / bins_per_decade, rtol=1e-9)
    np.testing.assert_allclose(histogram["low"].iloc[1:], histogram["high"].iloc[:-1], rtol=1e-12)
    np.testing.assert_allclose(histogram["density"], histogram["share"] * bins_per_decade, rtol=1e-12)
    zero_share = value_ranges(mixed, by="model")["zero_share"].item()
    assert histogram["share"].sum() == pytest.approx(1 - zero_share, rel=1e-12, abs=0)


def test_histogram_by_hand(save_checkpoint: SaveCheckpoint) -> None:
    zeros = load_delta(base=None, finetuned=save_checkpoint("zeros", {"a.weight": torch.zeros(4)}))
    assert magnitude_histogram(zeros)["share"].sum() == 0
    x = torch.tensor([0.0, 0.0, 0.02, -0.03, 0.5, 200.0, -300.0, 0.0])
    histogram = magnitude_histogram(
        load_delta(base=None, finetuned=save_checkpoint("model", {"a.weight": x})), bins_per_decade=1
    )
    np.testing.assert_allclose(histogram["low"], [0.01, 0.1, 1, 10, 100])
    assert histogram["share"].tolist() == [2 / 8, 1 / 8, 0.0, 0.0, 2 / 8]
    assert histogram["density"].tolist() == histogram["share"].tolist()


@pytest.mark.parametrize("by", GROUPS)
def test_ranges_are_written_to_parquet(mixed: Delta, tmp_path: Path, by: Grouping) -> None:
    table = value_ranges(mixed, by=by)
    table.to_parquet(tmp_path / "ranges.parquet")
    read = pd.read_parquet(tmp_path / "ranges.parquet")
    pd.testing.assert_frame_equal(read, table, check_dtype=False)
    assert read["layer"].dtype == "Int64"


LLAMA = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
BERT = BertConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=80,
)
MIXTRAL = MixtralConfig(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
)
ARCHITECTURES = {
    "llama": (lambda: LlamaForCausalLM(LLAMA), scipy.stats.norm(scale=0.001)),
    "bert": (lambda: BertForMaskedLM(BERT), scipy.stats.laplace(scale=0.002)),
    "mixtral": (lambda: MixtralForCausalLM(MIXTRAL), scipy.stats.t(5, scale=0.004)),
}


Known = tuple[PreTrainedModel, Delta, scipy.stats.rv_continuous]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Known:
    """A model of random weights, the same with a random delta of this distribution, and the distribution."""
    build, distribution = ARCHITECTURES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(folder / "base", max_shard_size="100KB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += float32(distribution.rvs(size=tuple(parameter.shape), random_state=rng))
    model.save_pretrained(folder / "finetuned", max_shard_size="170KB")
    return model, load_delta(base=folder / "base", finetuned=folder / "finetuned"), distribution


def test_every_tensor_that_transformers_saves_is_compared(known: Known) -> None:
    model, delta, _ = known
    coverage = delta.coverage()
    assert set(coverage["status"]) == {"compared"}
    assert coverage["numel_compared"].sum() == coverage["numel"].sum() == model.num_parameters()
    assert delta.base is not None
    assert 3 < len(delta.finetuned.files()) < len(delta.base.files())
    assert value_ranges(delta, by="model")["numel"].item() == model.num_parameters()


@pytest.mark.parametrize("by", ["model", "module", "place", "layer", "kind"])
def test_ranges_are_those_of_the_distribution_that_was_put_in(known: Known, by: Grouping) -> None:
    _, delta, x = known
    table = value_ranges(delta, by=by)
    large = table[table["numel"] >= 2000]
    assert len(large)
    for row in large.to_dict("records"):
        # What five standard errors of a sample of n leave open.
        n = row["numel"]
        scale, kurtosis = x.std(), float(x.stats("k")) + 3
        assert abs(row["mean"]) < 5 * scale / math.sqrt(n)
        for column in ("std", "rms"):
            assert abs(row[column] / scale - 1) < 5 * math.sqrt((kurtosis - 1) / (4 * n))
        signed = {f"p{decile}": (decile / 100, x.ppf(decile / 100), x.pdf) for decile in DECILES}
        magnitudes = {
            column: (q, x.ppf((1 + q) / 2), lambda size: 2 * x.pdf(size))
            for column, q in MAGNITUDE_QUANTILES.items()
            if n * (1 - q) > 20
        }
        for column, (q, quantile, density) in {**signed, **magnitudes}.items():
            slack = 5 * math.sqrt(q * (1 - q) / n) / density(quantile) + 0.004 * abs(quantile)
            assert abs(row[column] - quantile) < slack, column
        for threshold in THRESHOLDS:
            share = 2 * x.cdf(threshold) - 1
            assert abs(row[f"share_below_{threshold}"] - share) < 5 * math.sqrt(share * (1 - share) / n) + 1 / n
        # The largest of n has a uniform P(|δ| below it)^n.
        assert 1e-5 < (2 * x.cdf(row["abs_max"]) - 1) ** n < 1 - 1e-5
        assert row["nonfinite"] == 0
        assert row["zero_share"] < 1e-3


def test_the_histogram_is_that_of_the_distribution_that_was_put_in(known: Known) -> None:
    model, delta, x = known
    histogram = magnitude_histogram(delta, bins_per_decade=4)
    n = model.num_parameters()
    for row in histogram.to_dict("records"):
        share = 2 * (x.cdf(row["high"]) - x.cdf(row["low"]))
        # Entries within half a bucket of an edge may stand on its other side.
        edges = sum(2 * x.pdf(edge) * edge * 0.004 for edge in (row["low"], row["high"]))
        assert abs(row["share"] - share) < 5 * math.sqrt(share / n) + edges + 5 / n


def test_relative_size_is_that_of_the_delta_over_that_of_the_initial_weights(known: Known) -> None:
    _, delta, x = known
    linear = value_ranges(delta, by="kind").set_index("kind").loc["linear"]
    # transformers draws matrices from a normal distribution of this spread.
    assert linear["relative_rms"] == pytest.approx(x.std() / 0.02, rel=0.02)


def test_experts_of_a_layer_are_one_place(known: Known) -> None:
    model, delta, _ = known
    places = value_ranges(delta, by="place")
    experts = places[places["module"].str.contains("experts", regex=False)]
    if not isinstance(model, MixtralForCausalLM):
        assert experts.empty
        return
    assert len(experts) == MIXTRAL.num_hidden_layers * experts["module"].nunique()
    assert experts["layer"].value_counts().to_dict() == {0: 3, 1: 3}
    assert set(experts["tensors"]) == {MIXTRAL.num_local_experts}
    numel = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert experts["numel"].sum() == numel
