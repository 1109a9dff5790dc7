"""The page: an image and a prompt in, one live column per lane out."""

import base64
import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from safety.engine import Engine
from safety.inputs import open_image
from safety.ui import text
from safety.ui.board import STATIC, board
from safety.ui.controls import Form, build_defenses, build_generation, lanes_of, length_of, sampling_of
from safety.ui.live import LiveRun, Runs, guarded
from safety.ui.presets import PRESETS, Preset

WAITING_RUNS = 8  # visitors who may wait for the model at once; further ones wait in Gradio's queue


def _image_file(**kwargs: Any) -> gr.Image:
    """gr.Image that hands over the uploaded file's path untouched.

    The stock component opens and converts the file before our code sees it: a bomb would be decoded, and a damaged
    file would fail without a sentence for the visitor. `safety.inputs.open_image` does both safely.
    """
    image = gr.Image(type="filepath", sources=["upload"], buttons=[], **kwargs)
    image.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return image


def _cards(presets: tuple[Preset, ...], **kwargs: Any) -> gr.HTML:
    """The examples. Triggers "pick" (fill the form) and "play" (fill it and run) with {"index": i}."""
    script = (STATIC / "cards.js").read_text("utf-8")
    return gr.HTML(html_template=_cards_markup(presets), js_on_load=script, apply_default_css=False, **kwargs)


def _cards_markup(presets: tuple[Preset, ...]) -> str:
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
    handlers = _Handlers(engine)
    with gr.Blocks(title=text.TITLE, analytics_enabled=False, fill_width=True) as page:
        _static(text.header(engine.lvlm.label), "top")
        cards = _cards(PRESETS, elem_id="examples")
        with gr.Row(elem_id="work"):
            with gr.Column(elem_id="form"):
                with gr.Column(elem_id="ask"):
                    image = _image_file(
                        label="Image",
                        show_label=False,
                        height=136,
                        placeholder="Drop an image here, or click\n(optional)",
                        elem_id="image",
                        alt_text="The image that the model is given",
                    )
                    prompt = gr.Textbox(
                        label="Prompt",
                        lines=3,
                        max_lines=5,
                        elem_id="prompt",
                        placeholder="Ask something, with or without an image",
                    )
                with gr.Column(elem_id="defenses"):
                    controls = build_defenses(engine)
                    with gr.Column(elem_classes=["defense"]):
                        controls["separate"] = gr.Checkbox(
                            label="A column for each defense",
                            info="Otherwise they share one column",
                            elem_classes=["switch"],
                            elem_id="separate",
                        )
                    with gr.Accordion("Advanced: length and sampling", open=False, elem_id="advanced"):
                        controls |= build_generation()
                with gr.Column(elem_id="actions"):
                    notice = gr.HTML(
                        "",
                        html_template=text.NOTICE,
                        js_on_load=text.NOTICE_SCRIPT,
                        apply_default_css=False,
                        elem_id="notice",
                    )
                    with gr.Row(elem_id="buttons"):
                        run = gr.Button("Run", variant="primary", elem_id="run")
                        stop = gr.Button("Stop", elem_id="stop", interactive=False)
            with gr.Column(elem_id="results"):
                form = Form(**controls)
                switches = [form.sasa, form.revision, form.sapt]
                answers = board(elem_id="board")
                order = gr.HTML(
                    [switch.value for switch in switches],
                    html_template=text.ORDER,
                    js_on_load=text.ORDER_SCRIPT,
                    apply_default_css=False,
                    elem_id="order",
                )
                with gr.Accordion("How each defense works", open=False, elem_id="explain"):
                    _static(text.explanations(), "explanations")
        _static(text.FOOTER, "foot")

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        inputs, outputs = [image, prompt, *form.components()], [answers, notice, stop]
        live: dict[str, Any] = quiet | {
            "trigger_mode": "multiple",
            "concurrency_limit": WAITING_RUNS,
            "concurrency_id": "runs",
        }
        run.click(handlers.run, inputs, outputs, **live)
        prompt.submit(handlers.run, inputs, outputs, **live)
        cards.pick(handlers.fill, None, [image, prompt, notice], queue=False, **quiet)
        cards.play(handlers.fill, None, [image, prompt, notice], queue=False, **quiet).success(
            handlers.run, inputs, outputs, **live
        )
        stop.click(handlers.stop, None, stop, queue=False, **quiet)
        image.upload(handlers.check_image, image, [image, notice], queue=False, **quiet)
        gr.on([switch.change for switch in switches], None, switches, order, js="(...on) => [on.slice(0, 3)]", **quiet)
        page.unload(handlers.leave)
    return page


class _Handlers:
    """What the page's events do. Methods, because Gradio finds `request` and `event` by their annotations."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.runs = Runs()

    def run(self, request: gr.Request, path: str | None, words: str, *values: Any) -> Iterator[Any]:
        """Run the form's lanes; yields updates of (board, notice, Stop button)."""
        form = Form(*values)
        # Checked first: a form that cannot run leaves a run that is going on alone.
        arguments, message = guarded(
            lambda: {
                "lanes": lanes_of(form, self.engine),
                "prompt": words,
                "image": None if path is None else open_image(path),
                "max_new_tokens": length_of(form),
                "sampling": sampling_of(form),
            }
        )
        if message:
            yield gr.skip(), message, gr.skip()
            return
        session = request.session_hash or ""
        cancel = self.runs.start(session)
        try:
            updates = iter(LiveRun(self.engine, cancel=cancel, **arguments))
            view, message = next(updates)
            yield view, "", gr.Button(interactive=True)
            for view, message in updates:
                if not self.runs.replaced(session, cancel):
                    yield view, message or gr.skip(), gr.skip()
            if not self.runs.replaced(session, cancel):
                yield gr.skip(), gr.skip(), gr.Button(interactive=False)
        finally:
            self.runs.forget(session, cancel)

    def stop(self, request: gr.Request) -> Any:
        """Cancel the visitor's run."""
        self.runs.cancel(request.session_hash or "")
        return gr.Button(interactive=False)

    def leave(self, request: gr.Request) -> None:
        """The visitor closed or reloaded the tab: nobody waits for the run any more."""
        self.runs.cancel(request.session_hash or "")

    def fill(self, event: gr.EventData) -> tuple[str | None, str, str]:
        """Put an example into the form; returns (image, prompt, notice)."""
        index = event._data["index"]
        preset = PRESETS[index if index in range(len(PRESETS)) else 0]
        return None if preset.image is None else str(preset.image), preset.prompt, ""

    def check_image(self, path: str | None) -> tuple[Any, str]:
        """Take a file that cannot be used out of the form again, with the reason; returns (image, notice)."""
        if path is None:
            return gr.skip(), ""
        _, message = guarded(lambda: open_image(path))
        return (None if message else gr.skip()), message
