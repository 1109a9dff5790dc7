"""A loaded vision-language model and the names of its parts. The one file that knows architectures.

Everything else speaks of *blocks* (decoder layers, counted from 0), the *norm* behind the last of them, the output
embedding and the prompt's prefill; where those live in a Hugging Face model is decided here.
"""

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
# Architectures on which every defense has been compared with an oracle (tests/families.py). To add one: an entry there,
# its name here, and in this module whatever that test shows to be different.
CHECKED = frozenset({"llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl",
                     "deepseek_vl", "idefics3", "smolvlm", "gemma3"})


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
    """A loaded model, its processor and the names of its parts. `lock` serialises runs: hooks are model state.

    Attributes:
        source: what it was loaded from (a hub id, a folder, "miniature"); "" for a model that was made in memory.
        revision: the commit or digest of its weights.
    """

    name: str
    model: Any  # a transformers model; its parts are reached by name, which types cannot follow
    processor: Any
    quantization: str = "none"
    revision: str = ""
    source: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        self.open(self.model)
        self.tokenizer = self.processor.tokenizer
        self.config = self.model.config.get_text_config()
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
        dtype = str(self.embed.weight.dtype).rpartition(".")[2]
        self.number_format: str = self.quantization if self.quantization != "none" else dtype
        eos = self.model.generation_config.eos_token_id
        eos = eos if eos is not None else self.tokenizer.eos_token_id
        self.eos_ids: frozenset[int] = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
        added = self.tokenizer.added_tokens_decoder.values()
        special = [*map(str, self.tokenizer.all_special_tokens), *(token.content for token in added if token.special)]
        image_token = getattr(self.processor, "image_token", None)
        self.markers = sorted({*special, *([image_token] if image_token else [])} - {""})

    @property
    def label(self) -> str:
        """For people: model, number format and device."""
        return f"{self.name} · {self.number_format} · {self.device.type}"

    def open(self, model: Any) -> None:
        """Take a model's parts into use: when it is new, or loaded again after `close`."""
        self.model = model.eval()
        self.decoder: Any = model.get_decoder()
        self.layers: Any = self.decoder.layers
        self.embed: Any = model.get_input_embeddings()
        self.lm_head: Any = model.get_output_embeddings()
        self.device = self.embed.weight.device  # inputs go here; accelerate carries states to the other devices

    @property
    def closed(self) -> bool:
        """Has the model been let go of?"""
        return self.model is None

    def close(self) -> None:
        """Let go of the model, so that its memory can be freed. The caller holds `lock`; nothing runs until `open`."""
        self.model = self.decoder = self.layers = self.embed = self.lm_head = None

    def attention_output(self, block: int) -> Any:
        """The output projection of a block's attention; its input is [batch, positions, heads * head_dim]."""
        return self.layers[block].self_attn.o_proj

    def query_projection(self, block: int) -> Any:
        """The query projection of a block's attention; its output is [batch, positions, heads * head_dim]."""
        return self.layers[block].self_attn.q_proj

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

    @contextmanager
    def encoding_once(self) -> Iterator[None]:
        """Inside, what the vision tower made of a picture is kept until the same pixels are asked for a second time.
        The caller holds `lock`."""
        base = self.model.base_model
        kept: list[tuple[Any, Any]] = []
        encode = getattr(base, "get_image_features", None)  # so called in every family of transformers
        if encode is None:
            yield
            return

        def once(*args: Any, **kwargs: Any) -> Any:
            for place, (asked, features) in enumerate(kept):
                if _same(asked, (args, kwargs)):
                    del kept[place]
                    return features
            kept.append(((args, kwargs), encode(*args, **kwargs)))
            return kept[-1][1]
        base.get_image_features = once
        try:
            yield
        finally:
            del base.get_image_features

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
            output = self.model.base_model(**inputs, cache=cache, use_cache=True)
        length = inputs["input_ids"].shape[1]
        deltas = getattr(self.model.base_model, "rope_deltas", None)
        return Trunk(cache, output.last_hidden_state[0, -1], states, block_kwargs, decoder_kwargs, length,
                     0 if deltas is None else int(deltas.flatten()[0]), int(inputs["input_ids"][0, -1]))

    @torch.inference_mode()
    def rerun_decoder(self, trunk: Trunk, cache: DynamicCache) -> Tensor:
        """Run the whole decoder on a prompt's embeddings again, filling `cache`; [width] post-norm last state."""
        kwargs = {**trunk.decoder_kwargs, "cache": cache, "use_cache": True}
        return self.decoder(**kwargs).last_hidden_state[0, -1]

    @torch.inference_mode()
    def rerun_blocks(self, trunk: Trunk, first: int, states: Tensor) -> Tensor:
        """Run blocks first..last on other prompt states [1, n, width]; returns [width], post-norm, last position."""
        cache = DynamicCache()
        for block in range(first, self.blocks):
            states = self.run_block(block, states, trunk.block_kwargs[block], cache)
        return self.decoder.norm(states[:, -1:])[0, 0]

    def run_block(self, block: int, states: Tensor, kwargs: dict[str, Any], cache: DynamicCache) -> Tensor:
        """One block on states [rows, n, width] with what the decoder passed to it, but keys and values to `cache`.

        Raises:
            UserError: they went elsewhere, as the installed transformers calls it by another name.
        """
        states = self.layers[block](states, **{**kwargs, "cache": cache})
        if not cache.get_seq_length(block):
            raise UserError("The installed transformers gives a decoder block its cache in a way not known here: "
                            "SASA would be wrong. Install the versions that requirements.txt names.")
        return states

    def decode(self, embeds: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """One decoder step. embeds [rows, q, width], mask [rows, cached + q] (1 = visible), positions [rows, q];
        returns post-norm states [rows, q, width] and extends `cache` by q columns. Gradients pass through."""
        masks = self._windowed(mask, embeds) if self.window and mask.shape[1] > self.window else mask
        return self.decoder(inputs_embeds=embeds, attention_mask=masks, position_ids=positions, cache=cache,
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


def _same(one: Any, other: Any) -> bool:
    """Are two values, tensors or containers of them equal?"""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.dtype == other.dtype and torch.equal(one, other))
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def unsupported(model: Any) -> str:
    """Why a transformers model, on whatever device, cannot be an LVLM here; "" if it can."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not layers or not hasattr(decoder, "norm"):
        return "it has no plain stack of decoder blocks with a norm behind it"
    if not all(hasattr(getattr(layer, "self_attn", None), name) for layer in layers for name in ("q_proj", "o_proj")):
        return "not all of its decoder blocks are self-attention with a query and an output projection"
    if model.get_output_embeddings() is None:
        return "it has no output embedding"
    return ""


@contextmanager
def hooks() -> Iterator[Callable[[RemovableHandle], None]]:
    """Collect hook handles and remove every one of them on the way out, whatever happens."""
    handles: list[RemovableHandle] = []
    try:
        yield handles.append
    finally:
        for handle in handles:
            handle.remove()
