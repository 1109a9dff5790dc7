"""Every supported family's real architecture, tiny and randomly initialised, with the tensors of one request."""

from types import SimpleNamespace
from typing import Any

import torch
from tiny import byte_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText

from safety.lvlm import LVLM

IMAGE = 3  # the image placeholder's token
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 260, "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "max_position_embeddings": 512, "tie_word_embeddings": False}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": 28, "patch_size": 14, "projection_dim": 32}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


def _grid(patch: int, temporal: int = 2) -> dict[str, torch.Tensor]:
    """Pixels of one 4 x 4-patch image as the Qwen processors flatten them: 4 image tokens after merging."""
    return {"pixel_values": torch.randn(16, 3 * temporal * patch * patch), "image_grid_thw": torch.tensor([[1, 4, 4]])}


# name: (model type, configuration, number of image tokens, pixel tensors)
FAMILIES: dict[str, tuple[str, dict[str, Any], int, dict[str, torch.Tensor]]] = {
    "LLaVA-1.5": ("llava", {"text_config": {"model_type": "llama", **TEXT}, "vision_config": CLIP,
                            "image_token_index": IMAGE, "vision_feature_layer": -2}, 4,
                  {"pixel_values": torch.randn(1, 3, 28, 28)}),
    "LLaVA-NeXT": ("llava_next", {"text_config": {"model_type": "llama", **TEXT}, "vision_config": CLIP,
                                  "image_token_index": IMAGE, "image_grid_pinpoints": [[28, 28], [28, 56]],
                                  "vision_feature_layer": -2}, 10,
                   {"pixel_values": torch.randn(1, 2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])}),
    "LLaVA-OneVision": ("llava_onevision", {"text_config": {"model_type": "qwen2", **TEXT}, "vision_config": SIGLIP,
                                            "image_token_index": IMAGE, "image_grid_pinpoints": [[28, 28], [28, 56]],
                                            "vision_feature_layer": -1}, 10,
                        {"pixel_values": torch.randn(1, 2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]]),
                         "batch_num_images": torch.tensor([1])}),
    "Qwen2-VL": ("qwen2_vl", {"text_config": {"model_type": "qwen2_vl_text", **TEXT, "rope_parameters": MROPE},
                              "vision_config": {"embed_dim": 32, "hidden_size": 64, "depth": 2, "num_heads": 4,
                                                "patch_size": 14}, "image_token_id": IMAGE,
                              "vision_start_token_id": 5, "video_token_id": 6, "vision_end_token_id": 7}, 4, _grid(14)),
    "Qwen2.5-VL": ("qwen2_5_vl", {"text_config": {"model_type": "qwen2_5_vl_text", **TEXT, "rope_parameters": MROPE},
                                  "vision_config": {"hidden_size": 32, "out_hidden_size": 64, "depth": 2,
                                                    "num_heads": 4, "patch_size": 14, "intermediate_size": 64,
                                                    "fullatt_block_indexes": [1]}, "image_token_id": IMAGE,
                                  "vision_start_token_id": 5, "video_token_id": 6, "vision_end_token_id": 7}, 4,
                   _grid(14)),
    "Qwen3-VL": ("qwen3_vl", {"text_config": {"model_type": "qwen3_vl_text", **TEXT, "head_dim": 16,
                                              "rope_parameters": {**MROPE, "mrope_interleaved": True}},
                              "vision_config": {"hidden_size": 32, "out_hidden_size": 64, "depth": 3, "num_heads": 4,
                                                "patch_size": 14, "intermediate_size": 64,
                                                "deepstack_visual_indexes": [0, 1],
                                                "num_position_embeddings": 16}, "image_token_id": IMAGE,
                              "vision_start_token_id": 5, "video_token_id": 6, "vision_end_token_id": 7}, 4, _grid(14)),
    "InternVL": ("internvl", {"text_config": {"model_type": "qwen2", **TEXT},
                              "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                                                "num_attention_heads": 4, "image_size": [56, 56],
                                                "patch_size": [14, 14]}, "image_token_id": IMAGE}, 4,
                 {"pixel_values": torch.randn(1, 3, 56, 56)}),
    "DeepSeek-VL": ("deepseek_vl", {"text_config": {"model_type": "llama", **TEXT}, "vision_config": SIGLIP,
                                    "image_token_id": IMAGE}, 4, {"pixel_values": torch.randn(1, 3, 28, 28)}),
    "Idefics3": ("idefics3", {"text_config": {"model_type": "llama", **TEXT},
                              "vision_config": {**CLIP, "model_type": "idefics3_vision", "image_size": 56},
                              "image_token_id": IMAGE, "scale_factor": 2}, 4,
                 {"pixel_values": torch.randn(1, 1, 3, 56, 56)}),
    "SmolVLM": ("smolvlm", {"text_config": {"model_type": "llama", **TEXT},
                            "vision_config": {**CLIP, "model_type": "smolvlm_vision", "image_size": 56},
                            "image_token_id": IMAGE, "scale_factor": 2}, 4,
                {"pixel_values": torch.randn(1, 1, 3, 56, 56)}),
    "Gemma 3": ("gemma3", {"text_config": {"model_type": "gemma3_text", **TEXT, "head_dim": 16, "sliding_window": 16,
                                           "query_pre_attn_scalar": 16}, "vision_config": {**SIGLIP, "image_size": 56},
                           "image_token_id": IMAGE, "mm_tokens_per_image": 4}, 4,
                {"pixel_values": torch.randn(1, 3, 56, 56)}),
}


class FamilyLVLM(LVLM):
    """A tiny model whose request tensors are made by hand: the processors need files from the hub."""

    pixels: dict[str, torch.Tensor]
    image_tokens: int

    def prepare(self, prompt: str, image: object, room: int) -> dict[str, torch.Tensor]:
        """Image tokens, if there is an image, and the prompt's bytes."""
        text = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[1, *([5] + [IMAGE] * self.image_tokens + [7] if image else []), *text]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if image:
            inputs |= self.pixels
            if "image_grid_thw" in self.pixels:
                inputs["mm_token_type_ids"] = (ids == IMAGE).long()
            if self.config.model_type == "gemma3_text":
                inputs["token_type_ids"] = (ids == IMAGE).long()
        return inputs


def build(name: str) -> FamilyLVLM:
    """The family's model in fp32 with random weights."""
    model_type, settings, image_tokens, pixels = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    lvlm = FamilyLVLM(name, model, SimpleNamespace(tokenizer=byte_tokenizer(), chat_template="", image_token="<image>"))
    lvlm.pixels, lvlm.image_tokens = pixels, image_tokens
    return lvlm
