"""The examples as cards: click to fill the form, run at once, or play what was recorded."""

import base64
import html
from typing import Any

import gradio as gr

from safety.ui.board import STATIC
from safety.ui.presets import PRESETS, Preset
from safety.ui.recordings import recorded

_PLAY = '<svg viewBox="0 0 12 12" aria-hidden="true"><path d="M3 1.5v9l7.5-4.5Z"/></svg>'
_FILM = (
    '<svg viewBox="0 0 12 12" aria-hidden="true"><path d="M1 2h10v8H1Z" class="film"/>'
    '<path d="M3.2 2v8M8.8 2v8M1 4.7h2.2M1 7.3h2.2M8.8 4.7H11M8.8 7.3H11" class="film"/></svg>'
)


def cards(**kwargs: Any) -> gr.HTML:
    """Triggers "pick" (fill the form), "play" (fill it and run) and "replay" (the recording) with {"index": i}."""
    return gr.HTML(
        html_template=f'<ul class="cards" aria-label="Examples: click one to fill the form">{_items()}</ul>',
        js_on_load=(STATIC / "cards.js").read_text("utf-8"),
        apply_default_css=False,
        **kwargs,
    )


def _items() -> str:
    return "".join(_item(index, preset) for index, preset in enumerate(PRESETS))


def _item(index: int, preset: Preset) -> str:
    if preset.image is not None:
        picture = base64.b64encode(preset.image.read_bytes()).decode()
        thumb = f'<img class="thumb" src="data:image/png;base64,{picture}" alt="{html.escape(preset.alt or "")}">'
    else:
        thumb = '<span class="thumb thumb-text" aria-hidden="true">“ ”</span>'
    title, kind = html.escape(preset.title), html.escape(preset.kind)
    film = ""
    if recorded(preset.key):
        film = (
            f'<button type="button" class="card-replay" data-index="{index}" title="Play a recording: needs no model" '
            f'aria-label="Play the recording: {title}">{_FILM}</button>'
        )
    return (
        f'<li class="card card-{kind.split()[0]}">'
        f'<button type="button" class="card-fill" data-index="{index}" data-key="{preset.key}" aria-pressed="false">'
        f'{thumb}<span class="card-words"><span class="card-kind">{kind}</span><strong>{title}</strong>'
        f'<span class="card-teaser">{html.escape(preset.teaser)}</span></span></button>'
        f'<button type="button" class="card-run" data-index="{index}" aria-label="Run the example: {title}" '
        f'title="Run it now">{_PLAY}</button>{film}</li>'
    )
