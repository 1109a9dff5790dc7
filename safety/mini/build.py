"""``python -m safety mini``: build the miniature LVLM from nothing, or measure it.

Stages, each resumable: the base language model is fetched; text alignment; the vision tower (reader, dictionary, both
together); image tasks; the abilities are measured and the card is written. Three to four hours on two cores with bf16.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

from safety.errors import UserError
from safety.flags import count, seed
from safety.mini.corpus import PUBLIC

STAGES = ("base", "align", "vision", "instruct", "measure", "all")
DEFAULT_WORK = Path("build") / "mini"
MEASURING_DATA = ("harmful_val", "harmbench_val", "xstest_dev", "figstep_dev", "harmless_val")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.description = (
        "Build the miniature LVLM in resumable stages: base (fetch the language model), align (on text), vision (the "
        "tower), instruct (image tasks), measure (abilities and card). Three to four hours on two cores with bf16. The "
        "tower is drawn for with the Debian packages fonts-noto-color-emoji, fonts-freefont-ttf, fonts-dejavu, "
        "fonts-liberation and fonts-noto-core."
    )
    parser.add_argument("--data", type=Path, help="folder with public CSV files, to train on "
                        f"{', '.join(PUBLIC)}, to measure on {', '.join(MEASURING_DATA)} (optional)")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK,
                        help="checkpoints, from which a killed run resumes, and transcripts (default %(default)s)")
    parser.add_argument("--out", type=Path, help="artifact folder to write (default: the shipped one)")
    parser.add_argument("--stage", choices=STAGES, default="all", help="do only this step (default: all)")
    parser.add_argument("--measure", action="store_true", help="only measure the artifact's abilities")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the measured samples relative to the card's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="where to train (default cpu); abilities are measured on the CPU")
    parser.add_argument("--seed", type=seed, default=0, help="of the training")
    parser.add_argument("--threads", type=count, help="CPU threads (default: all cores)")


def run(args: argparse.Namespace) -> int:
    """Do the stages that the arguments ask for; every stage skips what its checkpoints already hold."""
    import torch

    from safety.mini.assemble import ARTIFACT

    if args.threads:
        torch.set_num_threads(args.threads)
    out: Path = args.out or ARTIFACT
    stages = ["measure"] if args.measure else list(STAGES[:-1]) if args.stage == "all" else [args.stage]
    check(args, stages)
    for stage in stages:
        started = time.monotonic()
        print(f"== {stage} ==", file=sys.stderr, flush=True)
        if stage == "base":
            from safety.mini.base import base_folder

            base_folder()
        elif stage == "align":
            from safety.mini.align import AlignSettings, align

            align(args.work, args.data, AlignSettings(seed=args.seed), args.device)
        elif stage == "vision":
            train_vision(args.work, args.data, args.seed, args.device)
        elif stage == "instruct":
            train_instruct(args.work, args.data, out, args.seed, args.device)
        else:
            measure(out, args.data, args.scale, args.work)
        print(f"== {stage} took {(time.monotonic() - started) / 60:.1f} min ==", file=sys.stderr, flush=True)
    return 0


def check(args: argparse.Namespace, stages: list[str]) -> None:
    """Say at once what would go wrong after hours, or pass unnoticed into a lesser model or card.

    Raises:
        UserError: files missing in --data, fonts missing, no CUDA device, or a --scale that is no size.
    """
    import torch

    from safety.mini.scenes import FONT_FILES, available_fonts
    from safety.mini.symbols import have_emoji_font

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here. Leave it out to use the CPU.")
    if not 0 < args.scale < float("inf"):
        raise UserError(f"--scale must be a number above 0, but it is {args.scale:g}.")
    if args.data is not None:
        needed = {name for stage in stages if stage != "base"
                  for name in (MEASURING_DATA if stage == "measure" else PUBLIC)}
        if missing := sorted(name for name in needed if not (args.data / f"{name}.csv").is_file()):
            raise UserError(f"--data {args.data} lacks {', '.join(f'{name}.csv' for name in missing)}. Give the folder "
                            "that has them, or leave --data out to use the project's own corpus alone.")
    if {"vision", "instruct", "measure"} & set(stages) and not have_emoji_font():
        raise UserError("The font of the symbols is missing: install the Debian package fonts-noto-color-emoji.")
    if {"vision", "instruct"} & set(stages) and (lacking := 1 + len(FONT_FILES) - len(available_fonts())):
        print(f"{lacking} of {len(FONT_FILES)} fonts are missing, so the tower learns to read fewer: install "
              "fonts-freefont-ttf, fonts-dejavu, fonts-liberation and fonts-noto-core.", file=sys.stderr)


def base_texts(data: Path | None) -> list[str]:
    """Sentences whose words the tower should read, apart from the answers: the project's corpus and the public sets."""
    from safety.mini import corpus
    from safety.mini.train_vision import csv_texts

    return csv_texts(data) + [row.text for row in corpus.rows()]


def make_lexicon(work: Path | None, data: Path | None) -> Any:
    """The lexicon of the tokenizer, the corpus and, where they exist, the base model's answers."""
    from safety.mini.answers import read_answers
    from safety.mini.base import load_tokenizer
    from safety.mini.lexicon import build_lexicon

    texts = base_texts(data)
    if work is not None:
        texts += [raw for _, raw in read_answers(work / "answers.jsonl").values()]
    return build_lexicon(load_tokenizer(), texts)


def train_vision(work: Path, data: Path | None, seed: int, device: str) -> None:
    """Reading blocks, dictionary, then both together."""
    from safety.mini.base import load_base_lm, load_tokenizer
    from safety.mini.dictionary import train_dictionary
    from safety.mini.joint import train_joint
    from safety.mini.train_vision import train_reading

    lexicon, tokenizer = make_lexicon(work, data), load_tokenizer()
    embedding = load_base_lm().get_input_embeddings().weight.detach().clone()
    train_reading(lexicon, work, seed=seed, device=device)
    train_dictionary(tokenizer, embedding, lexicon, work, seed=seed, device=device)
    train_joint(tokenizer, embedding, lexicon, work, seed=seed, device=device)


def train_instruct(work: Path, data: Path | None, out: Path, seed: int, device: str) -> None:
    """Visual instruction tuning behind the finished tower, then the artifact."""
    import torch
    import transformers
    from safetensors.torch import load_file

    from safety.mini import instruct
    from safety.mini.align import LORA_FILE
    from safety.mini.assemble import export_weights, image_tokenizer
    from safety.mini.joint import load_tower
    from safety.mini.lora import lora_state

    lexicon, tokenizer = make_lexicon(work, data), image_tokenizer()
    joint = load_tower(work, 576).to(device)
    lists, requests, answers = instruct.answered_requests(work, data)
    model = instruct.instruct(
        tokenizer,
        tokenizer.convert_tokens_to_ids("<image>"),
        instruct.TaskMaker(lexicon, lists, requests),
        instruct.text_replay(tokenizer, answers, data, seed),
        instruct.tower_features(joint),
        load_file(work / LORA_FILE),
        work,
        seed=seed,
        device=device,
    )
    facts = {
        "seed": seed,
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.machine()} {device}",
    }
    export_weights(
        out, joint.reader.tower, joint.dictionary.projector.state_dict(), lora_state(model.get_decoder()), facts
    )


def measure(out: Path, data: Path | None, scale: float, work: Path) -> None:
    """Measure the artifact and write ``abilities.json`` and the model card beside it, and transcripts into `work`."""
    from safety.mini.abilities import measure_abilities
    from safety.mini.assemble import load_miniature
    from safety.mini.card import write_card
    from safety.quantize import fast_dtype

    model, processor = load_miniature(dtype=fast_dtype("cpu"), folder=out)
    started = time.monotonic()
    report, rows = measure_abilities(model, processor, make_lexicon(None, None), data, scale)
    report["setup"] = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "scale": scale,
        "command": f"python -m safety mini --measure{' --data DIR' if data else ''} --scale {scale:g}",
    }
    (out / "abilities.json").write_text(json.dumps(report, indent=2) + "\n")
    transcripts = work / "abilities_transcripts.json"
    transcripts.parent.mkdir(parents=True, exist_ok=True)
    transcripts.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    write_card(out, report)
    print((out / "README.md").read_text())
