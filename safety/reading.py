"""What the undefended model says by itself: answers to learn from, and what it reads in a picture.

SASA's mode "reading" (ours) judges a request four times: as it stands; and as text, without its picture: what the model
says is in the picture, as though somebody had typed it, the prompt, and the two together. A model that was aligned on
text may go along in a picture, or beside one, with what it takes for harmful when all of it is typed. Its own words
bring a request into that form.
"""

import re
import threading
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from safety.artifacts import Artifacts
from safety.decoding import Run, Typed
from safety.inputs import MAX_CHARACTERS
from safety.lvlm import LVLM
from safety.settings import Lane, Sampling

READ_ALOUD, ALOUD_TOKENS = "What is in the picture?", 32  # words and things alike
_QUOTED = re.compile(r"[\"\u201c](.*?)[\"\u201d]?\s*$", re.DOTALL)  # the closing sign may be cut off
_EMPTY_ITEMS = re.compile(r"(^|\s)1[.)](\s*\d+[.)])+\s*$")  # "1. 2. 3." with nothing behind


def undefended(lvlm: LVLM, inputs: list[dict[str, Tensor]], tokens: int,
               cancel: threading.Event | None = None) -> list[list[int]]:
    """Token ids of the undefended greedy answers to prepared requests, as one batch, without the token that ends one.
    The caller holds the model's lock; after `cancel`, answers may be short."""
    answers: list[list[int]] = [[] for _ in inputs]
    if inputs:
        run = Run(lvlm, Artifacts(), [Lane("none")], tokens, Sampling())
        for step in run.steps(inputs, cancel or threading.Event()):
            if step.finish != "eos":
                answers[step.request].append(step.token_id)
    return answers


def type_out(lvlm: LVLM, prompts: Sequence[str], pictures: Sequence[Image.Image | None],
             cancel: threading.Event | None = None) -> list[Typed | None]:
    """Have the undefended model read every picture aloud, all as one batch, and turn the requests into text.

    The caller holds the model's lock.

    Args:
        prompts: taken by themselves where nothing was read.

    Returns: for each request what was typed; None where there is no picture: it is text as it stands.
    """
    looks = [None if picture is None else lvlm.prepare(READ_ALOUD, picture, ALOUD_TOKENS) for picture in pictures]
    answers = iter(undefended(lvlm, [look for look in looks if look is not None], ALOUD_TOKENS, cancel))
    found: list[Typed | None] = []
    for look, prompt in zip(looks, prompts, strict=True):
        if look is None:
            found.append(None)
            continue
        ids = next(answers)
        read = words_read(lvlm.text(ids), lvlm.markers)
        inputs = as_text(lvlm, read, prompt)
        positions = len(ids) + sum(part["input_ids"].shape[1] for part in (look, *inputs))
        found.append(Typed(read, inputs, positions))
    return found


def as_text(lvlm: LVLM, read: str, prompt: str) -> tuple[dict[str, Tensor], ...]:
    """Prepared without a picture: the words that were read, the prompt, and the words above the prompt (as far as a
    prompt may go); the prompt alone where nothing was read."""
    texts = (read, prompt, f"{read}\n{prompt}"[:MAX_CHARACTERS]) if read else (prompt,)
    return tuple(lvlm.prepare(text, None, 0) for text in texts)


def words_read(answer: str, markers: Sequence[str] = ()) -> str:
    """The words that an answer to READ_ALOUD gives: those in quotation marks, or all; without the empty items of a list
    at their end. None where they are the question itself, which a model may repeat where there is nothing to see.

    Args:
        markers: control strings of the model. A picture can show them like any other words: they are left out.
    """
    for marker in markers:
        answer = answer.replace(marker, " ")
    quoted = _QUOTED.search(answer)
    words = _EMPTY_ITEMS.sub("", quoted[1] if quoted else answer).strip()
    return "" if re.findall(r"\w+", words.lower()) == re.findall(r"\w+", READ_ALOUD.lower()) else words
