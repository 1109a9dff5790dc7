"""The page: an image and a prompt in, one live column per lane out."""

import base64
import html
from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr

from safety.engine import Engine
from safety.inputs import open_image
from safety.ui import text
from safety.ui.board import STATIC, Board
from safety.ui.controls import Form, build_defenses, build_generation, lanes_of, length_of, sampling_of
from safety.ui.live import LiveRun, Runs, guarded
from safety.ui.presets import PRESETS, Preset

WAITING_RUNS = 8  # visitors who may wait for the model at once; further ones wait in Gradio's queue

from gradio.events import Dependency

class ImageFile(gr.Image):
    """gr.Image that hands over the uploaded file's path untouched.

    The stock component opens and converts the file before our code sees it: a bomb would be decoded, and a damaged
    file would fail without a sentence for the visitor. `safety.inputs.open_image` does both safely.
    """

    is_template = True  # in the browser it is gr.Image

    def preprocess(self, payload: Any) -> str | None:
        """Return the path of the upload, or None."""
        return None if payload is None or payload.path is None else str(payload.path)
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


class Cards(gr.HTML):
    """The examples as cards. Triggers "pick" (fill the form) and "play" (fill it and run) with {"index": i}."""

    def __init__(self, presets: tuple[Preset, ...], **kwargs: Any):
        script = (STATIC / "cards.js").read_text("utf-8")
        super().__init__(html_template=_cards(presets), js_on_load=script, apply_default_css=False, **kwargs)
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


def _cards(presets: tuple[Preset, ...]) -> str:
    items = []
    for index, preset in enumerate(presets):
        if preset.image is not None:
            picture = base64.b64encode(preset.image.read_bytes()).decode()
            thumb = f'<img class="thumb" src="data:image/png;base64,{picture}" alt="{html.escape(preset.alt or "")}">'
        else:
            thumb = '<span class="thumb thumb-text" aria-hidden="true">“ ”</span>'
        title, kind = html.escape(preset.title), html.escape(preset.kind)
        items.append(
            f'<li class="card card-{kind.split()[0]}">'
            f'<button type="button" class="card-fill" data-index="{index}">{thumb}<span class="card-words">'
            f'<span class="card-kind">{kind}</span><strong>{title}</strong>'
            f'<span class="card-teaser">{html.escape(preset.teaser)}</span></span></button>'
            f'<button type="button" class="card-run" data-index="{index}" aria-label="Run the example: {title}" '
            'title="Run it now"><svg viewBox="0 0 12 12" aria-hidden="true"><path d="M3 1.5v9l7.5-4.5Z"/></svg>'
            "</button></li>"
        )
    return f'<ul class="cards" aria-label="Examples: click one to fill the form">{"".join(items)}</ul>'


def _static(markup: str, name: str) -> gr.HTML:
    return gr.HTML(markup, elem_id=name, apply_default_css=False)


def build_page(engine: Engine) -> gr.Blocks:
    """Build the page on a ready engine. Launch it with `launch_options()`."""
    runs = Runs()
    with gr.Blocks(title=text.TITLE, analytics_enabled=False, fill_width=True) as page:
        _static(text.header(engine.lvlm.label), "top")
        cards = Cards(PRESETS, elem_id="examples")
        with gr.Row(elem_id="work"):
            with gr.Column(elem_id="form"):
                with gr.Group(elem_id="ask"):
                    image = ImageFile(
                        type="filepath", sources=["upload", "clipboard"], label="Image (optional)", height=168, buttons=[],
                        elem_id="image", alt_text="The image that the model is given",
                    )  # fmt: skip
                    prompt = gr.Textbox(
                        label="Prompt", lines=3, max_lines=5, elem_id="prompt",
                        placeholder="Ask something, with or without an image",
                    )  # fmt: skip
                with gr.Column(elem_id="defenses"):
                    controls = build_defenses(engine)
                    with gr.Group(elem_classes=["defense"]):
                        controls["separate"] = gr.Checkbox(
                            label="A column for each defense", info="Otherwise they share one column", elem_classes=["switch"],
                            elem_id="separate",
                        )  # fmt: skip
                    with gr.Accordion("Advanced: length and sampling", open=False, elem_id="advanced"):
                        controls |= build_generation()
                with gr.Column(elem_id="actions"):
                    notice = gr.HTML(
                        "", html_template=text.NOTICE, js_on_load=text.NOTICE_SCRIPT, apply_default_css=False, elem_id="notice"
                    )
                    with gr.Row(elem_id="buttons"):
                        run = gr.Button("Run", variant="primary", elem_id="run")
                        stop = gr.Button("Stop", elem_id="stop", interactive=False)
            with gr.Column(elem_id="results"):
                form = Form(**controls)
                switches = [form.sasa, form.revision, form.sapt]
                order = gr.HTML(
                    [switch.value for switch in switches], html_template=text.ORDER, js_on_load=text.ORDER_SCRIPT,
                    apply_default_css=False, elem_id="order",
                )  # fmt: skip
                board = Board(elem_id="board")
                with gr.Accordion("How each defense works", open=False, elem_id="explain"):
                    _static(text.explanations(), "explanations")
        _static(text.FOOTER, "foot")

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        inputs, outputs = [image, prompt, *form.components()], [board, notice, stop]
        live: dict[str, Any] = quiet | {
            "trigger_mode": "multiple", "concurrency_limit": WAITING_RUNS, "concurrency_id": "runs",
        }  # fmt: skip
        start = partial(_run, engine, runs)
        run.click(start, inputs, outputs, **live)
        prompt.submit(start, inputs, outputs, **live)
        cards.pick(_fill, None, [image, prompt, notice], queue=False, **quiet)
        cards.play(_fill, None, [image, prompt, notice], queue=False, **quiet).success(start, inputs, outputs, **live)
        stop.click(partial(_stop, runs), None, stop, queue=False, **quiet)
        image.upload(_check_image, image, [image, notice], queue=False, **quiet)
        gr.on([switch.change for switch in switches], None, switches, order, js="(...on) => [on.slice(0, 3)]", **quiet)
        page.unload(partial(_stop, runs))
    return page


def _run(engine: Engine, runs: Runs, path: str | None, words: str, *values: Any, request: gr.Request) -> Iterator[Any]:
    """Run the form's lanes; yields updates of (board, notice, Stop button)."""
    session = request.session_hash or ""
    cancel = runs.start(session)
    form = Form(*values)

    def check() -> dict[str, Any]:
        return {
            "lanes": lanes_of(form, engine), "prompt": words, "image": None if path is None else open_image(path),
            "max_new_tokens": length_of(form), "sampling": sampling_of(form),
        }  # fmt: skip

    try:
        arguments, message = guarded(check)
        if message:
            yield gr.skip(), message, gr.Button(interactive=False)
            return
        updates = iter(LiveRun(engine, cancel=cancel, **arguments))
        view, message = next(updates)
        yield view, "", gr.Button(interactive=True)
        for view, message in updates:
            if not runs.replaced(session, cancel):
                yield view, message or gr.skip(), gr.skip()
        if not runs.replaced(session, cancel):
            yield gr.skip(), gr.skip(), gr.Button(interactive=False)
    finally:
        runs.forget(session, cancel)


def _stop(runs: Runs, request: gr.Request) -> Any:
    runs.cancel(request.session_hash or "")
    return gr.Button(interactive=False)


def _fill(event: gr.EventData) -> tuple[str | None, str, str]:
    index = event._data["index"]
    preset = PRESETS[index if index in range(len(PRESETS)) else 0]
    return None if preset.image is None else str(preset.image), preset.prompt, ""


def _check_image(path: str | None) -> tuple[Any, str]:
    """A file that cannot be used is taken out of the form again, with the reason."""
    if path is None:
        return gr.skip(), ""
    _, message = guarded(lambda: open_image(path))
    return (None if message else gr.skip()), message