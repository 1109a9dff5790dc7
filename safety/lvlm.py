"""Load a vision-language model and name its parts. The one file that knows architectures.

Everything else speaks of *blocks* (decoder layers, counted from 0), the *norm* behind the last of them, the output
embedding and the prompt's prefill; where those live in a Hugging Face model is decided here.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from safety.errors import UserError
from safety.inputs import check_prompt

MINIATURE = "miniature"
QUANTIZATIONS = ("none", "bf16", "int8", "nf4")


@dataclass
class Trunk:
    """What one clean prefill of a prompt leaves behind, at batch 1.

    Attributes:
        cache: keys and values of all n prompt positions.
        hidden: [width] post-norm state at the last position.
        states: {block: [1, n, width]} outputs of the tapped blocks.
        block_kwargs: {block: what the decoder passed to it}, to re-run blocks on other states.
        decoder_kwargs: what the model passed to its decoder (inputs_embeds [1, n, width] and so on), to run the
            whole decoder again without encoding the image a second time.
        length: n. offset: rotary position of a token minus its index (M-RoPE models squeeze images).
        last_id: the last prompt token.
    """

    cache: DynamicCache
    hidden: Tensor
    states: dict[int, Tensor]
    block_kwargs: dict[int, dict[str, Any]]
    decoder_kwargs: dict[str, Any]
    length: int
    offset: int
    last_id: int


@dataclass
class LVLM:
    """A loaded model, its processor and the names of its parts. `lock` serialises runs: hooks are model state."""

    name: str
    model: Any  # a transformers model; its parts are reached by name, which types cannot follow
    processor: Any
    quantization: str = "none"
    revision: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        self.model.eval()
        self.tokenizer = self.processor.tokenizer
        self.config = self.model.config.get_text_config()
        self.decoder = self.model.get_decoder()
        self.layers: Any = self.decoder.layers
        self.embed: Any = self.model.get_input_embeddings()
        self.lm_head: Any = self.model.get_output_embeddings()
        self.blocks: int = self.config.num_hidden_layers
        self.width: int = self.config.hidden_size
        self.heads: int = self.config.num_attention_heads
        self.head_dim: int = getattr(self.config, "head_dim", None) or self.width // self.heads
        self.vocabulary: int = self.lm_head.out_features
        self.context: int = self.config.max_position_embeddings
        mixed = "sliding_attention" in (getattr(self.config, "layer_types", None) or [])
        self.window: int = self.config.sliding_window if mixed else 0
        # DeepStack models (Qwen3-VL) add image features behind their first blocks: SASA cannot re-run those alone.
        vision = getattr(self.model.config, "vision_config", None)
        self.deepstack: int = len(getattr(vision, "deepstack_visual_indexes", None) or [])
        self.device = self.embed.weight.device
        eos = self.model.generation_config.eos_token_id
        eos = eos if eos is not None else self.tokenizer.eos_token_id
        self.eos_ids: frozenset[int] = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
        special = [str(token) for token in self.tokenizer.all_special_tokens]
        image_token = getattr(self.processor, "image_token", None)
        self.markers = sorted({*special, *([image_token] if image_token else [])} - {""})

    @property
    def label(self) -> str:
        """For people: model, number format and device."""
        number = self.quantization if self.quantization != "none" else str(self.embed.weight.dtype).rpartition(".")[2]
        return f"{self.name} · {number} · {self.device.type}"

    def attention_output(self, block: int) -> Any:
        """The output projection of a block's attention; its input is [batch, positions, heads * head_dim]."""
        return self.layers[block].self_attn.o_proj

    def prepare(self, prompt: str, image: Image.Image | None, room: int) -> dict[str, Tensor]:
        """Chat template, tokens and pixels of one request, on the model's device.

        Args:
            room: tokens that must still fit behind the prompt.

        Raises:
            UserError: an empty, too long or marker-carrying prompt.
        """
        content: list[dict[str, Any]] = [{"type": "image"}] if image is not None else []
        content.append({"type": "text", "text": check_prompt(prompt, self.markers)})
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = {"images": image} if image is not None else {}
        inputs = self.processor(text=text, return_tensors="pt", **images).to(self.device)
        length = inputs["input_ids"].shape[1]
        if length + room > self.context:
            raise UserError(f"The prompt takes {length} tokens and the answer may take {room}, but {self.name} holds "
                            f"{self.context}. Shorten the prompt or the answer.")
        return dict(inputs)

    @torch.inference_mode()
    def prefill(self, inputs: dict[str, Tensor], taps: set[int]) -> Trunk:
        """Encode the image and run the prompt once. `taps`: the blocks whose outputs are kept."""
        states: dict[int, Tensor] = {}
        block_kwargs: dict[int, dict[str, Any]] = {}
        decoder_kwargs: dict[str, Any] = {}

        def keep_block(block: int) -> Callable[..., None]:
            return lambda module, args, kwargs: block_kwargs.__setitem__(block, dict(kwargs))

        def keep_state(block: int) -> Callable[..., None]:
            return lambda module, args, output: states.__setitem__(block, output)

        cache = DynamicCache()
        if getattr(self.model.base_model, "rope_deltas", None) is not None:
            self.model.base_model.rope_deltas = None  # M-RoPE models remember the last prompt's; a text prompt has none
        with hooks() as add:
            add(self.decoder.register_forward_pre_hook(
                lambda module, args, kwargs: decoder_kwargs.update(kwargs), with_kwargs=True))
            if taps:
                for block in range(min(taps) + 1, self.blocks):
                    add(self.layers[block].register_forward_pre_hook(keep_block(block), with_kwargs=True))
            for block in taps:
                add(self.layers[block].register_forward_hook(keep_state(block)))
            output = self.model.base_model(**inputs, past_key_values=cache, use_cache=True)
        length = inputs["input_ids"].shape[1]
        deltas = getattr(self.model.base_model, "rope_deltas", None)
        return Trunk(cache, output.last_hidden_state[0, -1], states, block_kwargs, decoder_kwargs, length,
                     0 if deltas is None else int(deltas.flatten()[0]), int(inputs["input_ids"][0, -1]))

    @torch.inference_mode()
    def rerun_decoder(self, trunk: Trunk, cache: DynamicCache) -> Tensor:
        """Run the whole decoder on a prompt's embeddings again, filling `cache`; [width] post-norm last state."""
        kwargs = {**trunk.decoder_kwargs, "past_key_values": cache, "use_cache": True}
        return self.decoder(**kwargs).last_hidden_state[0, -1]

    @torch.inference_mode()
    def rerun_blocks(self, trunk: Trunk, first: int, states: Tensor) -> Tensor:
        """Run blocks first..last on other prompt states [1, n, width]; returns [width], post-norm, last position."""
        cache = DynamicCache()
        for block in range(first, self.blocks):
            states = self.layers[block](states, **{**trunk.block_kwargs[block], "past_key_values": cache})
        return self.decoder.norm(states[:, -1:])[0, 0]

    @torch.inference_mode()
    def decode(self, embeds: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """One decoder step. embeds [rows, q, width], mask [rows, cached + q] (1 = visible), positions [rows, q];
        returns post-norm states [rows, q, width] and extends `cache` by q columns."""
        masks = self._windowed(mask, embeds) if self.window and mask.shape[1] > self.window else mask
        return self.decoder(inputs_embeds=embeds, attention_mask=masks, position_ids=positions, past_key_values=cache,
                            use_cache=True).last_hidden_state

    def _windowed(self, mask: Tensor, embeds: Tensor) -> dict[str, Tensor]:
        """Additive masks [rows, 1, q, cached + q] for decoders that mix full and sliding attention.

        transformers would measure the window in cache columns; here rows have columns that they do not see, so it is
        measured in the tokens that a row does see.
        """
        columns, queries = mask.shape[1], embeds.shape[1]
        place = mask.cumsum(1)
        asked, held = place[:, -queries:, None], place[:, None]
        causal = torch.ones(queries, columns, dtype=torch.bool, device=mask.device).tril(columns - queries)
        full = causal & mask[:, None].bool()
        masks = {"full_attention": full, "sliding_attention": full & (asked - held < self.window)}
        least = torch.finfo(embeds.dtype).min
        return {kind: torch.where(seen, 0.0, least).to(embeds.dtype)[:, None] for kind, seen in masks.items()}

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits, fp32 [..., vocabulary], of post-norm states [..., width]."""
        return self.lm_head(hidden).float()

    def text(self, ids: list[int]) -> str:
        """Plain text of generated tokens; control tokens are left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@contextmanager
def hooks() -> Iterator[Callable[[RemovableHandle], None]]:
    """Collect hook handles and remove every one of them on the way out, whatever happens."""
    handles: list[RemovableHandle] = []
    try:
        yield handles.append
    finally:
        for handle in handles:
            handle.remove()


def load(name: str = MINIATURE, quantization: str | None = None,
         progress: Callable[[str], None] = lambda message: None) -> LVLM:
    """Load an LVLM by name: the miniature, or a Hugging Face hub id or folder.

    Args:
        quantization: "none" (fp32 on CPU), "bf16", "int8", "nf4"; None chooses what is fastest here.
        progress: called with a sentence at each stage.

    Raises:
        UserError: unknown quantization, unknown model, or nothing to load it from.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise UserError(f"Quantization must be one of {', '.join(QUANTIZATIONS)}, but it is {quantization!r}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name == MINIATURE:
        return _load_miniature(quantization, device, progress)
    return _load_hub(name, quantization or ("nf4" if device == "cuda" else "none"), progress)


def _load_miniature(quantization: str | None, device: str, progress: Callable[[str], None]) -> LVLM:
    from safety.mini.assemble import ARTIFACT, CONFIG, load_miniature
    from safety.quantize import Int8Linear, int8_is_faster, quantize_linears
    if quantization is None:
        quantization = "bf16" if device == "cuda" else "int8" if int8_is_faster() else "none"
    if quantization == "nf4" or (quantization == "int8" and device == "cuda"):
        raise UserError(f"The miniature is too small for {quantization} on {device}. "
                        "Use --quantization none or bf16, or int8 on a CPU.")
    progress("Loading the miniature LVLM …")
    model, processor = load_miniature(torch.bfloat16 if quantization == "bf16" else torch.float32, device)
    if quantization == "int8":
        quantize_linears(model.get_decoder())
        model.lm_head = Int8Linear(model.lm_head)
    files = json.loads((ARTIFACT / CONFIG).read_text())["files"]
    revision = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    return LVLM(MINIATURE, model, processor, quantization, revision)


def _load_hub(name: str, quantization: str, progress: Callable[[str], None]) -> LVLM:
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
    settings: dict[str, Any] = {"dtype": torch.float32 if quantization == "none" else torch.bfloat16}
    if quantization == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    elif quantization == "int8":
        settings["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    progress(f"Loading {name} ({quantization}) …")
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, device_map="auto", **settings)
    except (OSError, ValueError) as error:
        raise UserError(f"The model {name!r} could not be loaded: {str(error).splitlines()[0]} "
                        f"Give a Hugging Face id, a folder, or {MINIATURE!r}.") from error
    return LVLM(name, model, processor, quantization, getattr(model.config, "_commit_hash", None) or "")
