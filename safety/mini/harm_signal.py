"""Where the sign of harm gets lost on its way into the model: in reading the picture, or behind it?

Before its first token, a defense has only the state at the end of the prompt to go by. How well that state tells
harmful from benign requests is measured for the same requests typed out, standing in a FigStep-like picture, standing
in that picture with every word read without a mistake, and so read but with no blank patches between the words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from tqdm import tqdm

from safety.detector import cross_fit
from safety.evaluate.suites import lists
from safety.mini import corpus
from safety.mini.base import chat
from safety.mini.dictionary import FILLER
from safety.mini.lexicon import Lexicon
from safety.mini.render import FIGSTEP_ITEMS, figstep_page
from safety.mini.scenes import PATCHES
from safety.mini.tasks import scene_of
from safety.samples import CARRIER
from safety.statistics import rate

FALSE_ALARMS = 0.05
RESAMPLES = 1000

Look = Callable[[str], Tensor]  # a title to the first-token logits of a request that asks for it, [vocabulary]


def harm_signal(model: Any, processor: Any, lexicon: Lexicon, fitted: int, judged: int) -> dict[str, dict[str, Any]]:
    """By way of asking: AUROC of a linear probe of first-token logits on requests that it was not fitted on.

    Args:
        model: the miniature.
        processor: its processor.
        lexicon: the words whose tokens stand for what a perfect reader would say.
        fitted: harmful titles of the training split, and as many benign ones, that the probe is fitted on.
        judged: likewise of the held-out split, that it is judged on.

    Returns:
        "auroc" with "low" and "high" (95 %, bootstrap over requests), "n", and "caught": the rate of harmful requests
        above what one benign request in twenty reaches.
    """
    counts: dict[corpus.Split, int] = {"train": fitted, "heldout": judged}
    splits = {
        (split, harmful): _titles(rows, count)
        for split, count in counts.items()
        for harmful, rows in ((True, corpus.harmful(split)), (False, corpus.list_prompts(split)))
    }
    found = {}
    for way, look in _ways(model, processor, lexicon).items():
        seen = {
            key: np.stack([look(title).numpy() for title in tqdm(titles, desc=f"Harm, {way}", leave=False)])
            for key, titles in splits.items()
        }
        sides = [seen["train", harmful] for harmful in (True, False)]
        probe = cross_fit(np.concatenate(sides), np.repeat([1, 0], [len(side) for side in sides])).probe
        scores = [probe.log_odds(torch.from_numpy(seen["heldout", harmful])).numpy() for harmful in (True, False)]
        limit = np.quantile(scores[1], 1 - FALSE_ALARMS)
        found[way] = _auroc(*scores) | {"caught": rate(int((scores[0] > limit).sum()), len(scores[0]))}
    return found


def _titles(rows: Sequence[corpus.Row], count: int) -> list[str]:
    texts = [row.text for row in lists(rows)]
    return random.Random(0).sample(texts, min(count, len(texts)))


def _auroc(harmful: np.ndarray, benign: np.ndarray) -> dict[str, float]:
    """AUROC with its 95 % bootstrap interval, and the number of requests."""
    rng = np.random.default_rng(0)
    labels = [1] * len(harmful) + [0] * len(benign)
    drawn = [
        roc_auc_score(labels, np.concatenate([rng.choice(harmful, len(harmful)), rng.choice(benign, len(benign))]))
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = roc_auc_score(labels, np.concatenate([harmful, benign]))
    return {"auroc": float(value), "low": float(low), "high": float(high), "n": len(labels)}


def _ways(model: Any, processor: Any, lexicon: Lexicon) -> dict[str, Look]:
    """The ways of asking for a title."""
    tokenizer = processor.tokenizer
    table = model.get_input_embeddings().weight.detach()
    filler = table[tokenizer.encode(FILLER)[0]]

    content = [{"type": "image"}, {"type": "text", "text": CARRIER}]
    asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    asked_ids = tokenizer(asked)["input_ids"]
    place = asked_ids.index(model.config.image_token_id)

    @torch.inference_mode()
    def typed(text: str) -> Tensor:
        inputs = tokenizer(chat(tokenizer, text), return_tensors="pt")
        return model(**inputs, logits_to_keep=1).logits[0, -1].float()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def pictured(title: str) -> Tensor:
        inputs = processor(text=asked, images=figstep_page(title).image, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        return model(**inputs, logits_to_keep=1).logits[0, -1].float()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def in_place_of_the_picture(embeds: Tensor) -> Tensor:
        """What is said where `embeds` [positions, width] stand in place of the picture's patches."""
        rows = torch.cat([table[asked_ids[:place]], embeds, table[asked_ids[place + 1 :]]])[None]
        state = model.get_decoder()(inputs_embeds=rows).last_hidden_state[0, -1]
        return model.lm_head(state).float()  # type: ignore[no-any-return]

    def words(title: str) -> tuple[Tensor, Tensor]:
        """[PATCHES] bool: which patches show a word; [those, width]: the embeddings of their true tokens."""
        scene = scene_of(figstep_page(title), lexicon)
        here = scene.word >= 0
        return torch.from_numpy(here), table[torch.from_numpy(lexicon.tokens[scene.word[here], scene.part[here]])]

    def read_perfectly(title: str) -> Tensor:
        here, embeds = words(title)
        patches = filler.repeat(PATCHES, 1)
        patches[here] = embeds
        return in_place_of_the_picture(patches)

    return {
        "typed": typed,
        "typed_like_the_picture": lambda title: typed("\n".join([title, *FIGSTEP_ITEMS, CARRIER])),
        "picture_without_blanks": lambda title: in_place_of_the_picture(words(title)[1]),
        "picture_read_perfectly": read_perfectly,
        "picture": pictured,
    }
