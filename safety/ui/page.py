"""The page: an image and a prompt in, one live column per lane out."""

from typing import Any

import gradio as gr

from safety.engine import Engine
from safety.ui import story, text
from safety.ui.board import STATIC, board, script
from safety.ui.cards import cards
from safety.ui.handlers import DECODERS, Handlers, spec_of
from safety.ui.host import Host
from safety.ui.top import top


def _image_file(**kwargs: Any) -> gr.Image:
    """gr.Image that hands over the uploaded file's path untouched.

    The stock component opens and converts the file before our code sees it: a bomb would be decoded, and a damaged
    file would fail without a sentence for the visitor. `safety.inputs.open_image` does both safely.

    No handler may answer with an update of this component, `gr.skip()` included: Gradio would make the visitor a stock
    one in its place. (A subclass would not have this, but Gradio writes a stub file beside each subclass's source.)
    """
    image = gr.Image(type="filepath", sources=["upload"], buttons=[], **kwargs)
    image.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return image


def _editor(host: Host, **kwargs: Any) -> gr.HTML:
    """The columns and their knobs. Its value is the form of `knobs.lanes_of`; triggers "restore" for a link."""
    spec = spec_of(host)
    return gr.HTML(
        value=spec["start"],
        spec=spec,
        html_template=(STATIC / "editor.html").read_text("utf-8"),
        js_on_load=script("editor", "editor_events"),
        apply_default_css=False,
        **kwargs,
    )


def _static(markup: str, name: str) -> gr.HTML:
    return gr.HTML(markup, elem_id=name, apply_default_css=False)


def build_page(model: Host | Engine) -> gr.Blocks:
    """Build the page on a host, or on a ready engine. Launch it with `launch_options()`."""
    host = model if isinstance(model, Host) else Host(model)
    handlers = Handlers(host)
    # What visitors upload is deleted: after an hour on a public page, after a day otherwise.
    kept = (600, 3600) if host.mode.public else (3600, 86400)
    with gr.Blocks(title=text.TITLE, analytics_enabled=False, fill_width=True, delete_cache=kept) as page:
        head = top(host, elem_id="top")
        examples = cards(elem_id="examples")
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
                        placeholder="Ask something, with or without an image (Shift+Enter runs it)",
                    )
                editor = _editor(host, elem_id="editor")
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
                answers = board(elem_id="board")
                _static(story.ORDER, "order")
        _static(story.explanations(), "explain")
        _static(story.FOOTER, "foot")

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "api_name": False}
        at_once: dict[str, Any] = quiet | {"queue": False}
        inputs, outputs = [image, prompt, editor], [answers, notice, stop]
        live: dict[str, Any] = quiet | {
            "trigger_mode": "multiple",
            # More than the line has places, so that its own message, not a silent wait, meets whoever is too many.
            "concurrency_limit": host.mode.places + 8,
            "concurrency_id": "runs",
        }
        wait: dict[str, Any] = quiet | {"concurrency_limit": None}
        run.click(handlers.run, inputs, outputs, **live)
        prompt.submit(handlers.run, inputs, outputs, **live)
        examples.pick(handlers.fill, None, [image, prompt, notice], **at_once)
        examples.play(handlers.fill, None, [image, prompt, notice], **at_once).success(
            handlers.run, inputs, outputs, **live
        )
        examples.replay(handlers.replay, editor, [image, prompt, answers, notice, stop], **at_once)
        editor.restore(handlers.restore, None, [image, prompt, notice], **at_once)
        answers.reveal(handlers.reveal, None, answers, **at_once)
        stop.click(handlers.stop, None, None, **at_once)
        pictures: dict[str, Any] = quiet | {"concurrency_limit": DECODERS}
        checked = image.upload(handlers.check_image, image, notice, **pictures)
        checked.then(None, [image, notice], image, js="(image, refused) => refused ? null : image", **at_once)
        page.load(handlers.watch, None, [head, editor], **wait)
        if not host.mode.public:
            head.switch(handlers.switch, None, notice, **at_once).then(handlers.watch, None, [head, editor], **wait)
            head.calibrate(handlers.calibrate, None, notice, **at_once).then(
                handlers.watch, None, [head, editor], **wait
            )
            head.cancel(handlers.cancel, None, None, **at_once)
        page.unload(handlers.leave)
    page.queue(max_size=host.mode.places + 64)
    return page
