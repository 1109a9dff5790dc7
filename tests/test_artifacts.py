"""Artifacts: saved and loaded as they were, and refused with a reason when they do not fit."""

import hashlib
import json

import pytest
import safetensors.torch
import torch
from tiny import random_artifacts, tiny_llava

from safety.artifacts import artifact_folders, load_artifacts, save_artifacts
from safety.errors import UserError
from safety.parts import LayersArtifact
from safety.settings import Lane, Sapt, Sasa


@pytest.fixture(scope="module")
def lvlm():
    return tiny_llava()


@pytest.fixture
def folder(lvlm, tmp_path):
    save_artifacts(random_artifacts(lvlm), lvlm, tmp_path)
    return tmp_path


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_saved_artifacts_come_back_equal(lvlm, folder):
    before, after = random_artifacts(lvlm), load_artifacts(lvlm, folder)
    assert after.settings == before.settings and after.about == before.about
    assert after.sasa.pairs == before.sasa.pairs == [(1, 3), (2, 4)]
    assert torch.equal(after.sasa.probes[1, 3].weight, before.sasa.probes[1, 3].weight)
    assert torch.equal(after.sasa.clean.bias, before.sasa.clean.bias)
    assert all(torch.equal(after.revision.vectors[name], v) for name, v in before.revision.vectors.items())
    assert torch.equal(after.sapt.soft, before.sapt.soft)
    assert torch.equal(after.sapt.detectors["frozen"].weight, before.sapt.detectors["frozen"].weight)
    assert after.trace.threshold == before.trace.threshold


@pytest.mark.parametrize("name", ["sasa.safetensors", "revision.safetensors", "sapt.safetensors", "trace.safetensors"])
def test_a_flipped_byte_or_a_missing_file_is_noticed(lvlm, folder, name):
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{name} does not match its checksum"):
        load_artifacts(lvlm, folder)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_artifacts(lvlm, folder)


def test_another_model_is_named(lvlm, folder):
    with pytest.raises(UserError, match="blocks is 6 there and 7 here"):
        load_artifacts(tiny_llava(layers=7), folder)


def test_another_revision_is_named_with_the_flag_that_loads_it(lvlm, folder):
    edit_config(folder, lambda config: config["fingerprint"].update(revision="a" * 40))
    with pytest.raises(UserError, match=r"is 'a{40}' there and '' here\. Load that one with --revision a{40}, or"):
        load_artifacts(lvlm, folder)
    edit_config(folder, lambda config: config["fingerprint"].update(revision="digest"))
    with pytest.raises(UserError, match="Load that model, or"):
        load_artifacts(lvlm, folder)


def resign(folder, name, change):
    """Change a tensor file and its checksum with it: the content itself must be checked too."""
    tensors = safetensors.torch.load_file(folder / name)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / name)
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    edit_config(folder, lambda config: config["files"].__setitem__(name, digest))


def test_infinite_values_and_wrong_shapes_are_refused(lvlm, folder):
    resign(folder, "sapt.safetensors", lambda t: t["soft"].__setitem__((0, 0), float("nan")))
    with pytest.raises(UserError, match="not finite in 'soft'"):
        load_artifacts(lvlm, folder)
    resign(folder, "sapt.safetensors", lambda t: t.__setitem__("soft", torch.zeros(3, 65)))
    with pytest.raises(UserError, match=r"'soft' has shape \(3, 65\)"):
        load_artifacts(lvlm, folder)


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.update({"clean.threshold": torch.tensor([0.5, 0.5])}), "damaged"),
    (lambda t: t.update({"clean.threshold": torch.tensor([7.0])}), "clean.threshold must lie between 0 and 1"),
    (lambda t: t.update({f"90-99.{kind}": t[f"clean.{kind}"].clone() for kind in ("weight", "bias")}),
     "SASA safety layer must be between")])
def test_what_a_run_would_stumble_over_is_refused_when_it_is_read(lvlm, folder, change, message):
    resign(folder, "sasa.safetensors", change)
    with pytest.raises(UserError, match=message):
        load_artifacts(lvlm, folder)


def test_a_file_of_another_kind_with_the_right_checksum_is_refused(lvlm, folder):
    (folder / "trace.safetensors").write_text("no tensors")
    digest = hashlib.sha256(b"no tensors").hexdigest()
    edit_config(folder, lambda config: config["files"].__setitem__("trace.safetensors", digest))
    with pytest.raises(UserError, match="is not a safetensors file"):
        load_artifacts(lvlm, folder)


@pytest.mark.parametrize("change", [
    lambda c: c.pop("fingerprint"), lambda c: c.update(files=7), lambda c: c["settings"].update(sapt={"cheese": 1}),
    lambda c: c["settings"]["sapt"].update(threshold="high"), lambda c: c["settings"]["revision"].update(layer=77),
    lambda c: c["settings"].pop("sapt"), lambda c: c.update(format=99),
    lambda c: c["files"].pop("sapt.safetensors"), lambda c: c["files"].pop("trace.safetensors"),
    lambda c: c["files"].__setitem__("../../etc/passwd", "0"),
    lambda c: c["files"].__setitem__("./sasa.safetensors", c["files"].pop("sasa.safetensors")),
    lambda c: c.update(about=["a"]), lambda c: c.update(trace_threshold="high"), lambda c: c.pop("settings"),
    lambda c: c.update(trace_threshold=float("nan")), lambda c: c.update(trace_threshold=7),
    lambda c: c["settings"]["sapt"].update(end_check="off"), lambda c: c["settings"]["sapt"].update(interval=4.0)])
def test_a_tampered_config_is_refused(lvlm, folder, change):
    edit_config(folder, change)
    with pytest.raises(UserError):
        load_artifacts(lvlm, folder)


def test_a_config_that_is_not_json_and_a_missing_folder_are_refused(lvlm, folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_artifacts(lvlm, folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="damaged"):
        load_artifacts(lvlm, folder)
    with pytest.raises(UserError, match="missing"):
        load_artifacts(lvlm, folder / "nowhere")


def test_standard_lanes(lvlm):
    artifacts = random_artifacts(lvlm)
    none, everything = artifacts.standard_lanes("none, all")
    assert none == Lane("none")
    assert (everything.sasa, everything.revision, everything.sapt) == (
        artifacts.settings.sasa, artifacts.settings.revision, artifacts.settings.sapt)
    for names, message in (("", "at least one"), ("none,none", "different names"), ("none,magic", "'magic'")):
        with pytest.raises(UserError, match=message):
            artifacts.standard_lanes(names)


def test_lanes_that_the_artifacts_cannot_serve_are_refused(lvlm):
    artifacts = random_artifacts(lvlm)
    artifacts.sapt.detectors.pop("frozen")
    with pytest.raises(UserError, match="no 'frozen' detector"):
        artifacts.check(Lane("l", sapt=Sapt(detector="frozen")), lvlm.blocks)
    with pytest.raises(UserError, match="no probe for the layers 0 and 1"):
        artifacts.check(Lane("l", sasa=Sasa(0, 1)), lvlm.blocks)
    artifacts.sasa = None
    with pytest.raises(UserError, match="no artifacts"):
        artifacts.check(Lane("l", sasa=Sasa(1, 3)), lvlm.blocks)


def test_probes_of_every_block_are_optional_and_checked(lvlm, folder):
    assert load_artifacts(lvlm, folder).layers is None
    artifacts = random_artifacts(lvlm)
    artifacts.layers = LayersArtifact(torch.randn(6, 64), torch.randn(6), torch.rand(6))
    save_artifacts(artifacts, lvlm, folder)
    after = load_artifacts(lvlm, folder).layers
    assert torch.equal(after.weight, artifacts.layers.weight) and torch.equal(after.auroc, artifacts.layers.auroc)
    resign(folder, "layers.safetensors", lambda t: t.__setitem__("bias", torch.zeros(7)))
    with pytest.raises(UserError, match=r"'bias' has shape \(7,\)"):
        load_artifacts(lvlm, folder)


def test_saving_again_removes_parts_that_are_gone_and_leaves_other_files_alone(lvlm, folder):
    (folder / "curves.png").write_bytes(b"picture")
    artifacts = random_artifacts(lvlm)
    artifacts.sapt = artifacts.settings.sapt = None
    save_artifacts(artifacts, lvlm, folder)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "curves.png", "sasa.safetensors", "revision.safetensors", "trace.safetensors"}
    assert load_artifacts(lvlm, folder).sapt is None


def test_folders_that_fit_come_first_and_the_others_say_why_not(lvlm, tmp_path):
    save_artifacts(random_artifacts(lvlm), lvlm, tmp_path / "z" / "mine")
    other = tiny_llava(layers=7)
    save_artifacts(random_artifacts(other), other, tmp_path / "a")
    for name in ("broken", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llava"}')
    first, second = artifact_folders(lvlm, tmp_path)
    assert (first.folder, first.reason) == (tmp_path / "z" / "mine", "")
    assert second.folder == tmp_path / "a" and "blocks is 7 there and 6 here" in second.reason
    assert artifact_folders(lvlm, tmp_path / "z" / "mine") == [first]  # the root itself
    assert ("miniature", "defenses") in [found.folder.parts[-2:] for found in artifact_folders(lvlm)]


def test_without_a_folder_the_usual_place_is_looked_in(lvlm, tmp_path, monkeypatch):
    monkeypatch.setattr("safety.artifacts.SHIPPED", tmp_path)
    assert load_artifacts(lvlm).sasa is None
    save_artifacts(random_artifacts(lvlm), lvlm, tmp_path / "tiny" / "defenses")
    assert load_artifacts(lvlm).sasa.pairs == [(1, 3), (2, 4)]
