"""Artifacts shared: listed, and revision vectors carried from one model to another of its shape."""

import json

import pytest
import torch
from tiny import random_artifacts, tiny_llava

from safety import __main__ as cli
from safety.artifacts import Artifacts, load_artifacts, read_config, save_artifacts, transfer_revision
from safety.engine import Engine
from safety.errors import UserError
from safety.settings import Lane


@pytest.fixture(scope="module")
def here():
    return tiny_llava(seed=1)


@pytest.fixture
def source(tmp_path):
    """Artifacts of another model of the same shape."""
    other = tiny_llava(seed=0)
    other.name, other.revision = "other/model", "abc"
    artifacts = random_artifacts(other, seed=5)
    artifacts.about["revision"] = {"pairs": 33}
    save_artifacts(artifacts, other, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def command(here, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_load", lambda arguments: here)

    def run(*flags: object) -> tuple[int, str, str]:
        status = cli.main(["artifacts", *map(str, flags)])
        return status, *capsys.readouterr()
    return run


def test_transferred_vectors_act_and_say_where_they_are_from(here, source, tmp_path):
    mine = random_artifacts(here, seed=2)
    mine.about["held_out"] = {"all": {}}
    both = transfer_revision(source, here, mine)
    theirs = random_artifacts(here, seed=5)
    assert torch.equal(both.revision.vectors["head_mms"], theirs.revision.vectors["head_mms"])
    assert torch.equal(both.sasa.clean.weight, mine.sasa.clean.weight)  # everything else is the model's own
    origin = both.about["revision"]
    assert origin["transferred_from"]["model"] == "other/model" and origin["transferred_from"]["revision"] == "abc"
    assert origin["pairs"] == 33 and "held_out" not in both.about and "held_out" in mine.about
    save_artifacts(both, here, tmp_path / "out")
    again = load_artifacts(here, tmp_path / "out")
    assert again.about["revision"] == origin
    strong = Lane("strong", revision=type(again.settings.revision)(3, alpha=4.0))
    none, moved = Engine(here, again).answer("Hi", lanes=[Lane("none"), strong], max_new_tokens=8)
    assert none.text != moved.text


@pytest.mark.parametrize("shape, message", [
    ({"layers": 7}, "blocks is 6 there and 7 here"), ({"width": 128}, "width is 64 there and 128 here"),
    ({"heads": 2}, "heads is 4 there and 2 here; head_dim is 16 there and 32 here")])
def test_vectors_of_another_shape_are_refused_with_the_reason(source, shape, message):
    with pytest.raises(UserError, match=message):
        transfer_revision(source, tiny_llava(**shape), Artifacts())


def test_nothing_is_transferred_from_damaged_artifacts_or_from_none(here, source):
    data = bytearray((source / "revision.safetensors").read_bytes())
    data[-1] ^= 1
    (source / "revision.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="does not match its checksum"):
        transfer_revision(source, here, Artifacts())
    config = json.loads((source / "config.json").read_text())
    del config["files"]["revision.safetensors"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no revision vectors to transfer"):
        transfer_revision(source, here, Artifacts())


def test_the_commands_list_and_transfer(command, here, source, tmp_path):
    status, out, _ = command("list", tmp_path)
    assert status == 1 and "does not fit" in out and "model is 'other/model' there and 'tiny' here" in out
    status, _, err = command("transfer", source, "--out", source)
    assert status == 2 and "the folder that the vectors come from" in err
    assert command("transfer", source, "--out", tmp_path / "mine")[0] == 0
    assert load_artifacts(here, tmp_path / "mine").revision is not None
    status, out, _ = command("list", tmp_path)
    assert status == 0 and out.startswith(f"fits  {tmp_path / 'mine'}\n")
    (tmp_path / "empty").mkdir()
    assert command("list", tmp_path / "empty")[1] == f"There are no artifacts in {tmp_path / 'empty'}.\n"


def test_the_commands_push_and_pull(command, source, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("safety.share.push", lambda *arguments: seen.append(arguments) or "https://address")
    monkeypatch.setattr("safety.share.pull", lambda *arguments: seen.append(arguments) or source)
    monkeypatch.setattr("safety.share.SHIPPED", tmp_path / "artifacts")
    assert command("push", "folder", "me/it", "--private")[1] == "https://address\n"
    folder = tmp_path / "artifacts" / "model" / "me--it"
    for _ in range(2):  # again: in place of what is there
        assert command("pull", "me/it", "--revision", "v1")[1] == f"{folder}\n"
    assert read_config(folder) == read_config(source)
    seen.pop()
    assert [str(argument) for arguments in seen for argument in arguments] == ["folder", "me/it", "True", "me/it", "v1"]


@pytest.mark.parametrize("model", ["", "..", "a/.."])
def test_pulled_artifacts_stay_in_their_folder(command, source, monkeypatch, tmp_path, model):
    config = json.loads((source / "config.json").read_text())
    config["fingerprint"]["model"] = model
    (source / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("safety.share.pull", lambda *arguments: source)
    monkeypatch.setattr("safety.share.SHIPPED", tmp_path / "artifacts")
    status, _, err = command("pull", "me/it")
    assert status == 2 and "do not say which model" in err and not (tmp_path / "artifacts").exists()
