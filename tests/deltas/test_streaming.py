"""One pass over files: the same bits however it is split, and no result from a broken file."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import fields
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from delta_analysis._errors import CheckpointError
from delta_analysis._kernels.tally import RUN
from delta_analysis.checkpoints.names import parse_name
from delta_analysis.deltas import streaming, tally
from delta_analysis.deltas.delta import Delta, load_delta
from delta_analysis.deltas.streaming import Tallies, tally_delta
from delta_analysis.deltas.tally import GRID, PIECE, tally_tensor
from delta_analysis.pruning import Dare
from tests.conftest import SaveCheckpoint
from tests.deltas.test_delta import FLOATS, normal, stored_as_float32
from tests.deltas.test_tally import assert_rows_agree, by_hand

LONG = "model.layers.0.mlp.up_proj.weight"
SHAPES = {
    "model.embed_tokens.weight": (70, 61),
    "model.norm.weight": (61,),
    LONG: (2 * GRID + PIECE + 12_345,),
    "model.layers.0.norm.weight": (),
    "model.layers.1.mlp.up_proj.weight": (GRID,),
    "model.layers.1.norm.weight": (0, 3),
    "model.layers.2.experts.0.w1.weight": (64, 64),
    "model.layers.2.experts.1.w1.weight": (64, 65),
}
STORED_AS = dict(zip(SHAPES, 2 * [*FLOATS], strict=True))


def pair_of(save_checkpoint: SaveCheckpoint, **how: Any) -> Delta:
    """Tensors shorter and longer than a block of the grid, in all storage dtypes, with entries that are not finite."""
    base = {name: normal(i, *shape).to(STORED_AS[name]) for i, (name, shape) in enumerate(SHAPES.items())}
    finetuned = {name: (tensor.float() + normal(9, *tensor.shape)).bfloat16() for name, tensor in base.items()}
    for place in (0, RUN - 1, RUN, PIECE - 1, PIECE, GRID - 1, GRID, 2 * GRID, -1):
        finetuned[LONG][place] = torch.nan if place % 3 else -torch.inf
    suffix = "-".join(how)
    return load_delta(
        base=save_checkpoint(f"base{suffix}", base, **how), finetuned=save_checkpoint(f"finetuned{suffix}", finetuned)
    )


@pytest.fixture
def pair(save_checkpoint: SaveCheckpoint) -> Delta:
    return pair_of(save_checkpoint)


def found_in(delta: Delta, **how: Any) -> Tallies:
    with pytest.warns(UserWarning, match="1 of 8 tensors have NaN or infinite entries.* has 9 of"):
        return tally_delta(delta, **how)


def assert_same_bits(one: Tallies, other: Tallies) -> None:
    pd.testing.assert_frame_equal(one.tensors, other.tensors, check_exact=True)
    assert one.cells.keys() == other.cells.keys()
    for cell, ours in one.cells.items():
        for field in fields(ours):
            np.testing.assert_array_equal(getattr(ours, field.name), getattr(other.cells[cell], field.name))


class Here(Executor):
    """Runs each task at once in this thread, after calling `before` with its number."""

    def __init__(self, before: Callable[[int], object] = lambda number: None) -> None:
        self.before, self.futures = before, []

    def submit(self, work: Any, /, *args: Any, **options: Any) -> Future[Any]:
        self.before(len(self.futures))
        future: Future[Any] = Future()
        self.futures.append(future)
        try:
            future.set_result(work(*args, **options))
        except CheckpointError as error:
            future.set_exception(error)
        return future


def test_every_executor_finds_the_same_bits(pair: Delta, processes: ForkServerContext) -> None:
    expected = found_in(pair)
    for workers in (1, 2, 5):
        with ThreadPoolExecutor(workers) as threads:
            assert_same_bits(found_in(pair, executor=threads), expected)
    assert_same_bits(found_in(pair, executor=Here()), expected)
    with ProcessPoolExecutor(1, processes) as pool:
        assert_same_bits(found_in(pair, executor=pool), expected)


@pytest.mark.parametrize(("task", "piece"), [(GRID, 3 * RUN), (2 * GRID, GRID), (64 * GRID, RUN)])
def test_the_size_of_tasks_and_pieces_changes_no_bit(
    pair: Delta, monkeypatch: pytest.MonkeyPatch, task: int, piece: int
) -> None:
    expected = found_in(pair)
    monkeypatch.setattr(streaming, "TASK", task)
    monkeypatch.setattr(streaming, "PIECE", piece)
    executor = Here()
    assert_same_bits(found_in(pair, executor=executor), expected)
    assert len(executor.futures) == sum(max(-(-torch.Size(shape).numel() // task), 1) for shape in SHAPES.values())
    monkeypatch.setattr(streaming, "AHEAD", 1)
    with ThreadPoolExecutor(2) as threads:
        assert_same_bits(found_in(pair, executor=threads), expected)


def test_tensors_in_memory_have_the_same_bits_as_in_files(pair: Delta) -> None:
    found = found_in(pair).tensors
    assert found["tensor"].tolist() == list(pair)
    assert pair.base is not None
    digits = {torch.float16: 7, torch.bfloat16: 7, torch.float32: 7, torch.float64: 7}
    for row in found.to_dict("records"):
        delta, base = pair.read(row["tensor"])
        again = tally_tensor(delta, base, digits=digits[pair.base.references[row["tensor"]].dtype])
        assert repr({key: row[key] for key in again.row()}) == repr(again.row())


def test_shards_have_the_same_bits_as_one_file(save_checkpoint: SaveCheckpoint, pair: Delta) -> None:
    names = list(SHAPES)
    shards = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    assert_same_bits(found_in(pair_of(save_checkpoint, shards=shards)), found_in(pair))


def test_a_module_has_the_same_bits_as_its_file(save_checkpoint: SaveCheckpoint) -> None:
    torch.manual_seed(0)
    modules = [torch.nn.Sequential(torch.nn.Linear(80, 70), torch.nn.LayerNorm(70)) for _ in range(2)]
    base, finetuned = (
        save_checkpoint(name, dict(module.state_dict()))
        for name, module in zip(("base", "finetuned"), modules, strict=True)
    )
    expected = tally_delta(load_delta(base=base, finetuned=finetuned))
    for sources in ((modules[0], modules[1]), (modules[0], finetuned), (base, modules[1])):
        assert_same_bits(tally_delta(load_delta(base=sources[0], finetuned=sources[1])), expected)


def test_a_matrix_that_is_stored_by_columns_is_read_by_rows(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    base, finetuned = normal(0, 30, 50), normal(1, 30, 50)
    by_columns = tmp_path / "pytorch_model.bin"
    torch.save({"a.weight": finetuned.T.contiguous().T}, by_columns)
    folder = save_checkpoint("base", {"a.weight": base})
    by_rows = save_checkpoint("finetuned", {"a.weight": finetuned})
    found = [tally_delta(load_delta(base=folder, finetuned=source)) for source in (by_columns, by_rows)]
    assert_same_bits(*found)


@pytest.mark.parametrize("base_dtype", FLOATS)
@pytest.mark.parametrize("finetuned_dtype", FLOATS)
def test_dtypes_in_pairs_and_alone_agree_with_numpy(
    save_checkpoint: SaveCheckpoint, base_dtype: torch.dtype, finetuned_dtype: torch.dtype
) -> None:
    base = normal(0, 9001).double().mul(0.02).to(base_dtype)
    finetuned = normal(1, 9001).double().mul(0.02).to(finetuned_dtype)
    delta = load_delta(
        base=save_checkpoint("base", {"a.weight": base}),
        finetuned=save_checkpoint("finetuned", {"a.weight": finetuned}),
    )
    (row,) = tally_delta(delta).tensors.to_dict("records")
    ours, theirs = stored_as_float32(finetuned), stored_as_float32(base)
    expected = by_hand(ours - theirs, theirs)
    # The distance of neighbours at the rms of the base, which is near 0.02, in the coarser of the two.
    digits = min({torch.bfloat16: 7, torch.float16: 10}.get(dtype, 23) for dtype in (base_dtype, finetuned_dtype))
    expected["storage_step"] = 2.0 ** (-6 - digits)
    assert_rows_agree({key: row[key] for key in expected}, expected)
    (row,) = tally_delta(load_delta(base=None, finetuned=delta.finetuned.source)).tensors.to_dict("records")
    expected = by_hand(ours)
    assert_rows_agree({key: row[key] for key in expected}, expected)


def test_a_cell_is_the_tally_of_its_tensors_together(pair: Delta) -> None:
    cells = found_in(pair).cells
    assert list(cells) == list(dict.fromkeys(parse_name(name, pair[name].ndim) for name in pair))
    experts = [name for name in pair if "experts" in name]
    read = [pair.read(name) for name in experts]
    values, base = (np.concatenate([np.ravel(each[side]) for each in read]) for side in (0, 1))
    expected = by_hand(values, base)
    expected["storage_step"] = 2.0**-7  # bfloat16 near 1
    assert 1 < np.sqrt((base.astype(np.float64) ** 2).mean()) < 2
    assert_rows_agree(cells[2, "experts.*.w1", "linear"].row(), expected)


def test_a_published_delta_is_measured_and_not_subtracted(save_checkpoint: SaveCheckpoint) -> None:
    base, change = normal(0, 50, 60), normal(1, 50, 60) * 0.01
    folders = {
        "base": save_checkpoint("base", {"a.weight": base}),
        "finetuned": save_checkpoint("delta", {"a.weight": change.bfloat16()}),
    }
    (row,) = tally_delta(load_delta(**folders, finetuned_is_delta=True)).tensors.to_dict("records")
    expected = by_hand(change.bfloat16().float().numpy(), base.numpy())
    assert row["rms"] == pytest.approx(expected["rms"], rel=1e-12)
    assert row["relative_rms"] == pytest.approx(expected["relative_rms"], rel=1e-12)
    assert math.isnan(row["storage_step"])


def test_an_adapter_has_no_storage_step(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    name, folder = "a.q_proj", tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    factors = {"A": normal(0, 2, 6).bfloat16(), "B": normal(1, 5, 2).bfloat16()}
    stored = {f"base_model.model.{name}.lora_{kind}.weight": factor for kind, factor in factors.items()}
    save_file(stored, folder / "adapter_model.safetensors")
    base = save_checkpoint("base", {f"{name}.weight": normal(2, 5, 6).bfloat16()})
    (row,) = tally_delta(load_delta(base=base, finetuned=folder)).tensors.to_dict("records")
    assert math.isnan(row["storage_step"])
    assert row["relative_rms"] > 0


@pytest.mark.parametrize("how", ["published", "pruned"])
def test_an_entry_whose_base_is_not_finite_is_counted_beside_the_delta_too(
    save_checkpoint: SaveCheckpoint, how: str
) -> None:
    base = save_checkpoint("base", {"a.weight": torch.tensor([1.0, torch.nan, torch.inf, 2.0])})
    other = save_checkpoint("other", {"a.weight": torch.tensor([3.0, 4.0, 5.0, 9.0])})
    delta = load_delta(base=base, finetuned=other, finetuned_is_delta=how == "published")
    if how == "pruned":
        # What is dropped is zero, whatever the base was.
        delta = delta.pruned(lambda tensor, *, name, seed: torch.zeros_like(tensor), seed=0)
    with pytest.warns(UserWarning, match=r"'a\.weight' has 2 of 4"):
        (row,) = tally_delta(delta).tensors.to_dict("records")
    change = [3.0, 9.0] if how == "published" else [0.0, 0.0]
    assert (row["nonfinite"], row["min"], row["max"], row["mean"]) == (2, *change, sum(change) / 2)
    assert row["relative_rms"] == pytest.approx(math.hypot(*change) / math.hypot(1, 2))


@pytest.mark.parametrize("broken", ["base", "finetuned"])
def test_a_file_truncated_during_the_pass_is_an_error_that_names_it(
    pair: Delta, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    file = getattr(pair, broken).files()[0]
    monkeypatch.setattr(streaming, "TASK", GRID)
    in_the_middle = getattr(pair, broken).references[LONG].offset + 100

    def truncate(number: int) -> None:
        if number == 5:
            with file.open("r+b") as opened:
                opened.truncate(in_the_middle)

    executor = Here(truncate)
    # Nothing is warned of, since nothing is found.
    with warnings.catch_warnings(), pytest.raises(CheckpointError) as caught:
        warnings.simplefilter("error")
        tally_delta(pair, executor=executor)
    assert len(executor.futures) > 6
    message = str(caught.value)
    assert message.startswith(f"{file}: tensor ")
    assert "cannot be read: it ends" in message
    assert "fetch it again" in message


def test_after_an_error_no_task_is_left_waiting(pair: Delta) -> None:
    futures: list[Future[Any]] = []

    class Stalled(Executor):
        """Fails at its first task and never comes to the others."""

        def submit(self, *args: Any, **options: Any) -> Future[Any]:
            futures.append(Future())
            if len(futures) == 1:
                futures[0].set_exception(CheckpointError("broken"))
            return futures[-1]

    with pytest.raises(CheckpointError, match="broken"):
        tally_delta(pair, executor=Stalled())
    assert len(futures) > 5
    assert all(future.cancelled() for future in futures[1:])


@pytest.mark.parametrize("error", [CheckpointError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_after_an_error_the_other_tasks_of_the_same_tensor_are_cancelled(
    save_checkpoint: SaveCheckpoint, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(streaming, "TASK", 1000)
    futures: list[Future[Any]] = []

    class Stalled(Executor):
        def submit(self, *args: Any, **options: Any) -> Future[Any]:
            futures.append(Future())
            return futures[-1]

    executor = Stalled()
    delta = load_delta(base=None, finetuned=save_checkpoint("model", {"a.weight": normal(0, 5000)}))
    submit = streaming._submit

    def submit_and_fail(*args: Any, **options: Any) -> list[Future[Any]]:
        tasks = submit(*args, **options)
        tasks[0].set_exception(error)
        return tasks

    monkeypatch.setattr(streaming, "_submit", submit_and_fail)
    with pytest.raises(type(error)):
        tally_delta(delta, executor=executor)
    assert [future.cancelled() for future in futures] == [False, True, True, True, True]


def test_a_pass_hands_out_a_bounded_number_of_tasks(
    save_checkpoint: SaveCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "AHEAD", 4)
    tensors = {f"layers.{i}.a.weight": normal(i, 7) for i in range(30)}
    delta = load_delta(base=None, finetuned=save_checkpoint("model", tensors))
    finished: list[int] = []

    class Counting(streaming.tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            finished.append(1)
            return super().update(n)

    monkeypatch.setattr(streaming, "tqdm", Counting)
    ahead: list[int] = []
    tally_delta(delta, executor=Here(lambda number: ahead.append(number + 1 - len(finished))))
    assert len(finished) == 30
    assert max(ahead) <= 6


def test_a_pruned_delta_is_tallied_as_it_is_read(save_checkpoint: SaveCheckpoint) -> None:
    base = {name: normal(i, 40, 50) for i, name in enumerate(("a.weight", "b.weight"))}
    finetuned = {name: tensor + 0.01 * normal(7, 40, 50) for name, tensor in base.items()}
    delta = load_delta(base=save_checkpoint("base", base), finetuned=save_checkpoint("finetuned", finetuned))
    pruned = delta.pruned(Dare(0.75), seed=1)
    for row in tally_delta(pruned).tensors.to_dict("records"):
        expected = by_hand(pruned[row["tensor"]].numpy(), base[row["tensor"]].numpy())
        # What was computed was not rounded to the steps of the weights.
        expected["storage_step"] = math.nan
        assert_rows_agree({key: row[key] for key in expected}, expected)


def bfloat16_pair(save_checkpoint: SaveCheckpoint, spread: float, dtype: torch.dtype = torch.bfloat16) -> Delta:
    base = {f"{name}.weight": (normal(i, 100, 80) * 0.02).to(dtype) for i, name in enumerate("ab")}
    finetuned = {name: (tensor.float() + spread * normal(5, 100, 80)).to(dtype) for name, tensor in base.items()}
    return load_delta(base=save_checkpoint("base", base), finetuned=save_checkpoint("finetuned", finetuned))


def test_storage_too_coarse_for_the_delta_is_warned_of(save_checkpoint: SaveCheckpoint) -> None:
    delta = bfloat16_pair(save_checkpoint, 2e-5)
    with pytest.warns(UserWarning) as caught:
        found = tally_delta(delta)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith(f"{delta.finetuned.source}: 2 of 2 tensors are stored in steps larger than their median ")
    assert "'a.weight' (step 0.00012, median 0)" in message
    assert found.tensors["storage_step"].tolist() == [2.0**-13] * 2
    with pytest.warns(UserWarning, match="stored in steps"):
        assert (tally_delta(delta).tensors["zero_share"] > 0.5).all()


@pytest.mark.parametrize(("spread", "dtype"), [(1e-3, torch.bfloat16), (2e-5, torch.float32)])
def test_storage_fine_enough_for_the_delta_is_not_warned_of(
    save_checkpoint: SaveCheckpoint, spread: float, dtype: torch.dtype
) -> None:
    tally_delta(bfloat16_pair(save_checkpoint, spread, dtype))


def test_zeros_that_are_no_rounding_are_not_warned_of(save_checkpoint: SaveCheckpoint) -> None:
    tally_delta(bfloat16_pair(save_checkpoint, 1e-3).pruned(Dare(0.9), seed=0))
    frozen = save_checkpoint("frozen", {"a.weight": normal(0, 9), "b.weight": normal(1, 9)})
    trained = save_checkpoint("trained", {"a.weight": normal(0, 9), "b.weight": normal(2, 9)})
    tally_delta(load_delta(base=frozen, finetuned=trained))
    tiny = save_checkpoint("difference", {"b.weight": (normal(2, 9) * 1e-9).bfloat16()})
    tally_delta(load_delta(base=frozen, finetuned=tiny, finetuned_is_delta=True))


def test_one_warning_counts_the_broken_tensors_and_names_three(save_checkpoint: SaveCheckpoint) -> None:
    bad = {
        "a.weight": torch.tensor([torch.nan, 1.0]),
        "b.weight": torch.ones(3),
        **{f"{name}.weight": torch.full((4,), torch.inf) for name in "cde"},
    }
    delta = load_delta(base=None, finetuned=save_checkpoint("model", bad))
    with pytest.warns(UserWarning) as caught:
        found = tally_delta(delta)
    assert [str(each.message) for each in caught] == [
        f"{delta.finetuned.source}: 4 of 5 tensors have NaN or infinite entries on either side: "
        "'a.weight' has 1 of 2; 'c.weight' has 4 of 4; 'd.weight' has 4 of 4; "
        "they are counted in column nonfinite and left out of every statistic"
    ]
    assert found.tensors["nonfinite"].tolist() == [1, 0, 4, 4, 4]
    assert found.tensors["mean"].tolist()[:2] == [1.0, 1.0]


def test_progress_counts_tensors_and_bytes_of_both_sides(
    pair: Delta, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bars: list[Any] = []

    class Recording(streaming.tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            bars.append(self)

    monkeypatch.setattr(streaming, "tqdm", Recording)
    found_in(pair, progress=sys.stderr)
    assert pair.base is not None
    nbytes = sum(tensor.nbytes for side in (pair.base, pair.finetuned) for tensor in side.values())
    assert (bars[0].total, bars[0].n) == (nbytes, nbytes)
    assert bars[0].postfix == f"{len(pair)} of {len(pair)} tensors"
    assert "B/s" in capsys.readouterr().err
    found_in(pair, progress=None)
    assert capsys.readouterr().err == ""


def test_the_fixed_grid_is_made_of_whole_pieces_and_these_of_whole_runs() -> None:
    # Else the sums would depend on how a tensor is cut for reading.
    assert streaming.TASK % GRID == GRID % PIECE == PIECE % RUN == 0
    assert tally.PIECE == streaming.PIECE
