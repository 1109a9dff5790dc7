"""README and docs hold no editing leftovers, their links lead somewhere, and their commands are understood."""

import re
import shlex
from pathlib import Path

import pytest

from safety import __main__ as cli

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in (ROOT / "README.md",
                                                                         *sorted((ROOT / "docs").glob("*.md")))}
COMMANDS = sorted({line.strip() for text in PAGES.values() for line in text.splitlines()
                   if line.startswith("    python -m safety ")})
WITH_TABLES = ("README.md", *(page for page, text in PAGES.items() if page != "README.md" and "\n|" in text))


def anchors(text: str) -> set[str]:
    """What a link's # can name on a page, as GitHub makes them of its headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_there_are_no_notes_of_editors(page: str) -> None:
    assert "<!--" not in PAGES[page]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) if not link.startswith("http")]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text("utf-8")), link


@pytest.mark.parametrize("page", WITH_TABLES)
def test_every_table_has_a_header(page: str) -> None:
    lines = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL).splitlines()
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
