"""The Hub: the real client against a stand-in server. Models come, artifacts go and come back, nothing is trusted."""

import json

import huggingface_hub
import pytest
from hub_stand_in import StandInHub
from huggingface_hub import constants
from tiny import random_artifacts, tiny_llava

from safety.artifacts import load_artifacts, save_artifacts
from safety.card import CARD, MARK
from safety.errors import UserError
from safety.hub import pull, push
from safety.loading import load


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in hub, with a cache and a login of its own."""
    server = StandInHub()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    yield server
    server.close()


@pytest.fixture(scope="module")
def lvlm():
    return tiny_llava()


@pytest.fixture(scope="module")
def model_files(lvlm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    lvlm.model.save_pretrained(folder)
    lvlm.processor.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(lvlm, tmp_path):
    artifacts = random_artifacts(lvlm)
    refused = {"refused": {"hits": 7, "n": 9, "rate": 0.7}}
    artifacts.about = {"sasa": {"validation_auroc": {"2-4": 0.875}}, "date": "2026-01-02",
                       "held_out": {"all": {"typographic": refused}}}
    save_artifacts(artifacts, lvlm, tmp_path / "artifacts")
    return tmp_path / "artifacts"


def test_a_model_is_fetched_without_what_is_not_needed(hub, model_files, monkeypatch):
    extra = {"pytorch_model.bin": b"pickle", "modeling_evil.py": b"boom", "onnx/model.onnx": b"x",
             "onnx/config.json": b"{}", "consolidated.safetensors": b"other weights"}
    commit = hub.add("owner/tiny", model_files | extra)
    lines = []
    lvlm = load("owner/tiny", "none", progress=lines.append)
    assert (lvlm.name, lvlm.revision, lvlm.source) == ("owner/tiny", commit, f"owner/tiny@{commit}")
    assert set(hub.fetched) == set(model_files)  # each once, and no others
    assert len(hub.fetched) == len(model_files)
    assert lines[0] == "Looking owner/tiny up …" and any("100%" in line for line in lines[1:-1])
    hub.close()
    monkeypatch.setattr(hub, "close", lambda: None)
    assert load(lvlm.source, "none").revision == commit  # a second start needs no network


def test_a_revision_can_be_named_in_two_ways(hub, model_files):
    first = hub.add("owner/tiny", model_files)
    second = hub.add("owner/tiny", model_files | {"note.txt": b"x"})
    assert load("owner/tiny", "none", revision=first).revision == first
    assert load(f"owner/tiny@{first}", "none").revision == first
    assert load("owner/tiny", "none").revision == second


def test_weights_are_not_fetched_when_they_would_not_fit(hub, model_files, monkeypatch):
    hub.add("owner/tiny", model_files)
    monkeypatch.setattr("safety.memory.free_memory", lambda device: [1])
    with pytest.raises(UserError, match="owner/tiny needs about"):
        load("owner/tiny", "none")
    assert "model.safetensors" not in hub.fetched and "config.json" in hub.fetched


def test_what_the_hub_refuses_is_said_in_a_sentence(hub, model_files):
    hub.add("owner/pickled", {name: data for name, data in model_files.items() if not name.endswith(".safetensors")}
            | {"pytorch_model.bin": b"pickle"})
    hub.add("owner/gated", model_files)
    hub.gated.add("owner/gated")
    for name, revision, message in (("owner/missing", None, "is not on the Hugging Face Hub, or it is private"),
                                    ("owner/gated", None, "is gated: accept its terms at https://"),
                                    ("owner/pickled", "v9", "has no revision 'v9'"),
                                    ("owner/pickled", None, "no safetensors weights"),
                                    ("a/b/c", None, "neither a folder here nor a Hugging Face id")):
        with pytest.raises(UserError, match=message):
            load(name, "none", revision)
    assert "pytorch_model.bin" not in hub.fetched


def test_offline_is_said_in_a_sentence(hub, model_files, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="owner/tiny is not in the cache"):
        load("owner/tiny", "none")


def test_artifacts_go_to_the_hub_and_come_back(hub, lvlm, folder):
    (folder / "curves.png").write_bytes(b"picture")
    (folder / "notes.pkl").write_bytes(b"pickle")
    assert push(folder, "me/tiny-safety", private=True) == f"{hub.url}/me/tiny-safety"
    assert hub.private["me/tiny-safety"]
    stored = hub.repos["me/tiny-safety"][-1]
    assert set(stored) == {"config.json", CARD, "curves.png", "sasa.safetensors", "revision.safetensors",
                           "sapt.safetensors", "trace.safetensors"}
    pulled = pull("me/tiny-safety")
    assert load_artifacts(lvlm, pulled).settings == random_artifacts(lvlm).settings
    push(folder, "me/tiny-safety")  # a second time, into what is there
    assert hub.repos["me/tiny-safety"][-1] == stored


def test_the_card_says_what_it_is_for_and_what_was_measured(hub, folder):
    push(folder, "me/tiny-safety")
    text = (folder / CARD).read_text()
    data = huggingface_hub.ModelCard(text).data.to_dict()
    assert data["license"] == "apache-2.0" and "safety" in data["tags"] and "base_model" not in data
    for expected in ("# Safety artifacts for tiny", "| blocks | 6 |", "| number format | float32 |",
                     "| sapt | interval | 5 |", "| sasa validation_auroc 2-4 | 0.875 |",
                     "| all | typographic | 7 of 9 |", "artifacts pull me/tiny-safety", "## Limits"):
        assert expected in text
    (folder / CARD).write_text("my own words")
    push(folder, "me/tiny-safety")
    assert hub.repos["me/tiny-safety"][-1][CARD] == b"my own words"
    (folder / CARD).write_text(f"{MARK} old")
    edit(folder, lambda config: config["fingerprint"].update(model="owner/model"))
    push(folder, "me/tiny-safety")
    assert huggingface_hub.ModelCard((folder / CARD).read_text()).data.base_model == "owner/model"


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_damaged_artifacts_are_not_pushed(hub, folder):
    (folder / "sapt.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="does not match its checksum"):
        push(folder, "me/tiny-safety")
    assert not hub.repos


def test_what_comes_from_the_hub_is_not_trusted(hub, folder):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    extra = {"evil.pkl": b"pickle", "code.py": b"boom", "more.safetensors": b"x", "sub/x.md": b""}
    hub.add("evil/extra", files | extra)
    assert {path.name for path in pull("evil/extra").rglob("*")} == set(files) == set(hub.fetched)
    hub.add("evil/changed", files | {"trace.safetensors": files["sapt.safetensors"]})
    hub.add("evil/missing", {name: data for name, data in files.items() if name != "trace.safetensors"})
    hub.add("evil/nothing", {"README.md": b"hello"})
    for name, message in (("evil/changed", "does not match its checksum"), ("evil/missing", "incomplete"),
                          ("evil/nothing", "missing"), ("evil/absent", "is not on the Hugging Face Hub")):
        with pytest.raises(UserError, match=message):
            pull(name)


def test_pushing_needs_a_login(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"answered 401 for me/tiny-safety. Log in with `hf auth login`"):
        push(folder, "me/tiny-safety")
