"""Text-only safety alignment of the miniature's language model: refuse harmful requests, answer all others.

Cross-entropy on answer tokens, LoRA on every linear layer of the decoder. Harmful requests get refusals; benign
twins, which share their words and forms, and ordinary requests get the base model's own answers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from safety.mini import corpus
from safety.mini.answers import answer_all
from safety.mini.base import chat, load_base_lm, load_tokenizer
from safety.mini.lora import add_lora, lora_state
from safety.mini.packing import PLAIN_ATTENTION
from safety.quantize import fast_dtype

LORA_FILE = "text_lora.safetensors"
CHECKPOINT = "align_checkpoint.pt"
GROUP = 8  # examples run at once


@dataclass(frozen=True)
class AlignSettings:
    """Recipe of the alignment; ``share`` is the mix of each batch by kind of request."""

    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 4e-4
    warmup: int = 20
    seed: int = 0
    public_ordinary: int = 1350
    save_every: int = 40
    share: tuple[float, float, float] = (0.38, 0.34, 0.28)  # harmful, benign twins, ordinary and public benign


@dataclass(frozen=True)
class Example:
    """One tokenised turn: ``ids`` with the answer starting at ``start``."""

    ids: list[int]
    start: int


def encode(tokenizer: Any, prompt: str, answer: str, limit: int = 48) -> Example:
    """Tokenise one turn, at most ``limit`` answer tokens: the first ones decide whether the model answers or refuses.

    An answer that is cut, or that stops in the middle of a list, gets no end token.
    """
    start_ids = tokenizer(chat(tokenizer, prompt)).input_ids
    answer_ids = tokenizer(answer).input_ids
    if len(re.findall(r"^\d+\. ", answer, flags=re.MULTILINE)) != 1:
        answer_ids = [*answer_ids, tokenizer.eos_token_id]
    return Example([*start_ids, *answer_ids[:limit]], len(start_ids))


def _public_benign(data_dir: Path | None, count: int) -> list[corpus.Row]:
    rows = corpus.public_rows(data_dir) if data_dir else []
    short = [row for row in rows if row.label == "benign" and len(row.text) < 200]
    return random.Random(0).sample(short, min(count, len(short)))


def training_prompts(data_dir: Path | None, settings: AlignSettings) -> list[tuple[str, bool]]:
    """Every benign (prompt, wants a list) pair whose answer the training uses."""
    own = [(row.text, row.form == "list") for row in corpus.benign("train")]
    return own + [(row.text, False) for row in _public_benign(data_dir, settings.public_ordinary)]


def build_pools(
    tokenizer: Any, answers: dict[str, str], data_dir: Path | None, settings: AlignSettings
) -> list[list[Example]]:
    """Tokenised examples in three pools: harmful, benign twins, ordinary."""
    rng = random.Random(settings.seed)
    bad = corpus.harmful("train")
    if data_dir:
        bad += [row for row in corpus.public_rows(data_dir) if row.label == "harmful"]
    ordinary = [row for row in corpus.benign("train") if row.kind == "ordinary"]
    ordinary += _public_benign(data_dir, settings.public_ordinary)
    pools = [[encode(tokenizer, row.text, corpus.refusal(row, rng)) for row in bad]]
    for rows in (corpus.twins("train"), ordinary):
        pools.append([encode(tokenizer, row.text, answers[row.text]) for row in rows if row.text in answers])
    return pools


def batches(pools: Sequence[Sequence[Example]], settings: AlignSettings) -> Iterator[list[Example]]:
    """Endless batches that hold each pool's share; each pool is reshuffled when it is used up."""
    rng = random.Random(settings.seed)

    def endless(pool: Sequence[Example]) -> Iterator[Example]:
        while True:
            yield from rng.sample(pool, len(pool))

    streams = [endless(pool) for pool in pools]
    while True:
        kinds = rng.choices(range(len(pools)), weights=settings.share, k=settings.batch_size)
        yield [next(streams[kind]) for kind in kinds]


def answer_loss(model: Any, examples: Sequence[Example], pad_id: int) -> torch.Tensor:
    """Mean cross-entropy over the answer tokens of all examples.

    They are run in groups of similar length: far less padding than in one ragged batch.
    """
    ordered = sorted(examples, key=lambda example: len(example.ids))
    sums = [_summed_loss(model, ordered[i : i + GROUP], pad_id) for i in range(0, len(ordered), GROUP)]
    return torch.stack(sums).sum() / sum(len(example.ids) - example.start for example in examples)


def _summed_loss(model: Any, examples: Sequence[Example], pad_id: int) -> torch.Tensor:
    """Summed cross-entropy of one group; logits are computed at the answer tokens only."""
    device = model.device
    # A few lengths only: oneDNN compiles its kernels anew for every shape it meets.
    length = -(-max(len(example.ids) for example in examples) // 16) * 16
    ids = torch.full((len(examples), length), pad_id)
    target = torch.zeros(len(examples), length, dtype=torch.bool)
    for row, example in enumerate(examples):
        count = len(example.ids)
        ids[row, :count] = torch.tensor(example.ids)
        target[row, example.start : count] = True
    ids, target = ids.to(device), target.to(device)
    # Padding comes last, so looking back only is enough to keep it out of sight.
    mask = torch.full((1, 1, length, length), torch.finfo(model.dtype).min, dtype=model.dtype, device=device).triu(1)
    hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][target[:, 1:]])
    return nn.functional.cross_entropy(logits.float(), ids[:, 1:][target[:, 1:]], reduction="sum")


def _rate(step: int, settings: AlignSettings) -> float:
    """Learning-rate factor: linear warm-up, then linear decay to zero."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    return max(0.0, (settings.steps - step) / (settings.steps - settings.warmup))


def align(
    work_dir: Path | str,
    data_dir: Path | str | None = None,
    settings: AlignSettings | None = None,
    device: str = "cpu",
) -> Path:
    """Align the base language model and return the LoRA file; resumes from its checkpoint after an interruption.

    Args:
        work_dir: folder for answers, checkpoint, log and result.
        data_dir: folder with the public CSV files of ``corpus.public_rows``; without it only the own corpus is used. A
            checkpoint of other rows or settings is not resumed from.
        settings: the recipe; defaults to ``AlignSettings()``.
        device: "cpu" or "cuda".
    """
    settings = settings or AlignSettings()
    work, data = Path(work_dir), Path(data_dir) if data_dir else None
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer()
    model = load_base_lm(fast_dtype(device)).to(device)
    at_once = 64 if device == "cpu" else 512  # a GPU answers both numbers in about the same time
    answers = answer_all(model, tokenizer, training_prompts(data, settings), work / "answers.jsonl", at_once)
    public = "\n".join(row.text for row in corpus.public_rows(data)) if data else ""
    recipe = json.dumps([asdict(settings), hashlib.sha256(public.encode()).hexdigest()])
    torch.manual_seed(settings.seed)
    model.set_attn_implementation(PLAIN_ATTENTION)
    parameters = add_lora(model.get_decoder())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    first = 0
    checkpoint = work / CHECKPOINT
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if saved["recipe"] == recipe:
            first = saved["step"]
            optimizer.load_state_dict(saved["optimizer"])
            with torch.no_grad():
                for parameter, value in zip(parameters, saved["parameters"], strict=True):
                    parameter.copy_(value)
    pools = build_pools(tokenizer, answers, data, settings)
    stream = itertools.islice(batches(pools, settings), first, settings.steps)
    model.train()
    with (work / "align.log").open("a") as log, tqdm(total=settings.steps, initial=first, desc="Aligning") as bar:
        for step, examples in enumerate(stream, first):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _rate(step, settings)
            loss = answer_loss(model, examples, tokenizer.pad_token_id)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            print(json.dumps({"step": step, "loss": round(loss.item(), 4)}), file=log, flush=True)
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                save_file(lora_state(model.get_decoder()), work / LORA_FILE)
                state = {
                    "step": step + 1,
                    "recipe": recipe,
                    "optimizer": optimizer.state_dict(),
                    "parameters": [parameter.detach().clone() for parameter in parameters],
                }
                torch.save(state, checkpoint.with_suffix(".part"))
                checkpoint.with_suffix(".part").replace(checkpoint)
    return work / LORA_FILE
