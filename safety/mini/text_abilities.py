"""Text abilities of a model: what it refuses, what it answers, on requests and words that training never saw.

Refusal is judged by ``safety.refusal`` on greedy answers. Rates come with Wilson 95 % intervals.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from safety.mini import corpus
from safety.mini.base import chat
from safety.refusal import refusal_start
from safety.statistics import rate

MAX_NEW_TOKENS = 40


@torch.inference_mode()
def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS, batch_size: int = 32
) -> list[str]:
    """Greedy text-only answers in the order of the prompts, computed in batches of similar length."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), desc="Answering", leave=False):
        chosen = order[start : start + batch_size]
        chats = [chat(tokenizer, prompts[index]) for index in chosen]
        batch = tokenizer(chats, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        output = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
    return answers


def looks_degenerate(text: str) -> bool:
    """Whether a text is empty, almost without letters, or repeats itself."""
    words = re.findall(r"[a-z']+", text.lower())
    if len(words) < 3:
        return len(text.strip()) < 2
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(triples) > 10 and len(set(triples)) < 0.6 * len(triples)


def text_sets(data_dir: Path | str | None, limit: int | None = None) -> dict[str, list[str]]:
    """The evaluation prompts by set name: the corpus's held-out split, and the development files that are present.

    Args:
        data_dir: folder with harmful_val.csv, harmbench_val.csv, xstest_dev.csv, figstep_dev.csv, harmless_val.csv.
        limit: at most this many prompts of each set, drawn with a fixed seed.
    """
    sets = {
        "heldout_harmful": [row.text for row in corpus.harmful("heldout")],
        "heldout_twins": [row.text for row in corpus.twins("heldout")],
        "heldout_ordinary": [row.text for row in corpus.benign("heldout") if row.kind == "ordinary"],
    }

    def column(name: str, key: str, **where: str) -> list[str]:
        path = Path(data_dir or "") / name
        if data_dir is None or not path.exists():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return [row[key] for row in csv.DictReader(file) if all(row[k] == v for k, v in where.items())]

    sets["harmful_val"] = column("harmful_val.csv", "instruction")
    sets["harmbench_val"] = column("harmbench_val.csv", "Behavior")
    sets["xstest_unsafe"] = column("xstest_dev.csv", "prompt", label="unsafe")
    sets["xstest_safe"] = column("xstest_dev.csv", "prompt", label="safe")
    sets["figstep_instruction"] = column("figstep_dev.csv", "instruction", split="eval")
    sets["figstep_question"] = column("figstep_dev.csv", "question", split="eval")
    sets["harmless_val"] = column("harmless_val.csv", "instruction")[:150]
    rng = random.Random(0)
    chosen = {name: rng.sample(texts, min(limit or len(texts), len(texts))) for name, texts in sets.items()}
    return {name: texts for name, texts in chosen.items() if texts}


def text_abilities(
    model: Any,
    tokenizer: Any,
    data_dir: Path | str | None = None,
    limit: int | None = None,
    transcript: dict[str, list[tuple[str, str]]] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict[str, dict[str, Any]]:
    """Refusal rate and share of degenerate answers on every set of ``text_sets``.

    Args:
        model: a causal language model, or LLaVA without an image.
        tokenizer: its tokenizer with the project's chat template.
        data_dir: see ``text_sets``.
        limit: at most this many prompts of each set.
        transcript: receives (prompt, answer) pairs by set, when given.
        max_new_tokens: length of the answers; refusals show within 16.

    Returns:
        {set: {"refused": rate(...), "degenerate": share}}
    """
    sets = text_sets(data_dir, limit)
    prompts = [text for texts in sets.values() for text in texts]
    answers = iter(greedy_answers(model, tokenizer, prompts, max_new_tokens))
    report: dict[str, dict[str, Any]] = {}
    for name, texts in sets.items():
        pairs = [(text, next(answers)) for text in texts]
        refused = sum(refusal_start(answer) is not None for _, answer in pairs)
        report[name] = {
            "refused": rate(refused, len(pairs)),
            "degenerate": sum(looks_degenerate(answer) for _, answer in pairs) / len(pairs),
        }
        if transcript is not None:
            transcript[name] = pairs
    return report
