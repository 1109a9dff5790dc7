"""A run in plain words, above the numbers; and what each lane cost, counted."""

import re
from collections.abc import Sequence

from safety.engine import Answer
from safety.evaluate.judges import is_garbage
from safety.refusal import refusal_start
from safety.settings import Lane

ENDED = ("done", "limit", "refused", "stopped")
_LIST_ITEM = re.compile(r"\s\d+\.\s+\w")


def verdict(lanes: list[Lane], answers: list[Answer], states: list[str], harmful: bool | None = None) -> str:
    """Say what happened, for somebody who has never heard of the defenses; "" until every lane has ended.

    Args:
        harmful: is the request known to be harmful (True) or harmless (False)? None when nobody knows.
    """
    if not all(state in ENDED for state in states):
        return ""
    if "stopped" in states:
        if not any(answer.tokens for answer in answers):
            return "You stopped this run before its first word."
        return "You stopped this run: what was written until then is below."
    parts = [_alone(answers[0], harmful)]
    refused = [answer.name for answer in answers[1:] if answer.refused]
    if len(lanes) == 2:
        parts.append(_defended(lanes[1], answers[1], answers[0], harmful))
    elif len(lanes) > 2:
        names = f" ({_list(refused)})" if refused else ""
        count, every = len(refused), len(lanes) - 1
        which = ("Both" if every == 2 else f"All {every}") if count == every else f"{count or 'None'} of the {every}"
        parts.append(f"{which} defended columns refused{names}.")
    if harmful is False and (refused or answers[0].refused):
        parts.append("This request is harmless, so a refusal here is a false alarm.")
    elif harmful and len(lanes) > 1 and not refused:
        parts.append("This request is harmful: here the defenses missed it.")
    elif harmful is False and len(lanes) > 1:
        parts.append("This request is harmless: refusing it would have been a false alarm.")
    return " ".join(parts)


def went_on(answer: Answer) -> bool:
    """Did the answer say that it cannot help, and go on with a list all the same?"""
    start = refusal_start(answer.text)
    return start is not None and _LIST_ITEM.search(answer.text, start) is not None


def _alone(answer: Answer, harmful: bool | None) -> str:
    if answer.refused:
        return "On its own, the model refused."
    if is_garbage(answer.text):
        return "On its own, the model did not refuse, but its words are broken."
    return f"On its own, the model {'went along with the request' if harmful else 'answered'}."


def _defended(lane: Lane, answer: Answer, alone: Answer, harmful: bool | None) -> str:
    if answer.gated:
        return "Defended, it was stopped before the first word: SASA judged the request harmful."
    injection = next((event for event in answer.events if event.type == "injection"), None)
    begun = answer.refusal_token
    if injection is not None and not (begun is not None and begun < injection.token):
        turned = ("and the answer said that it cannot help, but went on with its list" if went_on(answer) else
                  "and the answer turned into a refusal" if answer.refused else "but the answer went on")
        return f"Defended, SAPT stepped in after {injection.token} tokens, {turned}."
    if answer.refused:
        return f"Defended, it {'said that it cannot help, but went on with a list' if went_on(answer) else 'refused'}."
    if is_garbage(answer.text):
        return "Defended, it did not refuse either, and its words are broken: that is no safety."
    went = "went along too" if harmful else "answered too"
    steering = _steering(lane)
    if not steering:
        return f"Defended, it {went}: no defense stepped in."
    said = "but the wording is the same" if answer.text == alone.text else "so the wording differs"
    return f"Defended, it {went}: no defense refused; {_list(steering)} nudged every step, {said}."


def _steering(lane: Lane) -> list[str]:
    """The defenses that act on every token of the lane, whatever is asked."""
    found = []
    if lane.sasa is not None and lane.sasa.mode == "project" and lane.sasa.strength:
        found.append("SASA's projection")
    if lane.revision is not None and lane.revision.alpha:
        found.append("revision")
    return found


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def overhead(
    lane: Lane, answer: Answer, blocks: int, soft_tokens: int, pairs: Sequence[Sequence[int]] = ()
) -> float | None:
    """The lane's extra work over an undefended answer of the same length, as a share of that answer's work.

    Counted, not timed (lanes share one batch, so time cannot be told apart): one unit is one block on one position.
    None while the prompt's length is not known.

    Args:
        pairs: all (safety, fused) blocks that have a probe: SASA projects once for each when it chooses per input.
    """
    prompt, said = answer.prompt_tokens, len(answer.tokens)
    if not prompt or not said:
        return None
    extra = 0
    if lane.sasa is not None and lane.sasa.mode == "gate":
        starts = [pair[0] for pair in pairs] if lane.sasa.choice == "per-input" else [lane.sasa.safety_layer]
        extra += sum(blocks - 1 - start for start in starts) * prompt  # the projected streams, to the top
    elif lane.sasa is not None and lane.sasa.mode == "project":
        extra += blocks * prompt + (lane.sasa.fused_layer - lane.sasa.safety_layer) * (prompt + said)
    extra += blocks * sum(event.positions for event in answer.events)  # the picture read aloud, and its words judged
    if lane.revision is not None and not answer.gated:
        whole = lane.revision.positions == "all"
        if not (whole and lane.sasa is not None and lane.sasa.mode == "project"):  # both act on one run of the prompt
            extra += blocks * (prompt if whole else 1)
    extra += blocks * soft_tokens * sum(event.type == "check" for event in answer.events)
    return extra / (blocks * (prompt + said))
