"""Tiny random models of real architectures, with processors and artifacts, for tests of the logic. No downloads."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from safety.artifacts import Artifacts, RevisionArtifact, SaptArtifact, SasaArtifact, Settings, TraceArtifact
from safety.detector import Probe
from safety.lvlm import LVLM
from safety.settings import Revision, Sapt, Sasa

SPECIAL = ["<pad>", "<bos>", "<eos>", "<image>"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} bot:{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that every text can be said and read back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>",
                                   eos_token="<eos>", extra_special_tokens={"image_token": "<image>"})
    return fast


def tiny_llava(seed: int = 0, layers: int = 6, width: int = 64, heads: int = 4) -> LVLM:
    """LLaVA with 6 Llama blocks of width 64, 4 query and 2 key/value heads, 4 image tokens; fp32."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                              image_size=28, patch_size=14)
    text = LlamaConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=2, vocab_size=len(SPECIAL) + 256,
                       eos_token_id=2, bos_token_id=1, pad_token_id=0, initializer_range=0.15)
    config = LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=3,
                         vision_feature_layer=-2, image_seq_length=4)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = 2
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(image_processor=images, tokenizer=byte_tokenizer(), patch_size=14,
                               vision_feature_select_strategy="default", num_additional_image_tokens=1,
                               chat_template=TEMPLATE)
    return LVLM("tiny", model, processor)


def random_artifacts(lvlm: LVLM, seed: int = 1) -> Artifacts:
    """Artifacts of random numbers that fit the model."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def probe(features: int) -> Probe:
        return Probe(draw(features) / features**0.5, draw(())).to(lvlm.device)

    blocks, heads, dim, width = lvlm.blocks, lvlm.heads, lvlm.head_dim, lvlm.width
    shapes = {"layer": (blocks, width), "head": (blocks, heads, dim)}
    vectors = {f"{level}_{kind}": draw(*shape) for level, shape in shapes.items() for kind in ("mms", "pwd")}
    scales = {f"{level}_{kind}": draw(*shape[:-1]).abs() for level, shape in shapes.items() for kind in ("mms", "pwd")}
    artifacts = Artifacts(
        sasa=SasaArtifact({(1, 3): probe(lvlm.vocabulary), (2, 4): probe(lvlm.vocabulary)}, probe(lvlm.vocabulary)),
        revision=RevisionArtifact(vectors, scales, draw(blocks, heads).abs()),
        sapt=SaptArtifact(draw(3, width).to(lvlm.device), {"joint": probe(width), "frozen": probe(width)}),
        trace=TraceArtifact(probe(width), 0.5),
        settings=Settings(Sasa(2, 4), Revision(3, alpha=0.5), Sapt(interval=5, threshold=0.5)),
        about={"recipe": "random numbers"},
    )
    assert artifacts.sasa is not None
    artifacts.sasa.reading = probe(4 * width)  # last: the numbers before it do not depend on its size
    return artifacts
