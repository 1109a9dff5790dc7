"""Whole models from folders as the Hub has them: real processors, no torchvision, answers as generate() has them."""

import importlib.util
import json
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from PIL import Image
from tiny import TEMPLATE, byte_tokenizer, random_artifacts

from safety.engine import Engine
from safety.errors import UserError
from safety.loading import load
from safety.settings import Lane, Revision, Sapt, Sasa

SQUARE = {"height": 28, "width": 28}
PINS = [[28, 28], [28, 56]]
NORM = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
QWEN = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 3136, "patch_size": 14,
        "temporal_patch_size": 2, "merge_size": 2, **NORM}
CROPPED = {"size": {"shortest_edge": 28}, "crop_size": SQUARE, **NORM}
SPLIT_OFF = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 56}, "do_image_splitting": False, **NORM}

# family: (preprocessor_config.json, processor_config.json, what stands for a picture in the chat template)
FILES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "LLaVA-1.5": ({"image_processor_type": "CLIPImageProcessor", **CROPPED},
                  {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
                  "<image>"),
    "LLaVA-NeXT": ({"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINS, **CROPPED},
                   {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
                   "<image>"),
    "LLaVA-OneVision": ({"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": PINS,
                         "size": SQUARE, **NORM},
                        {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}, "<image>"),
    "Qwen2-VL": (QWEN, {}, "<vs><image><ve>"),
    "Qwen2.5-VL": (QWEN, {}, "<vs><image><ve>"),
    "Qwen3-VL": (QWEN, {}, "<vs><image><ve>"),
    "InternVL": ({"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 56, "width": 56}, **NORM},
                 {"image_seq_length": 4}, "<image>"),
    "DeepSeek-VL": ({"image_processor_type": "DeepseekVLImageProcessor", "size": SQUARE, **NORM},
                    {"num_image_tokens": 4}, "<image>"),
    "Idefics3": ({"image_processor_type": "Idefics3ImageProcessor", **SPLIT_OFF}, {"image_seq_len": 4}, "<image>"),
    "SmolVLM": ({"image_processor_type": "SmolVLMImageProcessor", **SPLIT_OFF}, {"image_seq_len": 4}, "<image>"),
    "Gemma 3": ({"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 56, "width": 56}, **NORM},
                {"image_seq_length": 4}, "<boi>"),
}
TOKENS = {"image_token": "<image>", "context_image_token": "<image>", "start_image_token": "<vs>",
          "end_image_token": "<ve>", "boi_token": "<boi>", "eoi_token": "<eoi>",
          "video_token": "<video>"}


def save(family, folder):
    """A folder with the family's tiny model and what its processor is made from."""
    model = build(family).model
    model.resize_token_embeddings(280)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.15)
    for key, value in (("vision_start_token_id", "<vs>"), ("vision_end_token_id", "<ve>"), ("boi_token_index", "<boi>"),
                       ("eoi_token_index", "<eoi>")):
        if hasattr(model.config, key):
            setattr(model.config, key, tokenizer().convert_tokens_to_ids(value))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "extra_special_tokens": TOKENS}))
    images, processor, placeholder = FILES[family]
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<image>", placeholder))


def tokenizer():
    fast = byte_tokenizer()
    fast.add_tokens(["<vs>", "<ve>", "<boi>", "<eoi>", "<video>"], special_tokens=True)
    return fast


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_as_the_hub_has_it_answers_as_generate_does(family, tmp_path):
    if family == "SmolVLM" and importlib.util.find_spec("num2words") is None:
        save(family, tmp_path)
        with pytest.raises(UserError, match=r"needs a package that is not installed: .*num2words"):
            load(str(tmp_path), "none")
        return
    save(family, tmp_path)
    lvlm = load(str(tmp_path), "none")
    lvlm.eos_ids = frozenset()
    lanes = [Lane("none"), Lane("sasa", sasa=Sasa(2, 4, threshold=1.0)), Lane("revision", revision=Revision(3, 20.0)),
             Lane("sapt", sapt=Sapt(0.0, 3))]
    picture = Image.effect_noise((60, 50), 80).convert("RGB")
    tokens: list[list[int]] = [[] for _ in lanes]
    events = []
    for step in Engine(lvlm, random_artifacts(lvlm)).stream("Hi", picture, lanes=lanes, max_new_tokens=6):
        tokens[step.lane].append(step.token_id)
        events += [event.type for event in step.events]
    inputs = lvlm.prepare("Hi", picture, 6)
    assert (inputs["input_ids"] == 3).sum() >= 4 and "pixel_values" in inputs  # the picture is really in there
    with torch.inference_mode():
        found = lvlm.model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert tokens[0] == tokens[1] == found[0, inputs["input_ids"].shape[1]:].tolist()
    assert tokens[2] != tokens[0] and {"gate", "injection"} <= set(events)
