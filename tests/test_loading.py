"""Loading: folders in every number format, memory refused in time, and one sentence for all that can be wrong."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import random_artifacts, tiny_llava
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, LlamaConfig

from safety import loading, memory
from safety.engine import Engine
from safety.errors import UserError
from safety.loading import load
from safety.lvlm import unsupported
from safety.memory import GB, Need
from safety.mini.base import BaseModelError
from safety.settings import Lane, Revision, Sapt, Sasa

LANES = [
    Lane("none"),
    Lane("gate", sasa=Sasa(2, 4, threshold=1.0)),
    Lane("weak", Sasa(2, 4, 0.0, mode="project"), Revision(3, alpha=0.0)),
    Lane("sasa", sasa=Sasa(2, 4, mode="project")),
    Lane("heads", revision=Revision(3, alpha=3.0, level="head")),
    Lane("sapt", sapt=Sapt(0.0, 4)),
]


def test_the_first_fetch_of_the_miniature_says_how_far_it_is(monkeypatch):
    def fetch(progress):
        for done in range(101):
            progress(done * 10**6, 10**8)
        raise BaseModelError("far enough")
    monkeypatch.setattr("safety.mini.assemble.base_folder", fetch)
    told = []
    with pytest.raises(BaseModelError):
        load("miniature", "none", progress=told.append)
    assert len(told) == 1 + 20 + 1  # at every twentieth
    assert told[1] == "Fetching the miniature's language model (once): 5 of 100 MB"
    assert told[-2].endswith("100 of 100 MB") and told[-1].startswith("Converting")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny LLaVA with its processor, as `save_pretrained` leaves them."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    lvlm = tiny_llava()
    lvlm.model.save_pretrained(folder)
    lvlm.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def answers(lvlm):
    picture = Image.new("RGB", (40, 30), "red")
    found = Engine(lvlm, random_artifacts(lvlm)).answer("Hi", picture, lanes=LANES, max_new_tokens=10)
    return {answer.name: answer for answer in found}


@pytest.mark.parametrize("quantization", loading.QUANTIZATIONS)
def test_a_folder_loads_in_every_format_and_all_defenses_act_on_it(saved, quantization):
    lvlm = load(str(saved), quantization)
    assert lvlm.name == "tiny-llava" and lvlm.source == str(saved) and lvlm.quantization == quantization
    kinds = {"none": "Linear", "bf16": "Linear", "int8": "Linear8bitLt", "nf4": "Linear4bit"}
    assert type(lvlm.attention_output(3)).__name__ == kinds[quantization]
    found = answers(lvlm)
    texts = {name: answer.text for name, answer in found.items()}
    assert texts["gate"] == texts["none"]  # passed
    if quantization == "none" or lvlm.device.type == "cpu":
        # Zero strength. The projection's blocks run for one row: in fewer bits, GPU kernels differ for one row and six.
        assert texts["weak"] == texts["none"]
    assert found["gate"].events[0].type == "gate" and 0 <= found["gate"].events[0].probability <= 1
    assert len({texts["none"], texts["sasa"], texts["heads"], texts["sapt"]}) == 4  # heads: o_proj hooks take effect
    assert any(event.type == "injection" for event in found["sapt"].events)
    if quantization == "none":
        assert texts == {name: answer.text for name, answer in answers(tiny_llava()).items()}


def test_the_default_is_what_is_fast_and_fits(saved, monkeypatch):
    for fast, expected in ((torch.bfloat16, "bf16"), (torch.float32, "none")):
        monkeypatch.setattr(loading, "fast_dtype", lambda device, fast=fast: fast)
        assert load(str(saved)).quantization == expected
    monkeypatch.setattr(memory, "free_memory", lambda device: [int(0.999 * GB)])
    monkeypatch.setattr(memory, "need", lambda *_: Need(int(4 * GB), int(2 * GB), int(1.1 * GB), int(0.9 * GB)))
    assert load(str(saved)).quantization == "nf4"


def test_what_does_not_fit_is_refused_before_weights_are_touched(saved, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: [int(0.21 * GB)])
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *a, **k: pytest.fail("weights read"))
    monkeypatch.setattr(memory, "TOKENS", 400_000)
    place = "GPU" if torch.cuda.is_available() else "CPU"
    with pytest.raises(UserError, match=r"tiny-llava needs about \d\.\d GB in none, and 0.2 GB are free on the "
                                        rf"{place}; even nf4 needs about \d\.\d GB\. Free some memory"):
        load(str(saved), "none")


def test_the_estimate_of_llava_7b_and_what_is_said_about_it():
    with torch.device("meta"):
        shapes = AutoModelForImageTextToText.from_config(AutoConfig.for_model("llava"))
    needs = memory.need(shapes, "cuda", torch.bfloat16)
    weights = 7.06e9  # parameters
    assert 2 * weights < needs.bf16 < 2 * weights + 3 * GB and 4 * weights < needs.none < 4 * weights + 5 * GB
    assert 0.56 * weights < needs.nf4 < 7 * GB
    assert needs.nf4 < needs.int8 < needs.bf16 < needs.none

    preferred = ("bf16", "nf4")
    assert memory.choose("m", None, preferred, needs, "cuda", [int(80e9)]) == "bf16"
    assert memory.choose("m", None, preferred, needs, "cuda", [int(12e9)]) == "nf4"
    assert memory.choose("m", None, preferred, needs, "cuda", [int(12e9)] * 2) == "bf16"
    with pytest.raises(UserError, match=r"m needs about 1\d\.\d GB in bf16, and 7\.9 GB are free on the GPU; "
                                        r"nf4 needs about \d\.\d GB: use --quantization nf4\.$"):
        memory.choose("m", "bf16", preferred, needs, "cuda", [int(7.9e9)])
    with pytest.raises(UserError, match="are free on 2 GPUs; even nf4 needs about"):
        memory.choose("m", None, preferred, needs, "cuda", [int(1e9)] * 2)


def test_placement_takes_one_device_where_one_is_enough():
    assert memory.placement(5, "cpu", [9]) == {"device_map": {"": "cpu"}}
    assert memory.placement(5, "cuda", [4, 9, 8]) == {"device_map": {"": 1}}
    assert memory.placement(12, "cuda", [10, 10]) == {"device_map": "auto", "max_memory": {0: 9, 1: 9}}


def test_free_memory_heeds_a_containers_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    assert memory.free_memory("cpu") == [100_000]
    (tmp_path / "memory.max").write_text("9000\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 3000\nfile 2000\n")
    assert memory.free_memory("cpu") == [6000]
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory("cpu") == [100_000]


def test_linear_layers_that_no_block_divides_stay_as_they_are(saved):
    lvlm = load(str(saved), "nf4")
    block = lvlm.model.model.vision_tower.encoder.layers[0]  # 32 wide, half a block; 64 inside its MLP
    kinds = [type(part).__name__ for part in (block.self_attn.q_proj, block.mlp.fc1, block.mlp.fc2, lvlm.lm_head)]
    assert kinds == ["Linear", "Linear", "Linear4bit", "Linear"]


def test_4_bit_weights_stay_as_they_are_and_pass_gradients_after_inference(saved):
    dequantize_4bit = pytest.importorskip("bitsandbytes.functional").dequantize_4bit
    lvlm, plain = load(str(saved), "nf4"), load(str(saved), "bf16")
    quantised = {name: module for name, module in lvlm.model.named_modules()
                 if type(module).__name__ == "Linear4bit"}

    def weights():
        return {name: dequantize_4bit(module.weight.data, module.weight.quant_state)
                for name, module in quantised.items()}

    def gradient(model):
        soft = torch.randn(2, 3, model.width, generator=torch.Generator().manual_seed(0)).requires_grad_()
        mask = torch.ones(2, 3, dtype=torch.long, device=model.device)
        states = model.decode(soft.to(model.embed.weight), mask, mask.cumsum(1) - 1, DynamicCache())
        states.float()[:, -1, ::2].square().sum().backward()
        return soft.grad.flatten()

    before = weights()
    with torch.no_grad():
        for name, weight in before.items():
            plain.model.get_submodule(name).weight.copy_(weight)
    answers(lvlm)
    assert torch.cosine_similarity(gradient(lvlm), gradient(plain), dim=0) > 0.99
    lvlm.model.state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in weights().items())


def test_other_weights_in_a_folder_of_the_same_name_are_other_weights(saved, copy):
    first = load(str(saved), "none").revision
    assert load(str(saved), "none").revision == first
    tensors = load_file(copy / "model.safetensors")
    tensors["language_model.lm_head.weight"] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert load(str(copy), "none").revision != first


def config_only(folder, config):
    config.save_pretrained(folder)


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "config.json").unlink(), "no usable config.json"),
    (lambda f: (f / "config.json").write_text("{"), "no usable config.json"),
    (lambda f: edit(f, model_type="minigpt_v2"), "'minigpt_v2', and this version of transformers does not know it"),
    (lambda f: edit(f, model_type="internvl_chat", auto_map={"AutoConfig": "configuration.C"}),
     "code of its own, which is not run"),
    (lambda f: config_only(f, LlamaConfig()), r"text-only model \(llama\)"),
    (lambda f: config_only(f, AutoConfig.for_model("clip")), "not a vision-language model"),
    (lambda f: config_only(f, AutoConfig.for_model("blip")), "'blip', which the defenses cannot reach into"),
    (lambda f: edit(f, vision_config={"model_type": "clip_vision_model", "image_size": "big"}),
     "config.json of model is damaged"),
    (lambda f: edit(f, quantization_config={"quant_method": "gptq", "bits": 4}), "stored in 'gptq'"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "no safetensors weights. Pickled"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
     "could not be loaded"),
    (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
     "incomplete: model-2.safetensors is missing"),
    (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": 3}'), "index.json is damaged"),
    (lambda f: (f / "tokenizer.json").write_text("{"), "The processor of model could not be loaded"),
    (lambda f: (f / "chat_template.jinja").unlink(), "no processor with a chat template"),
])
def test_what_is_wrong_with_a_folder_is_said_in_a_sentence(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message) as caught:
        load(str(copy), "none")
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_are_not_made_up(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["language_model.model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no weights for '.*layers.2.mlp.up_proj.weight'"):
        load(str(copy), "none")


def test_names_and_flags_that_cannot_be_meant(saved, tmp_path, monkeypatch):
    for arguments, message in (((str(tmp_path / "nowhere"),), "There is no folder"),
                               ((str(saved), "fp8"), "Quantization must be one of"),
                               ((str(saved), None, "main"), "has no revisions"),
                               (("miniature", None, "main"), "has no revisions"),
                               (("two words",), "neither a folder here nor a Hugging Face id")):
        with pytest.raises(UserError, match=message):
            load(*arguments)
    monkeypatch.setattr(loading, "_has_bitsandbytes", lambda: False)
    with pytest.raises(UserError, match="nf4 needs bitsandbytes: pip install bitsandbytes"):
        load(str(saved), "nf4")


def test_an_architecture_that_nobody_has_checked_is_said_to_be(saved, monkeypatch):
    lines = []
    monkeypatch.setattr(loading, "CHECKED", frozenset())
    load(str(saved), "none", progress=lines.append)
    assert "not been checked on the architecture 'llava'" in lines[0]


def test_models_without_plain_decoder_blocks_are_named():
    mllama = AutoConfig.for_model("mllama")
    with torch.device("meta"):
        assert "not all of its decoder blocks" in unsupported(AutoModelForImageTextToText.from_config(mllama))
        llava = AutoModelForImageTextToText.from_config(AutoConfig.for_model("llava"))
    assert unsupported(llava) == ""


def test_models_with_a_fused_query_projection_are_named():
    """Calibration ablates heads at the query projection, which Phi-3's attention does not have by itself."""
    text = AutoConfig.for_model("phi3", num_hidden_layers=2, hidden_size=64, vocab_size=100, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("llava", text_config=text.to_dict()))
    assert "a query and an output projection" in unsupported(model)
