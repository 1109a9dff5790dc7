"""A headless Chromium for measurements, screenshots and tests. Playwright is a development dependency."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from safety.errors import UserError
from safety.ui.theme import launch_options


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a Playwright browser: the system's Chromium (or $CHROMIUM), else the one that Playwright installed.

    Raises:
        UserError: Playwright or a Chromium is missing; says how to install it.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise UserError("Driving the page needs Playwright: pip install -r requirements-dev.txt.") from None
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=path, args=["--no-sandbox", "--disable-background-networking"]
            )
        except Error as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"Chromium could not be started ({reason}). Install it (apt install chromium, or playwright install "
                "chromium) or set CHROMIUM to its path."
            ) from None
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def served(page: gr.Blocks) -> Iterator[str]:
    """Serve a page on a free local port; yields its address."""
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **launch_options())
    try:
        yield address
    finally:
        page.close(verbose=False)
