"""Private on one's own machine, public on the internet: what a visitor may do, and what is covered.

DEMO_MODE=public or private decides; without it a Hugging Face Space (SPACE_ID is set) is public, anything else private.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from safety.errors import UserError
from safety.settings import MAX_NEW_TOKENS


@dataclass(frozen=True)
class Mode:
    """The rules of a page.

    Attributes:
        public: strangers use it: limits hold, text past the alarm is covered until asked for, models stay put.
        max_new_tokens: the longest answer.
        max_characters: the longest prompt, None for the library's own limit.
        runs, seconds: what one visitor may run in that time, 0 for no limit.
        places: how many runs may wait for the model.
    """

    public: bool = False
    max_new_tokens: int = MAX_NEW_TOKENS
    max_characters: int | None = None
    runs: int = 0
    seconds: float = 600.0
    places: int = 32

    def check_prompt(self, prompt: str) -> None:
        """Raise UserError when the prompt is longer than this page takes."""
        if self.max_characters is not None and len(prompt) > self.max_characters:
            raise UserError(f"This public demo takes prompts of up to {self.max_characters} characters, yours has "
                            f"{len(prompt)}. Shorten it, or run the demo on your own machine.")  # fmt: skip

    def check_length(self, tokens: int) -> None:
        """Raise UserError when a longer answer is asked for than this page gives."""
        if tokens > self.max_new_tokens:
            raise UserError(f"Answers here have at most {self.max_new_tokens} tokens, but {tokens} were asked for.")


PRIVATE = Mode()
PUBLIC = Mode(public=True, max_new_tokens=128, max_characters=300, runs=12, seconds=600.0, places=8)


def mode_of(environment: Mapping[str, str] = os.environ) -> Mode:
    """The mode that the environment asks for. Raises UserError on a DEMO_MODE that is neither public nor private."""
    wanted = environment.get("DEMO_MODE", "").strip().lower()
    if wanted not in ("", "public", "private"):
        raise UserError(f"DEMO_MODE must be public or private, but it is {wanted!r}.")
    return PUBLIC if wanted == "public" or (not wanted and "SPACE_ID" in environment) else PRIVATE


def visitor(headers: Mapping[str, str], address: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """Who is asking, for the rate limit alone: the address, which a Space's proxy forwards in a header.

    A header counts on a Space only; elsewhere anyone could write what they like into it.
    """
    if "SPACE_ID" in environment and headers.get("x-forwarded-for"):
        return headers["x-forwarded-for"].split(",")[0].strip()
    return address or "unknown"
