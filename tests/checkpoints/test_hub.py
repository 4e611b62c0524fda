from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import close_session, constants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.checkpoint import open_checkpoint, tokenizer_folder
from delta_analysis.checkpoints.hub import HubId, fetch_tokenizer, fetch_weights, parse_hub_id

REPO = "org/name"
COMMIT = "c0ffee" + 34 * "0"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}})
# What real repositories hold beside the weights in safetensors, and nobody should wait for.
CLUTTER = (
    ".gitattributes",
    "README.md",
    "modeling_name.py",
    "model.fp16.safetensors",
    "model-00001-of-00002.fp16.safetensors",
    "consolidated.safetensors",
    "onnx/config.json",
    "onnx/model.safetensors",
    "original/consolidated.00.pth",
    "original/tokenizer.model",
    "training_args.bin",
    "optimizer.pt",
    "flax_model.msgpack",
    "tf_model.h5",
    "name.Q4_K_M.gguf",
)
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


class FakeHub(ThreadingHTTPServer):
    """The endpoints of the hub that a download uses; files other than JSON lie behind a redirect to another host."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.revisions = {"main": COMMIT}
        self.refusals: dict[str, tuple[int, dict[str, str]]] = {}
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/storage"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()

    def hold(self, *names: str, **contents: str) -> None:
        self.files |= {name: name.encode() for name in names}
        self.files |= {name.replace("__", "."): text.encode() for name, text in contents.items()}

    def fetched(self) -> list[str]:
        """The files whose content went out."""
        return sorted(each.removeprefix("GET file ") for each in self.asked if each.startswith("GET file "))


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).removeprefix("/")
        for prefix, (status, headers) in self.server.refusals.items():
            if path.startswith(prefix):
                return self.answer(b"{}", status, headers)
        if path.startswith(f"api/models/{REPO}/revision/"):
            return self.info(path.removeprefix(f"api/models/{REPO}/revision/"))
        if path == f"api/models/{REPO}/tree/{COMMIT}":
            return self.tree()
        if path.startswith(f"{REPO}/resolve/{COMMIT}/"):
            return self.file(path.removeprefix(f"{REPO}/resolve/{COMMIT}/"))
        if path.startswith("storage/"):
            return self.file(path.removeprefix("storage/"), stored_here=True)
        return self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def info(self, revision: str) -> None:
        self.server.asked.append(f"{self.command} revision {revision}")
        if revision not in self.server.revisions:
            return self.answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        return self.answer(json.dumps({"id": REPO, "sha": self.server.revisions[revision], "siblings": []}).encode())

    def tree(self) -> None:
        self.server.asked.append(f"{self.command} tree")
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in self.server.files.items()
        ]
        self.answer(json.dumps([*entries, {"type": "directory", "path": "onnx", "oid": 40 * "1"}]).encode())

    def file(self, name: str, *, stored_here: bool = False) -> None:
        content = self.server.files[name]
        linked = {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
        if not (stored_here or name.endswith(".json")):
            location = {"Location": f"{self.server.storage}/{name}"}
            return self.answer(b"", 302, {**linked, **location, "X-Repo-Commit": COMMIT})
        self.server.asked.append(f"{self.command} file {name}")
        return self.answer(content, 200, {"ETag": linked["X-Linked-Etag"], "X-Repo-Commit": COMMIT})

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        monkeypatch.setenv("NO_PROXY", "*")
        close_session()
        server.start()
        yield server
        server.stop()
        close_session()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def cached_snapshot(cache: Path, **contents: str) -> Path:
    """A snapshot as other tools leave it in the cache: files and a branch, and no listing of the repository."""
    repo = cache / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    folder = repo / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name, text in contents.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def refusal(source: str = REPO) -> str:
    hub = parse_hub_id(source)
    assert hub is not None
    with pytest.raises(CheckpointError) as caught:
        fetch_weights(hub)
    assert caught.value.__cause__ is None or not isinstance(caught.value.__cause__, CheckpointError)
    return str(caught.value)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "refs/pr/1", COMMIT, "feature#2", "a@b"])
@pytest.mark.parametrize("repo", ["org/name", "Qwen/Qwen1.5-0.5B", "a_b/c.d-e", "0/1"])
def test_a_hub_id_is_read_and_written_back(repo: str, revision: str | None) -> None:
    hub = HubId(repo, revision)
    assert parse_hub_id(str(hub)) == hub


@pytest.mark.parametrize(
    "source",
    [
        *("", "name", "name@main", "/org/name", "./name", "../name", "..", "~/name", "org/", "/name", "a/b/c"),
        *("org/name/", "org/../name", "org/na--me", "org/name.git", "org/.name", "org/-name", "org name/x", "órg/name"),
        *("zoo:small/base", "pair:a/b", "C:\\org/name", "https://org/name", "org/name\n", "org/" + 97 * "n"),
        *("org/name@", "org/name@a b", "org/name@../x", "org/name@/x", "org/name@x/", "org/name@a//b", "org/name@x\0"),
    ],
)
def test_what_no_repository_can_be_called_is_no_hub_id(source: str) -> None:
    assert parse_hub_id(source) is None


@given(st.text())
def test_any_text_is_a_hub_id_or_none(source: str) -> None:
    hub = parse_hub_id(source)
    assert hub is None or str(hub) == source


def test_one_file_of_weights_and_its_config_are_fetched(hub: FakeHub, cache: Path) -> None:
    hub.hold("config.json", "model.safetensors", "pytorch_model.bin", *TOKENIZER, *CLUTTER)
    folder = fetch_weights(HubId(REPO, None))
    assert folder == cache / "models--org--name" / "snapshots" / COMMIT
    assert hub.fetched() == names_in(folder) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_text() == "model.safetensors"


def test_shards_are_those_that_the_index_names(hub: FakeHub) -> None:
    hub.hold("config.json", "model-00001-of-00003.safetensors", "pytorch_model.bin", *SHARDS, *CLUTTER)
    hub.files["model.safetensors.index.json"] = INDEX.encode()
    folder = fetch_weights(HubId(REPO, None))
    assert hub.fetched() == names_in(folder) == ["config.json", *SHARDS, "model.safetensors.index.json"]


def test_a_single_file_goes_before_an_index_that_is_left_over(hub: FakeHub) -> None:
    hub.hold("model.safetensors", "config.json", *SHARDS)
    hub.files["model.safetensors.index.json"] = INDEX.encode()
    folder = fetch_weights(HubId(REPO, None))
    assert hub.fetched() == names_in(folder) == ["config.json", "model.safetensors"]


def test_pickles_are_fetched_where_there_is_nothing_better(hub: FakeHub) -> None:
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    hub.hold("config.json", *shards, *CLUTTER)
    hub.files["pytorch_model.bin.index.json"] = json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}).encode()
    folder = fetch_weights(HubId(REPO, None))
    assert hub.fetched() == names_in(folder) == ["config.json", *shards, "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_fetched_with_its_config(hub: FakeHub, weights: str, caplog: pytest.LogCaptureFixture) -> None:
    hub.hold("adapter_config.json", weights, *TOKENIZER, *CLUTTER)
    folder = fetch_weights(HubId(REPO, None))
    assert hub.fetched() == names_in(folder) == ["adapter_config.json", weights]
    assert not caplog.records


def test_of_an_adapter_and_its_merge_the_adapter_is_fetched(hub: FakeHub) -> None:
    hub.hold("config.json", "adapter_config.json", "adapter_model.safetensors", "model.safetensors")
    fetch_weights(HubId(REPO, None))
    assert hub.fetched() == ["adapter_config.json", "adapter_model.safetensors", "config.json"]


def test_names_with_the_signs_of_patterns_match_themselves_alone(hub: FakeHub) -> None:
    hub.hold("config.json", "model-[12].safetensors", "model-1.safetensors")
    hub.files["model.safetensors.index.json"] = b'{"weight_map": {"a": "model-[12].safetensors"}}'
    fetch_weights(HubId(REPO, None))
    assert hub.fetched() == ["config.json", "model-[12].safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/1", COMMIT])
def test_a_revision_is_asked_for(hub: FakeHub, revision: str) -> None:
    hub.hold("config.json", "model.safetensors")
    hub.revisions = {"v1.0": COMMIT, "refs/pr/1": COMMIT}
    assert fetch_weights(HubId(REPO, revision)).name == COMMIT
    # A commit cannot move, so nobody is asked where it is.
    assert [each for each in hub.asked if "revision" in each] == (
        [] if revision == COMMIT else [f"GET revision {revision}"]
    )


def test_nothing_is_fetched_twice(hub: FakeHub) -> None:
    hub.hold("config.json", *SHARDS)
    hub.files["model.safetensors.index.json"] = INDEX.encode()
    folder = fetch_weights(HubId(REPO, None))
    hub.asked.clear()
    assert fetch_weights(HubId(REPO, None)) == folder
    assert hub.asked == ["GET revision main"]
    hub.asked.clear()
    assert fetch_weights(HubId(REPO, COMMIT)) == folder
    assert hub.asked == []


def test_the_tokenizer_goes_to_the_same_snapshot(hub: FakeHub) -> None:
    hub.hold(
        "config.json", "model.safetensors", "vocab.py", "chat_template.py", "tokenization_name.py", *TOKENIZER, *CLUTTER
    )
    folder = fetch_weights(HubId(REPO, None))
    hub.asked.clear()
    assert fetch_tokenizer(HubId(REPO, folder.name)) == folder
    assert hub.fetched() == sorted(TOKENIZER)
    assert names_in(folder) == sorted(["config.json", "model.safetensors", *TOKENIZER])


def test_the_tokenizer_of_a_checkpoint_is_of_the_commit_of_its_weights(hub: FakeHub) -> None:
    hub.hold("config.json", *TOKENIZER)
    hub.files |= {"config.json": b"{}", "model.safetensors": save({"w": torch.ones(2)})}
    checkpoint = open_checkpoint(REPO)
    # The branch moves on between the two.
    hub.revisions["main"] = 40 * "d"
    folder = tokenizer_folder(checkpoint)
    assert folder == checkpoint.path
    assert {*TOKENIZER, "model.safetensors"} <= set(names_in(folder))


def test_a_tokenizer_alone_brings_no_weights(hub: FakeHub) -> None:
    hub.hold("config.json", "model.safetensors", "vocab.txt", *CLUTTER)
    assert names_in(fetch_tokenizer(HubId(REPO, None))) == ["config.json", "vocab.txt"]


def test_a_repository_without_a_tokenizer_is_an_error(hub: FakeHub) -> None:
    hub.hold("config.json", "generation_config.json", "model.safetensors", *CLUTTER)
    with pytest.raises(CheckpointError, match="org/name: no tokenizer .* use that of its base"):
        fetch_tokenizer(HubId(REPO, None))


def test_a_complete_snapshot_needs_no_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.hold("config.json", *SHARDS, *TOKENIZER, *CLUTTER)
    hub.files["model.safetensors.index.json"] = INDEX.encode()
    folder = fetch_weights(HubId(REPO, None))
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_weights(HubId(REPO, None)) == fetch_weights(HubId(REPO, "main")) == folder
    assert fetch_weights(HubId(REPO, COMMIT)) == folder
    with pytest.raises(CheckpointError, match=r"added_tokens\.json is not in the cache .*HF_HUB_OFFLINE"):
        fetch_tokenizer(HubId(REPO, None))
    assert hub.asked == []


def test_a_snapshot_that_was_broken_off_is_an_error_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.hold("config.json", *SHARDS)
    hub.files["model.safetensors.index.json"] = INDEX.encode()
    (fetch_weights(HubId(REPO, None)) / SHARDS[1]).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert f"{SHARDS[1]} is not in the cache" in refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert (fetch_weights(HubId(REPO, None)) / SHARDS[1]).exists()


def test_a_hub_that_is_down_leaves_the_cache(hub: FakeHub) -> None:
    hub.hold("config.json", "model.safetensors")
    folder = fetch_weights(HubId(REPO, None))
    hub.refusals["api/"] = (503, {})
    assert fetch_weights(HubId(REPO, None)) == folder
    hub.stop()
    assert fetch_weights(HubId(REPO, None)) == folder


def test_a_snapshot_of_another_tool_is_read_offline(cache: Path, offline: None) -> None:
    folder = cached_snapshot(cache, config__json="{}", model__safetensors="")
    assert fetch_weights(HubId(REPO, None)) == folder


def test_a_snapshot_of_another_tool_that_lacks_a_shard_is_an_error(cache: Path, offline: None) -> None:
    folder = cached_snapshot(cache, config__json="{}", model__safetensors__index__json=INDEX)
    (folder / SHARDS[0]).touch()
    assert f"model.safetensors.index.json names {SHARDS[1]!r}, which is no weight file" in refusal()
    (folder / SHARDS[1]).touch()
    assert fetch_weights(HubId(REPO, None)) == folder


def test_a_snapshot_without_weights_is_an_error_offline(cache: Path, offline: None) -> None:
    folder = cached_snapshot(cache, config__json="{}")
    assert f"no weights of a known layout in the repository or its snapshot {folder}" in refusal()


def test_a_repository_that_is_not_in_the_cache_is_an_error_offline(cache: Path, offline: None) -> None:
    message = refusal("org/name@v1")
    assert message.startswith(f"org/name@v1: config.json is not in the cache {cache}, and the hub does not give it (")
    assert "offline mode is enabled" in message
    assert "switch the network on and HF_HUB_OFFLINE off" in message


def test_what_another_tool_did_not_find_counts_as_not_there(cache: Path, offline: None) -> None:
    """Clients note a missing file in the cache by an empty one in `.no_exist`."""
    shutil.rmtree(cached_snapshot(cache))
    for name in ("config.json", "adapter_config.json"):
        note = cache / "models--org--name" / ".no_exist" / COMMIT / name
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    assert "config.json is not in the cache" in refusal()


def test_a_hub_out_of_reach_is_an_error(hub: FakeHub) -> None:
    hub.stop()
    assert "Connection refused" in refusal()


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("endpoint", [f"{REPO}/resolve", "api/"])
def test_a_gated_repository_is_an_error(hub: FakeHub, endpoint: str, status: int) -> None:
    hub.hold("config.json", "model.safetensors")
    hub.refusals[endpoint] = (status, {"X-Error-Code": "GatedRepo"})
    message = refusal()
    assert f"a gated repository: accept its licence on {hub.url}/org/name and log in with `hf auth login`" in message
    assert "or give an ungated mirror" in message
    assert hub.fetched() == []


@pytest.mark.parametrize("status", [401, 404])
def test_a_missing_repository_is_an_error(hub: FakeHub, status: int) -> None:
    hub.refusals["api/"] = (status, {"X-Error-Code": "RepoNotFound"})
    message = refusal()
    assert message.startswith(f"org/name: no such repository on {hub.url}: check its spelling")
    assert "HF_TOKEN" in message


def test_a_missing_revision_is_an_error(hub: FakeHub) -> None:
    hub.hold("config.json", "model.safetensors")
    assert refusal("org/name@v2").startswith("org/name@v2: no such branch, tag or commit")


def test_a_token_that_is_refused_is_an_error(hub: FakeHub) -> None:
    hub.refusals["api/"] = (401, {"X-Error-Message": "Invalid credentials in Authorization header"})
    assert "the hub refused or broke off" in refusal()


@pytest.mark.parametrize("status", [403, 500])
def test_a_failure_of_the_hub_is_told(hub: FakeHub, status: int) -> None:
    hub.refusals["api/"] = (status, {})
    assert f"{status}" in refusal()


def test_a_repository_of_other_formats_is_an_error(hub: FakeHub) -> None:
    hub.hold("config.json", "name.Q4_K_M.gguf", "name.Q8_0.gguf", "onnx/model.onnx", "original/consolidated.00.pth")
    message = refusal()
    assert "got 2 .gguf, 1 .json, 1 .onnx, 1 .pth: give the repository that these were made from" in message
    assert hub.fetched() == ["config.json"]


@pytest.mark.parametrize(
    "shard",
    ["modeling_name.py", "onnx/other.safetensors", "../../x.safetensors", "*.safetensors", "pytorch_model.bin", 3],
)
def test_an_index_cannot_ask_for_other_files(hub: FakeHub, shard: object) -> None:
    hub.hold("config.json", "modeling_name.py", "onnx/model.safetensors", "pytorch_model.bin", "a.safetensors")
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": shard}}).encode()
    message = refusal()
    assert f"names {shard!r}, which is no weight file" in message or f"index.json: shard {shard!r} " in message
    assert hub.fetched() == ["config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": []}}'])
def test_a_damaged_index_is_an_error(hub: FakeHub, index: str) -> None:
    hub.hold("config.json", model__safetensors__index__json=index)
    message = refusal()
    assert "model.safetensors.index.json: " in message and message.endswith("again")


def test_a_full_disk_is_told_as_it_is(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.hold("config.json", "model.safetensors")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(shutil, "move", full)
    with pytest.raises(OSError, match="No space left on device"):
        fetch_weights(HubId(REPO, None))
