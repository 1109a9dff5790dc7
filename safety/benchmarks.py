"""Public benchmarks as samples, from a local folder or from the Hugging Face Hub.

A spec is a sample file ("file.jsonl"), "NAME:DIR" for a folder as its authors publish it, or "NAME:hub". What is read
from either is written down at each loader. Nothing of these sets is part of this project; mind their licences.
"""

import random
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from safety.errors import UserError
from safety.refusal import refusal_start
from safety.samples import CARRIER, Sample, read_samples
from safety.tables import Table, from_hub, from_parquet, keep, read_csv, read_json, unpacked_from_hub

SHORT = "Answer with a single word or phrase."
Label = Literal["safe", "unsafe"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Loader:
    """local(folder) and hub() return what can be sampled from; None: its authors do not publish it on the Hub."""

    local: Callable[[Path], Table]
    hub: Callable[[], Table] | None


def read(spec: str, limit: int | None = None, seed: int = 0) -> list[Sample]:
    """Samples of a file or benchmark, at most `limit` of them, drawn at random with `seed`.

    Raises:
        UserError: an unknown benchmark, or files that are missing or not as published; says what was looked for.
    """
    name, colon, source = spec.partition(":")
    if not colon:
        samples = read_samples(Path(spec))
        return [samples[i] for i in _draw(len(samples), limit, seed)]
    if name not in LOADERS:
        raise UserError(f"There is no benchmark {name!r}. Choose from {', '.join(sorted(LOADERS))}, as in "
                        f"{spec!r}, or give a .jsonl file.")
    loader = LOADERS[name]
    if source == "hub" and loader.hub is None:
        raise UserError(f"{name} is not on the Hub. Get it from its authors and give {name}:DIR.")
    try:
        table = loader.hub() if source == "hub" and loader.hub else loader.local(Path(source))
        samples = [table.sample(i, table.rows[i]) for i in _draw(len(table.rows), limit, seed)]
    except (OSError, KeyError, TypeError, IndexError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{spec} could not be read as {name} ({type(error).__name__}: {error}). "
                        "See safety/benchmarks.py for the files it should have.") from error
    if not samples:
        raise UserError(f"{spec} holds no samples. See safety/benchmarks.py for the files it should have.")
    missing = next((s.image for s in samples if s.image and not Path(s.image).is_file()), None)
    if missing:
        raise UserError(f"{spec} lacks the picture {missing}. Unpack the benchmark's pictures there.")
    return samples


def read_all(specs: Sequence[str], limit: int | None = None, seed: int = 0) -> list[Sample]:
    """The samples of several specs (:func:`read`); ids are told apart by the spec they come from."""
    rows = [(spec, read(spec, limit, seed)) for spec in specs]
    return [replace(sample, id=f"{spec} {sample.id}") if len(rows) > 1 else sample
            for spec, samples in rows for sample in samples]


def _draw(count: int, limit: int | None, seed: int) -> list[int]:
    if limit is not None and limit < 1:
        raise UserError(f"At least one sample must be drawn, but the limit is {limit}.")
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))


# FigStep (github.com/ThuCCSLab/FigStep): data/question/safebench.csv with dataset, category_id, task_id, category_name,
# question, instruction; data/images/SafeBench/query_ForbidQI_{category_id}_{task_id}_6.png. Or the Tiny variants.

def _figstep(folder: Path) -> Table:
    root = folder / "data" if (folder / "data").exists() else folder
    tiny = not (root / "question" / "safebench.csv").exists()
    rows = read_csv(root / "question" / ("SafeBench-Tiny.csv" if tiny else "safebench.csv"))
    pictures = root / "images" / ("SafeBench-Tiny" if tiny else "SafeBench")

    def sample(number: int, row: Row) -> Sample:
        place = f"{row['category_id']}_{row['task_id']}"
        return Sample(f"figstep-{place}", CARRIER, "unsafe", row["category_name"],
                      str(pictures / f"query_ForbidQI_{place}_6.png"), kind="figstep", request=row["question"])
    return Table(rows, sample)


# MM-SafetyBench (github.com/isXinLiu/MM-SafetyBench): processed_questions/{scenario}.json, {id: {"Question",
# "Rephrased Question", "Rephrased Question(SD)"}}; imgs/{scenario}/{SD,SD_TYPO,TYPO}/{id}.jpg. On the Hub
# (PKU-Alignment/MM-SafetyBench): one config a scenario, splits SD, SD_TYPO, TYPO, Text_only: id, question, image.

_MMSAFETY_SCENARIOS = ("Illegal_Activitiy", "HateSpeech", "Malware_Generation", "Physical_Harm", "EconomicHarm",
                       "Fraud", "Sex", "Political_Lobbying", "Privacy_Violence", "Legal_Opinion", "Financial_Advice",
                       "Health_Consultation", "Gov_Decision")
_MMSAFETY_KINDS = ("SD", "SD_TYPO", "TYPO")


def _mmsafetybench(folder: Path, kinds: Sequence[str]) -> Table:
    pictures = folder / ("imgs" if (folder / "imgs").exists() else "MM-SafetyBench(imgs)")
    rows = [(file.stem, number, kind, row) for file in sorted((folder / "processed_questions").glob("*.json"))
            for number, row in read_json(file).items() for kind in kinds]

    def sample(_: int, row: tuple[str, str, str, Row]) -> Sample:
        scenario, number, kind, texts = row
        prompt = texts["Rephrased Question(SD)" if kind == "SD" else "Rephrased Question"]
        return Sample(f"{scenario}-{kind}-{number}", prompt, "unsafe", scenario,
                      str(pictures / scenario / kind / f"{number}.jpg"), kind=f"mmsafetybench-{kind}",
                      request=texts["Question"])
    return Table(rows, sample)


def _mmsafetybench_hub(kinds: Sequence[str]) -> Table:
    rows, tables = [], {}
    for scenario in _MMSAFETY_SCENARIOS:
        asked = {str(row["id"]): row["question"]
                 for row in from_hub("PKU-Alignment/MM-SafetyBench", scenario, "Text_only")}
        for kind in kinds:
            tables[scenario, kind] = from_hub("PKU-Alignment/MM-SafetyBench", scenario, kind)
            rows += [(scenario, kind, i, asked) for i in range(len(tables[scenario, kind]))]

    def sample(_: int, row: tuple[str, str, int, Mapping[str, str]]) -> Sample:
        scenario, kind, index, asked = row
        found = tables[scenario, kind][index]
        name = f"{scenario}-{kind}-{found['id']}"
        return Sample(name, found["question"], "unsafe", scenario, keep(found["image"], f"mmsafetybench/{name}"),
                      kind=f"mmsafetybench-{kind}", request=asked.get(str(found["id"])))
    return Table(rows, sample)


# VLGuard (huggingface.co/datasets/ys-zong/VLGuard): test.json, [{"id", "image", "safe", "harmful_category",
# "harmful_subcategory", "instr-resp": [{"safe_instruction", "response"}, {"unsafe_instruction", "response"}] for safe
# pictures, [{"instruction", "response"}] for unsafe ones}]; pictures in test/. "vlguard-train" reads train.json and
# train/ instead, so that calibration need not see what evaluation asks. Its responses to harmful requests are refusals:
# what the harmful answer is contrasted with, never that answer, which the model gives itself. So the model answers the
# harmless ones too: with given answers to those, detectors of answers would learn whose words they read, not harm.

def _vlguard(folder: Path, subsets: Sequence[str], split: str = "test") -> Table:
    keys = {"safe_instruction": "safe-safe", "unsafe_instruction": "safe-unsafe", "instruction": "unsafe"}
    rows = [(row, keys[key], turn, turn[key]) for row in read_json(folder / f"{split}.json")
            for turn in row["instr-resp"] for key in keys if turn.get(key) and keys[key] in subsets]

    def sample(number: int, row: tuple[Row, str, Row, str]) -> Sample:
        entry, subset, turn, instruction = row
        label: Label = "safe" if subset == "safe-safe" else "unsafe"
        return Sample(f"vlguard-{subset}-{entry['id']}-{number}", instruction, label,
                      str(entry.get("harmful_subcategory") or entry.get("harmful_category") or "safe"),
                      str(folder / split / entry["image"]), kind=f"vlguard-{subset}",
                      refusal=turn.get("response") if label == "unsafe" else None)
    return Table(rows, sample)


def _vlguard_hub(subsets: Sequence[str], split: str = "test") -> Table:
    return _vlguard(unpacked_from_hub("ys-zong/VLGuard", split), subsets, split)


# SPA-VL (huggingface.co/datasets/sqrti/SPA-VL): config "test", splits "harm" and "help": image, question, and where the
# split has them class1, class2, class3. A folder holds the parquet files, harm-*.parquet and help-*.parquet.

def _spa_vl(table: Any, split: str) -> Table:
    label: Label = "unsafe" if split == "harm" else "safe"

    def sample(number: int, row: Row) -> Sample:
        name = f"spa-vl-{split}-{number}"
        return Sample(name, row["question"], label, str(row.get("class1") or split),
                      keep(row["image"], f"spa-vl/{name}"), kind=f"spa-vl-{split}")
    return Table(table, sample)


# Its training split (config "default", split "train", files train-*.parquet): image, question, chosen and rejected, two
# models' answers of which `chosen` is preferred for being harmless and helpful. Whether the request is harmful, or the
# rejected answer, is not noted. What the pair shows is taken: where `chosen` refuses and `rejected` answers ("harm"),
# the rejected answer is the harmful one, and the chosen one its safe contrast; where both answer ("help"), the chosen
# answer is a safe text, and the request, less surely, one to be answered. Where `rejected` refuses, nothing is shown.

def _spa_vl_train(subsets: Sequence[str], folder: Path | None = None) -> Table:
    table = from_parquet(folder, "train-*.parquet") if folder else from_hub("sqrti/SPA-VL", None, "train")
    answers = table.select_columns(["chosen", "rejected"])  # so that no picture is decoded on the way
    marks = [(index, "help" if refusal_start(pair["chosen"]) is None else "harm")
             for index, pair in enumerate(answers) if refusal_start(pair["rejected"]) is None]

    def sample(_: int, mark: tuple[int, str]) -> Sample:
        index, subset = mark
        row, harmful = table[index], subset == "harm"
        return Sample(f"spa-vl-train-{index}", row["question"], "unsafe" if harmful else "safe",
                      str(row.get("class1") or subset), keep(row["image"], f"spa-vl/train-{index}"),
                      row["rejected" if harmful else "chosen"], kind=f"spa-vl-train-{subset}",
                      refusal=row["chosen"] if harmful else None)
    return Table([mark for mark in marks if mark[1] in subsets], sample)


# ScienceQA (huggingface.co/datasets/derek-thomas/ScienceQA): split "test": image or none, question, choices, answer (an
# index), hint, subject. The choices are named in the prompt, and the right one's words are expected.

def _scienceqa(table: Any) -> Table:
    def sample(number: int, row: Row) -> Sample:
        hint = f"{row['hint']}\n" if row.get("hint") else ""
        prompt = f"{hint}{row['question']}\nAnswer with one of these: {'; '.join(row['choices'])}."
        return Sample(f"scienceqa-{number}", prompt, "safe", str(row.get("subject", "")),
                      keep(row.get("image"), f"scienceqa/{number}"), kind="scienceqa",
                      expected=tuple(row["choices"][row["answer"]].split()))
    return Table(table, sample)


# GQA (huggingface.co/datasets/lmms-lab/GQA): config testdev_balanced_instructions, split testdev: id, imageId,
# question, answer; config testdev_balanced_images: id, image. A folder holds both as folders of parquet files.

def _gqa(questions: Any, pictures: Any) -> Table:
    place = {str(name): index for index, name in enumerate(pictures["id"])}

    def sample(number: int, row: Row) -> Sample:
        picture = pictures[place[str(row["imageId"])]]["image"]
        return Sample(f"gqa-{row['id']}", f"{row['question']} {SHORT}", "safe", "gqa",
                      keep(picture, f"gqa/{row['imageId']}"), kind="gqa", expected=tuple(row["answer"].split()))
    return Table(questions, sample)


# MM-Vet (github.com/yuweihao/MM-Vet): mm-vet.json, {"v1_0": {"imagename", "question", "answer", "capability"}}; and
# images/.
# Its own judge is GPT-4; here short answers without alternatives ("<OR>") have expected words, the others none.

def _mmvet_expected(answer: str) -> tuple[str, ...]:
    words = answer.replace("<AND>", " ").split()
    return tuple(words) if "<OR>" not in answer and len(words) <= 5 else ()


def _mmvet(folder: Path) -> Table:
    def sample(_: int, item: tuple[str, Row]) -> Sample:
        number, row = item
        return Sample(f"mmvet-{number}", row["question"], "safe", "+".join(row["capability"]),
                      str(folder / "images" / row["imagename"]), kind="mmvet",
                      expected=_mmvet_expected(row["answer"]))
    return Table(list(read_json(folder / "mm-vet.json").items()), sample)


# XSTest (github.com/paul-rottger/xstest): a CSV file with prompt, type, label ("safe" or "unsafe"), and an id.

def _xstest(path: Path) -> Table:
    file = path if path.is_file() else path / "xstest_prompts.csv"
    return Table(read_csv(file), lambda number, row: Sample(
        f"xstest-{row.get('id', number)}", row["prompt"], "safe" if row["label"] == "safe" else "unsafe", row["type"],
        kind="xstest"))


_INSTRUCTIONS, _IMAGES = "testdev_balanced_instructions", "testdev_balanced_images"
_SUBSETS = ("safe-safe", "safe-unsafe", "unsafe")
LOADERS: dict[str, Loader] = {
    "figstep": Loader(_figstep, None),
    **{f"mmsafetybench{name}": Loader(partial(_mmsafetybench, kinds=kinds), partial(_mmsafetybench_hub, kinds=kinds))
       for name, kinds in (("", _MMSAFETY_KINDS), ("-sd", ("SD",)), ("-typo", ("TYPO",)), ("-sd-typo", ("SD_TYPO",)))},
    **{f"vlguard{part}{name}": Loader(partial(_vlguard, subsets=subsets, split=split),
                                      partial(_vlguard_hub, subsets=subsets, split=split))
       for part, split in (("", "test"), ("-train", "train"))
       for name, subsets in (("", _SUBSETS), *((f"-{subset}", (subset,)) for subset in _SUBSETS))},
    "spa-vl": Loader(lambda folder: _spa_vl(from_parquet(folder, "harm-*.parquet"), "harm"),
                     lambda: _spa_vl(from_hub("sqrti/SPA-VL", "test", "harm"), "harm")),
    "spa-vl-help": Loader(lambda folder: _spa_vl(from_parquet(folder, "help-*.parquet"), "help"),
                          lambda: _spa_vl(from_hub("sqrti/SPA-VL", "test", "help"), "help")),
    **{f"spa-vl-train{name}": Loader(partial(_spa_vl_train, subsets), partial(_spa_vl_train, subsets, None))
       for name, subsets in (("", ("harm", "help")), ("-harm", ("harm",)), ("-help", ("help",)))},
    "scienceqa": Loader(lambda folder: _scienceqa(from_parquet(folder, "test-*.parquet")),
                        lambda: _scienceqa(from_hub("derek-thomas/ScienceQA", None, "test"))),
    "gqa": Loader(lambda folder: _gqa(from_parquet(folder / _INSTRUCTIONS, "*.parquet"),
                                      from_parquet(folder / _IMAGES, "*.parquet")),
                  lambda: _gqa(from_hub("lmms-lab/GQA", _INSTRUCTIONS, "testdev"),
                               from_hub("lmms-lab/GQA", _IMAGES, "testdev"))),
    "mmvet": Loader(_mmvet, None),
    "xstest": Loader(_xstest, None),
}
