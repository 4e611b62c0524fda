"""Pickles that torch writes, read as data, against torch's own reading; and those that it does not write."""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from delta_analysis.checkpoints.files import read_header
from delta_analysis.checkpoints.pickles import View, read_pickle

Tensors = Mapping[str, torch.Tensor]
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip
UNTYPED = (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.uint16, torch.uint32,
    torch.uint64,
)  # fmt: skip
"""Those without a storage of their own, which torch writes in the old form too, but does not read there."""
READ = set(
    "BINFLOAT BINGET BINPERSID BININT BININT1 BININT2 BINPUT BINUNICODE SHORT_BINUNICODE SHORT_BINSTRING LONG1 "
    "LONG_BINGET LONG_BINPUT MEMOIZE NONE NEWTRUE NEWFALSE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND "
    "APPENDS EMPTY_DICT SETITEM SETITEMS MARK GLOBAL STACK_GLOBAL REDUCE BUILD PROTO FRAME STOP".split()
)
both_forms = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def saved(tensors: object, *, legacy: bool = False, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def data_pkl(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read("archive/data.pkl")


def views(content: bytes) -> dict[str, View]:
    """What the pickle of tensors says, which is the only one of a zip and the fourth of the old form."""
    stream = io.BytesIO(content)
    if zipfile.is_zipfile(stream):
        return read_pickle(io.BytesIO(data_pkl(content)))
    stream.seek(0)
    for _ in range(3):
        read_pickle(stream)
    return read_pickle(stream)


def assert_describes(found: dict[str, View], tensors: Tensors) -> None:
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        view, storage = found[name], tensor.untyped_storage()
        assert (view.shape, view.strides, view.offset) == (tensor.shape, tensor.stride(), tensor.storage_offset()), name
        assert (view.dtype, view.storage.nbytes) == (tensor.dtype, storage.nbytes()), name
        assert view.is_contiguous == tensor.is_contiguous(), name
        tied = {other for other, each in tensors.items() if each.untyped_storage()._cdata == storage._cdata}
        assert {other for other, each in found.items() if each.storage == view.storage} == tied, name


def assert_reads_as_torch(tensors: Tensors, *, legacy: bool) -> None:
    content = saved(tensors, legacy=legacy)
    assert_describes(views(content), torch.load(io.BytesIO(content), weights_only=True))


def refusal(content: bytes) -> str:
    with pytest.raises(ValueError) as caught:
        read_pickle(io.BytesIO(content))
    return str(caught.value)


@both_forms
@pytest.mark.parametrize("dtype", DTYPES + UNTYPED, ids=str)
def test_every_dtype(dtype: torch.dtype, legacy: bool) -> None:
    tensors = {"a": torch.ones(3, 5).to(dtype), "b": torch.zeros(2).to(dtype)[1:]}
    assert_describes(views(saved(tensors, legacy=legacy)), tensors)
    if not (legacy and dtype in UNTYPED):
        assert_reads_as_torch(tensors, legacy=legacy)


@both_forms
def test_tied_and_sliced_and_transposed_tensors(legacy: bool) -> None:
    whole, other = torch.arange(24.0), torch.ones(2, 3)
    tensors = {
        "whole": whole,
        "again": whole,
        "rows": whole.view(6, 4)[2:],
        "columns": whole.view(6, 4)[:, 1:3],
        "transposed": whole.view(6, 4).T,
        "permuted": whole.view(2, 3, 4).permute(2, 0, 1),
        "repeated": whole[5].expand(2, 7),
        "other": other,
        "its view": other.view(3, 2),
        "its copy": other.clone(),
        "channels last": torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    assert_reads_as_torch(tensors, legacy=legacy)


@both_forms
def test_scalars_and_tensors_without_entries(legacy: bool) -> None:
    tensors = {
        "scalar": torch.tensor(2.5),
        "an entry": torch.arange(4.0)[3],
        "empty": torch.empty(0),
        "no rows": torch.empty(0, 3),
        "no columns": torch.empty(3, 0).T,
        "end": torch.arange(4.0)[4:],
    }
    assert_reads_as_torch(tensors, legacy=legacy)
    assert_reads_as_torch({}, legacy=legacy)


@both_forms
def test_parameters_with_and_without_attributes(legacy: bool) -> None:
    marked = torch.nn.Parameter(torch.ones(2, 3))
    marked.partition = {"dim": 1, "sizes": [1, 2], "scale": 0.5, "of": (None, True, -70000, 2**40)}  # type: ignore[attr-defined]
    tensors = {
        "plain": torch.nn.Parameter(torch.ones(4)),
        "frozen": torch.nn.Parameter(torch.ones(3, 2).T, requires_grad=False),
        "marked": marked,
        "data of the marked": marked.data,
    }
    assert_reads_as_torch(tensors, legacy=legacy)


@both_forms
@pytest.mark.parametrize("keep_vars", [False, True])
def test_the_state_of_a_module_with_its_versions(legacy: bool, keep_vars: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.LSTM(4, 2))
    module[0].register_buffer("mask", torch.ones(2, 2, dtype=torch.bool))
    state = module.state_dict(keep_vars=keep_vars)
    assert state._metadata["1"] == {"version": 2}  # type: ignore[attr-defined]
    assert_reads_as_torch(state, legacy=legacy)


@both_forms
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_names_its_instructions(legacy: bool, protocol: int) -> None:
    whole = torch.arange(6.0)
    state = collections.OrderedDict(
        {f"model.layers.{i}.{'x' * i}.weight": torch.full((i, 2), float(i)) for i in range(1, 300)}
        | {"a": whole, "b": whole.view(2, 3).T, "c": torch.nn.Parameter(whole), "d": whole.to(torch.float8_e5m2)}
    )
    # Torch's careful reader stops at protocol 3.
    assert_describes(views(saved(state, legacy=legacy, protocol=protocol)), state)


def test_more_places_in_the_memo_than_a_byte_counts() -> None:
    tensors = {f"{i}": torch.ones(i % 3, i % 5).to(DTYPES[i // 100]) for i in range(300)}
    content = saved(tensors)
    assert {"LONG_BINPUT", "LONG_BINGET"} <= {code.name for code, _, _ in pickletools.genops(data_pkl(content))}
    assert_describes(views(content), tensors)


def test_names_as_python_2_wrote_them() -> None:
    content = data_pkl(saved({"a": torch.ones(2)})).replace(b"X\x01\0\0\0a", b"U\x01a")
    assert read_pickle(io.BytesIO(content))["a"].shape == (2,)


@st.composite
def strided(draw: st.DrawFn) -> torch.Tensor:
    """Any view of a storage of its own."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    strides = draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)))
    offset, more = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    reach = 1 + sum(max(length - 1, 0) * stride for length, stride in zip(shape, strides, strict=True))
    storage = torch.arange(offset + reach + more).to(draw(st.sampled_from(DTYPES)))
    return storage.as_strided(shape, strides, offset)


@given(tensors=st.dictionaries(st.text(max_size=9), strided(), max_size=5), legacy=st.booleans())
def test_any_names_shapes_and_strides(tensors: dict[str, torch.Tensor], legacy: bool) -> None:
    assert_reads_as_torch(tensors, legacy=legacy)


@both_forms
def test_a_model_of_transformers_with_tied_weights(tmp_path: Path, legacy: bool) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, tie_word_embeddings=True, **sizes))
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(saved(model.state_dict(), legacy=legacy))
    tensors = torch.load(file, weights_only=True)
    found = views(file.read_bytes())
    assert_describes(found, tensors)
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"]
    assert all(torch.equal(entry.read(), tensors[name]) for name, entry in read_header(file).items())


@pytest.mark.parametrize(
    "code", [code for code in pickletools.opcodes if code.name not in READ], ids=lambda code: code.name
)
def test_all_other_instructions_are_refused_by_name(code: pickletools.OpcodeInfo) -> None:
    argument = bytes(8)
    if code.arg is not None and code.arg.n == pickletools.UP_TO_NEWLINE:
        argument = b"''\n\n" if "string" in code.arg.name else b"0\n"
    message = refusal(code.code.encode("latin-1") + argument)
    assert message == f"its pickle has the instruction {code.name}, which torch does not write for tensors"


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.flag),)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_call_is_refused_by_name_and_not_made(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps({"a": Harm(tmp_path / "harmed")}, protocol)
    assert refusal(content) == "its pickle calls posix.mkdir, which makes no plain tensor"
    assert not (tmp_path / "harmed").exists()
    pickle.loads(content)
    assert (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"cantigravity\nfly\n)R.", "its pickle calls antigravity.fly, which makes no plain tensor"),
        (b"\x8c\x0bantigravity\x8c\x03fly\x93)R.", "its pickle calls antigravity.fly, which makes no plain tensor"),
        (b"cantigravity\nfly\n)\x81.", "its pickle has the instruction NEWOBJ"),
        (b"(iantigravity\nfly\n.", "its pickle has the instruction INST"),
        (b"(cantigravity\nfly\no.", "its pickle has the instruction OBJ"),
        (b"\x82\x01.", "its pickle has the instruction EXT1"),
        (b"ccollections\nOrderedDict\n)R}b)R.", "its pickle has a dict where torch writes a Function"),
        (b"]}b.", "its pickle has a list where torch writes a dict"),
        (b"ccollections\nOrderedDict\n]\x85R.", "its pickle calls collections.OrderedDict, which makes"),
        (b"ctorch._utils\n_rebuild_parameter\nN\x85R.", "its pickle has a NoneType where torch writes a View"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n]R.", "its pickle has a list where torch writes a tuple"),
        (b"})Ns.", "its pickle has a tuple where torch writes a str"),
        (b"}G\0\0\0\0\0\0\0\0Ns.", "its pickle has a float where torch writes a str"),
        (b")X\1\0\0\0aNs.", "its pickle has a tuple where torch writes a dict"),
        (b"}Na.", "its pickle has a dict where torch writes a list"),
        (b"NN\x93.", "its pickle has a NoneType where torch writes a str"),
        (b"K\x01Q.", "its pickle has a int where torch writes a tuple"),
        (b"(X\6\0\0\0moduleNNNNtQ.", "its pickle refers to something else than a storage"),
    ],
)
def test_what_torch_does_not_write_is_refused_and_never_looked_up(content: bytes, problem: str) -> None:
    assert refusal(content).startswith(problem)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.ones(2, dtype=torch.complex64), "storage of the unknown kind torch.ComplexFloatStorage"),
        (torch._neg_view(torch.ones(2)), "view that negates or conjugates what is stored"),
        (torch.ones(2).to_sparse(), "its pickle calls torch.serialization._get_layout"),
        (torch.ones(2, device="meta"), "its pickle calls torch._utils._rebuild_meta_tensor_no_storage"),
    ],
    ids=["complex", "negated", "sparse", "meta"],
)
def test_tensors_that_are_not_entries_in_a_storage_are_refused(tensor: torch.Tensor, problem: str) -> None:
    for legacy in (False, True):
        with pytest.raises(ValueError, match=problem):
            views(saved({"a": tensor}, legacy=legacy))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b"K\x02K\x03\x86", b"K\x06\x85", "more or fewer strides than dimensions"),
        (b"K\x02K\x03\x86", b"K\x02J\xff\xff\xff\xff\x86", "a number that is out of range"),
        (b"K\x02K\x03\x86", b"K\x02\x8a\x09" + bytes(8) + b"\x01\x86", "a number that is out of range"),
        (b"K\x02K\x03\x86", b"K\x02\x88\x86", "a number that is out of range"),
        (b"FloatStorage", b"OtherStorage", "storage of the unknown kind torch.OtherStorage"),
    ],
)
def test_numbers_and_kinds_that_cannot_be_are_refused(old: bytes, new: bytes, problem: str) -> None:
    content = pickletools.optimize(data_pkl(saved({"a": torch.ones(2, 3)})))
    assert content.count(old) == 1
    assert problem in refusal(content.replace(old, new))


def test_a_dtype_that_torch_does_not_know_is_named() -> None:
    content = data_pkl(saved({"a": torch.ones(2).to(torch.float8_e5m2)}))
    assert "unknown dtype torch.float9_e5m2" in refusal(content.replace(b"float8_e5m2", b"float9_e5m2"))


def test_a_pickle_that_ends_too_early_is_refused_wherever_it_ends() -> None:
    content = data_pkl(saved({"a": torch.ones(2)}))
    for size in range(len(content)):
        refusal(content[:size])


def test_depth_and_repetition_do_no_harm() -> None:
    assert read_pickle(io.BytesIO(b"]" * 200_000 + b"a" * 199_999 + b".")) is not None
    doubled = read_pickle(io.BytesIO(b")" + b"q\0h\0\x86" * 100 + b"."))
    assert len(doubled) == 2
    assert "tuple where torch writes a str" in refusal(b"})" + b"\x85" * 200_000 + b"Ns.")
