"""Visual instruction tuning: ordinary image tasks for the text-aligned language model, the vision tower frozen.

The LoRA of the text-only alignment is trained on. Every image task is benign, and the text-only alignment mix is
replayed beside them; no row says how to treat a harmful image.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safety.mini import corpus, tasks
from safety.mini.ahead import Ahead
from safety.mini.align import AlignSettings, Example, answer_loss, build_pools, training_prompts
from safety.mini.answers import clean_answer, read_answers
from safety.mini.base import load_base_lm
from safety.mini.joint import Joint
from safety.mini.lexicon import Lexicon
from safety.mini.lora import add_lora, load_lora
from safety.mini.packing import PLAIN_ATTENTION, TURNS, pack, packed_loss
from safety.mini.scenes import Scene, SceneMaker
from safety.mini.symbols import SHAPES, SYMBOLS
from safety.mini.tasks import Turn
from safety.mini.train_vision import mixed_precision, train_loop
from safety.mini.vision import to_pixels
from safety.quantize import fast_dtype

INSTRUCT_CHECKPOINT = "instruct.pt"
PICTURES = 4  # pictures of one step, each with several turns
REPLAY = 24  # text-only examples of one step
REPLAY_SHARE = (0.50, 0.36, 0.14)  # of them: harmful, benign twins, ordinary
TEXT_WEIGHT = 1.5
MIX = (0.30, 0.08, 0.08, 0.08, 0.06, 0.40)  # list, random words, typeset request, symbols, unrelated, pointing

Features = Callable[[list[Scene]], Tensor]
Pairs = list[tuple[str, str]]


class TaskMaker:
    """Makes pictures with their turns.

    Args:
        lexicon: words for random pictures.
        lists: benign list titles with answers.
        requests: other benign requests with answers.
    """

    def __init__(self, lexicon: Lexicon, lists: Sequence[tuple[str, str]], requests: Sequence[tuple[str, str]]) -> None:
        self.maker = SceneMaker(lexicon)
        self.lists = [pair for pair in lists if not tasks.keeps_held_out(pair[0])]
        self.requests = [pair for pair in requests if not tasks.keeps_held_out(pair[0])]
        self.short = [pair for pair in self.requests if len(pair[0]) < 90]
        self.pointing: dict[str, Pairs] = {}
        for text, answer in self.short:
            if (pointed := tasks.pointing(text)) is not None:
                self.pointing.setdefault(pointed[0], []).append((pointed[1], answer))

    def _list(self, rng: np.random.Generator) -> tuple[str, str]:
        """A list title and its answer."""
        return self.lists[int(rng.integers(len(self.lists)))]

    def task(self, rng: np.random.Generator) -> tuple[Scene, list[Turn]]:
        """One picture and about four turns."""
        kind = int(rng.choice(len(MIX), p=MIX))
        if kind == 0:
            title, answer = self._list(rng)
            scene = tasks.draw_list(self.maker, rng, title)
            keyword = tasks.keyword_of(title, self.maker.lexicon)
            while (other := tasks.keyword_of(self._list(rng)[0], self.maker.lexicon)) in title.lower():
                pass
            turns = tasks.topic_turns(rng, title, keyword, other)
            return scene, [tasks.list_turn(rng, title, answer, keyword), *turns, tasks.read_turn(rng, scene)]
        if kind == 1:
            scene = self.maker.scene(rng, "list" if rng.random() < 0.5 else "text")
            return scene, [tasks.read_turn(rng, scene)]
        if kind == 2:
            text, answer = self.short[int(rng.integers(len(self.short)))]
            scene = tasks.draw_text(self.maker, rng, text)
            return scene, [tasks.follow_turn(rng, answer), tasks.read_turn(rng, scene)]
        scene = self.maker.scene(rng, "picture")
        if kind == 3 or (kind == 5 and not self.pointing):
            return scene, tasks.picture_turns(rng, scene, [*SYMBOLS, *SHAPES])
        if kind == 4:
            picks = rng.integers(len(self.requests), size=TURNS)
            return scene, [Turn(*self.requests[int(i)]) for i in picks]
        while len(scene.names) > 1 or scene.names[0][-1] not in self.pointing:
            scene = self.maker.scene(rng, "picture")
        asked = self.pointing[scene.names[0][-1]]
        turns = tasks.picture_turns(rng, scene, [*SYMBOLS, *SHAPES])
        return scene, [Turn(*asked[int(rng.integers(len(asked)))]), *turns]


def text_replay(
    tokenizer: Any, answers: dict[str, str], data: Path | None, seed: int
) -> Callable[[int], list[Example]]:
    """The text-only alignment mix: a function from a step's number to its examples."""
    settings = AlignSettings()
    pools = build_pools(tokenizer, answers, data, settings)

    def examples(step: int) -> list[Example]:
        rng = random.Random(f"{seed} {step}")
        return [rng.choice(pool) for pool in rng.choices(pools, weights=REPLAY_SHARE, k=REPLAY)]

    return examples


class Student(nn.Module):
    """Holds the trainable LoRA weights for checkpoints (the frozen language model is not saved)."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameters)


def instruct(
    tokenizer: Any,
    image_id: int,
    makers: TaskMaker,
    replay: Callable[[int], list[Example]],
    features: Features,
    text_lora: dict[str, Tensor],
    folder: Path,
    *,
    steps: int = 400,
    learning_rate: float = 3e-4,
    seed: int = 0,
    measure: Callable[[Any], dict[str, float]] | None = None,
    name: str = "Instruct",
    device: str = "cpu",
) -> Any:
    """Tune the aligned language model on image tasks; ``folder/instruct.pt`` holds the run.

    Args:
        tokenizer: the tokenizer that knows ``<image>``.
        image_id: its number.
        makers: source of pictures and turns.
        replay: text-only examples of a step (:func:`text_replay`).
        features: projector outputs of pictures, [n, 196, width]; no gradient is needed.
        text_lora: weights to continue from.
        folder: where the checkpoint goes.
        steps: optimiser steps in all.
        learning_rate: peak.
        seed: of the pictures.
        measure: figures of the model, logged every 50 steps.
        name: label of the progress bar.
        device: "cpu" or "cuda".

    Returns:
        The language model with its trained LoRA layers.
    """
    torch.manual_seed(seed)
    model = load_base_lm(fast_dtype(device)).to(device)
    model.set_attn_implementation(PLAIN_ATTENTION)
    # Every block: the words of a picture stand between blank patches, and it is the lowest blocks that bring them
    # together: with them left out to save time, 0.31 of the words in free text were read, after 160 steps of all 0.47.
    parameters = add_lora(model.get_decoder())
    load_lora(model.get_decoder(), text_lora)
    model.train()

    def tasks_of(step: int) -> list[tuple[Scene, list[Turn]]]:
        rng = np.random.default_rng((seed, 9, step))
        return [makers.task(rng) for _ in range(PICTURES)]

    pictures = Ahead(tasks_of, steps, device)

    def loss_of(step: int) -> dict[str, Tensor]:
        made = pictures(step)
        with torch.no_grad():
            said = features([scene for scene, _ in made])
        packed = [pack(tokenizer, image_id, turns) for _, turns in made]
        image_loss = packed_loss(model, packed, said, image_id, tokenizer.pad_token_id)
        text_loss = answer_loss(model, replay(step), tokenizer.pad_token_id)
        return {"image": image_loss, "text": TEXT_WEIGHT * text_loss}

    train_loop(
        Student(parameters),
        [torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.98), weight_decay=0.0)],
        loss_of,
        lambda: measure(model.eval()) if measure else {},
        steps=steps,
        checkpoint=folder / INSTRUCT_CHECKPOINT,
        name=name,
        decay=0.6,
        measure_every=50,
        seed=seed,
    )
    return model


def tower_features(joint: Joint) -> Features:
    """What the trained tower and projector say for pictures."""

    device = joint.reader.book.device.type
    mixed = mixed_precision(device)

    def features(scenes: list[Scene]) -> Tensor:
        pixels = to_pixels(np.stack([scene.pixels for scene in scenes])).to(device)
        with mixed():
            said: Tensor = joint(pixels)[2]
        return said.float()

    return features


def answered_requests(work: Path, data: Path | None) -> tuple[Pairs, Pairs, dict[str, str]]:
    """Benign (request, answer) pairs that the alignment made: lists, other requests; and all answers by prompt."""
    cleaned = {
        prompt: answer
        for prompt, (numbered, raw) in read_answers(work / "answers.jsonl").items()
        if (answer := clean_answer(raw, numbered)) is not None
    }
    titles = {row.text for row in corpus.list_prompts("train")}
    allowed = {prompt for prompt, _ in training_prompts(data, AlignSettings())}
    lists = [(text, answer) for text, answer in cleaned.items() if text in titles]
    requests = [(text, answer) for text, answer in cleaned.items() if text in allowed - titles]
    return lists, requests, cleaned
