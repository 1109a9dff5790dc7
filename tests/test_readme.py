"""The README holds no editing leftovers, and its commands are ones that the command line understands."""

import re
import shlex
from pathlib import Path

import pytest

from safety import __main__ as cli

TEXT = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
COMMANDS = [line.strip() for line in TEXT.splitlines() if line.startswith("    python -m safety ")]


def test_there_are_no_notes_of_editors() -> None:
    assert "<!--" not in TEXT


def test_every_table_has_a_header() -> None:
    lines = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL).splitlines()
    starts = [number for number, line in enumerate(lines)
              if line.startswith("|") and not lines[number - 1].startswith("|")]
    orphans = [lines[number] for number in starts if not re.fullmatch(r"\|[-:| ]+\|", lines[number + 1])]
    assert starts and not orphans


@pytest.mark.parametrize("line", [line for line in COMMANDS if " | " not in line])
def test_commands_are_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """[Optional parts] are taken; the command is read, not run."""
    seen = []
    parse = cli.argparse.ArgumentParser.parse_args

    def read(parser: object, words: list[str]) -> None:
        seen.append(parse(parser, words))  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.argparse.ArgumentParser, "parse_args", read)
    words = shlex.split(re.sub(r"[\[\]]", "", line.partition(" #")[0]))[3:]
    if words[-1] == "--help":
        words.pop()
    with pytest.raises(KeyboardInterrupt):
        cli.main(words)
    assert seen[0].command == words[0]
