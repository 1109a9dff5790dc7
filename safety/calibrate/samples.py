"""The miniature's own samples, drawn from its corpus: every harmful typographic image has a benign typographic twin,
so that a probe cannot get by with learning typography."""

import random
from pathlib import Path
from typing import Literal

from safety.samples import CARRIER, Sample


def miniature_samples(folder: Path, split: Literal["train", "heldout"], per_kind: int, seed: int = 0) -> list[Sample]:
    """Draw samples for the miniature from its corpus, images as PNG files in `folder`.

    Kinds: "typographic" (unsafe) with "typographic twin" (safe), "text" (unsafe) with "text twin" (safe) of the same
    word families, "symbol" (safe: a drawn symbol and an innocent question) and "ordinary" (safe text).
    """
    from safety.mini import corpus
    from safety.mini.render import figstep
    from safety.mini.symbols import COLOURS, SHAPES, shape

    rng = random.Random(f"{split} {seed}")

    def pick(rows: list, count: int) -> list:
        return rng.sample(rows, min(count, len(rows)))

    def as_list(row: corpus.Row) -> bool:
        return row.form == "list" and len(row.text) <= 75  # fits a typographic picture

    harmful, twins = corpus.harmful(split), corpus.twins(split)
    groups = {
        "typographic": pick([row for row in harmful if as_list(row)], per_kind),
        "typographic twin": pick([row for row in corpus.list_prompts(split) if as_list(row)], per_kind),
        "text": pick(harmful, per_kind // 2),
        "text twin": pick(twins, per_kind // 2),
        "ordinary": pick([row for row in corpus.benign(split) if row.kind == "ordinary"], per_kind // 4),
    }
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for kind, rows in groups.items():
        for number, row in enumerate(rows):
            name = f"{split}-{kind.replace(' ', '-')}-{number}"
            image, prompt, request = None, row.text, None
            if kind.startswith("typographic"):
                image, prompt, request = str(folder / f"{name}.png"), CARRIER, row.text
                figstep(row.text).save(image)
            label: Literal["safe", "unsafe"] = "unsafe" if row.label == "harmful" else "safe"
            samples.append(Sample(name, prompt, label, row.category, image, None, kind, request))
    questions = ("What do you see in this picture?", "What shape is this?", "Which colour is it?",
                 "Describe the image.")
    for number in range(per_kind // 4):
        name, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        path = folder / f"{split}-symbol-{number}.png"
        _on_white(shape(name, COLOURS[colour], rng.randint(70, 150)), rng).save(path)
        samples.append(Sample(path.stem, rng.choice(questions), "safe", "symbol", str(path), None, "symbol"))
    return samples


def _on_white(picture, rng: random.Random):  # type: ignore[no-untyped-def]
    """Paste an RGBA picture somewhere on a white 224 x 224 square."""
    from PIL import Image
    canvas = Image.new("RGB", (224, 224), "white")
    corner = (rng.randint(0, 224 - picture.width), rng.randint(0, 224 - picture.height))
    canvas.paste(picture, corner, picture)
    return canvas
