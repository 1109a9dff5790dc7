"""Screenshots of the real page, for the README: `python -m safety.ui.screenshot [--model NAME] [--out FOLDER]`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from safety.engine import Engine
from safety.errors import UserError
from safety.ui.browser import chromium, served
from safety.ui.page import build_page

# Each with the columns that are set up before the run.
VIEWS: dict[str, tuple[str, dict[str, Any]]] = {
    "page-light": ("together", {"viewport": {"width": 1366, "height": 900}, "color_scheme": "light"}),
    "page-dark": ("each", {"viewport": {"width": 1720, "height": 1080}, "color_scheme": "dark"}),
    "page-wide": ("together", {"viewport": {"width": 3840, "height": 2160}, "color_scheme": "light"}),
    "page-phone": (
        "together",
        {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "device_scale_factor": 2},
    ),
}
FINISHED = """() => [...document.querySelectorAll('.lane')].every(
    lane => ['done', 'limit', 'refused'].includes(lane.dataset.state))"""


# Point at a word in the middle of the undefended answer, to show what the inspector tells.
POINT = """() => {
    const tokens = document.querySelectorAll('.lane')[0].querySelectorAll('.token');
    const words = [...tokens].filter(token => token.textContent.trim());
    const word = words[Math.floor(words.length / 2)];
    if (word) word.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));
}"""


def take(engine: Engine, folder: Path, timeout: float = 300.0) -> list[Path]:
    """Run the first example on the page in every view and save one picture each.

    Args:
        timeout: seconds that a run may take.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with served(build_page(engine)) as address, chromium() as browser:
        for name, (layout, view) in VIEWS.items():
            page = browser.new_page(**view)
            page.set_default_timeout(120_000)
            page.goto(address)
            page.wait_for_selector(".lane-card, .no-lanes")
            page.click(f"[data-layout={layout}]")
            page.click(".card-run >> nth=0")
            page.wait_for_selector(".lane .token")
            page.wait_for_function(FINISHED, timeout=timeout * 1000)
            page.evaluate(POINT)
            page.wait_for_timeout(500)
            paths.append(folder / f"{name}.png")
            page.screenshot(path=str(paths[-1]))
            page.close()
    return paths


def main() -> int:
    """Command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Take the README's screenshots of the real page.")
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--out", type=Path, default=Path("assets/screenshots"))
    flags = parser.parse_args()
    from safety.artifacts import load_artifacts
    from safety.loading import load

    try:
        lvlm = load(flags.model, progress=print)
        for path in take(Engine(lvlm, load_artifacts(lvlm)), flags.out):
            print(path)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
