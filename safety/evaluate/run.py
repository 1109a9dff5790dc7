"""Answer every sample of every suite in every arm, resumably.

Decoding is greedy. In fp32 an answer does not depend on the batch that it was given in. In int8 and in 16 bits it can:
the shape of a batch decides how sums are rounded, and a near tie between two tokens may then fall otherwise. So the
samples of a suite are always cut into the same batches, and the size of a batch is part of what answers are kept for; a
repetition with the same lanes, limit, batch size and number of processes on the same hardware gives the same answers.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from safety.artifacts import Artifacts, fingerprint
from safety.engine import Engine, Request
from safety.errors import UserError
from safety.evaluate.arms import Arm, digest, groups
from safety.evaluate.records import Key, Writer, read_records
from safety.lvlm import LVLM
from safety.reading import ALOUD_TOKENS, READ_ALOUD
from safety.samples import Sample
from safety.settings import MAX_LANES, Lane
from safety.transcript import Answer

ANSWER_TOKENS, BATCH = 48, 8  # length of the answers, and requests answered at once, if nobody says otherwise
DIGITS = 4  # of the probabilities that are kept
READABLE = ("number format", "--max-new-tokens", "--batch")  # parts of an answer's key that say something by themselves


def answer_key(lvlm: LVLM, artifacts: Artifacts, arm: Arm, max_new_tokens: int, batch: int) -> dict[str, Any]:
    """All that determines an arm's answers, but for the sample, by name: what is long as a digest. What the artifacts
    note about their making changes no answer."""
    return {"model": digest([fingerprint(lvlm)]), "number format": lvlm.label,
            "calibration or setting of the lane": digest([replace(artifacts, about={}), arm]),
            "--max-new-tokens": max_new_tokens, "--batch": batch}


def sample_key(sample: Sample) -> str:
    """Digest of what an answer to a sample depends on: the prompt, and the picture's bytes."""
    picture = Path(sample.image) if sample.image else None
    return digest([sample.prompt, picture if picture and picture.is_file() else str(picture)])


def _changed(before: Any, now: Mapping[str, Any]) -> str:
    """Which parts of an answer's key differ, in words, with both values where a person can read them."""
    old = before if isinstance(before, dict) else {}  # an earlier version kept one digest
    return " and ".join(f"another {name}" + (f" ({old[name]}, now {value})" if name in old and name in READABLE else "")
                        for name, value in now.items() if old.get(name) != value)


def collect(lvlm: LVLM, calibrated: Callable[[str | None], Artifacts], suites: Mapping[str, Sequence[Sample]],
            arms: Sequence[Arm], out: Path, *, max_new_tokens: int = ANSWER_TOKENS, batch: int = BATCH,
            process: int = 0, processes: int = 1) -> dict[Key, dict[str, Any]]:
    """Give the answers that `out` does not hold yet.

    Args:
        calibrated: the artifacts of a folder; None for the default ones.
        suites: samples by suite name. arms: the first is the one that the others are compared with.
        out: folder of the answers; may hold some of them already, from a run that was stopped.
        batch: requests answered at once, each in up to MAX_LANES lanes.
        process, processes: this process takes every `processes`-th sample; each writes a file of its own.

    Returns: all answers of these suites and arms that are in the folder, each with the label, scenario, request and
        expected words that its sample has now: a suite's labels can be corrected without answering it again.

    Raises:
        UserError: the folder holds answers of another model, other artifacts, settings or samples; or no sample of a
            suite could be answered.
    """
    groupings = groups(arms, MAX_LANES)
    engines = {id(group): Engine(lvlm, group[0].artifacts(calibrated(group[0].folder))) for group in groupings}
    keys = {}
    for group in groupings:
        artifacts = engines[id(group)].artifacts
        for arm in group:
            artifacts.check(arm.lane, lvlm.blocks)
            keys[arm.name] = answer_key(lvlm, artifacts, arm, max_new_tokens, batch)
    wanted = {(suite, sample.id, arm.name): keys[arm.name] | {"prompt or picture": shown}
              for suite, samples in suites.items() for sample in samples for shown in [sample_key(sample)]
              for arm in arms}
    # What could not be served is tried again: the picture may have been mended.
    known = {key: record for key, record in read_records(out).items() if "error" not in record} if out.exists() else {}
    stale = next((key for key, value in wanted.items() if key in known and known[key]["key"] != value), None)
    if stale:
        suite, sample_id, lane = stale
        changed = _changed(known[stale]["key"], wanted[stale])
        raise UserError(f"{out} holds an answer to sample {sample_id!r} of suite {suite!r} in lane {lane!r} that was "
                        f"given with {changed}. Choose another --out, or delete that folder.")
    todo = [(suite, group, rows) for suite, samples in suites.items() for group in groupings
            for rows in _cut(samples[process::processes], batch) if any(
                (suite, sample.id, arm.name) not in known for sample in rows for arm in group)]
    with Writer(out, process) as writer, tqdm(total=sum(len(rows) for _, _, rows in todo), unit="request",
                                              desc="evaluate", mininterval=1, disable=not todo or process > 0) as bar:
        for suite, group, rows in todo:
            bar.set_postfix_str(f"{suite}: {', '.join(arm.name for arm in group)}"[:60])
            answered = _answers(engines[id(group)], group, rows, max_new_tokens)
            writer.write(_record(suite, sample, arm, wanted[suite, sample.id, arm.name], answer, out) | heard
                         for sample, (heard, answers) in zip(rows, answered, strict=True)
                         for arm, answer in zip(group, answers, strict=True)
                         if (suite, sample.id, arm.name) not in known)
            bar.update(len(rows))
    now = {(suite, sample.id): _known(sample) for suite, samples in suites.items() for sample in samples}
    records = {key: record | now[key[:2]] for key, record in read_records(out).items() if key in wanted}
    for suite in suites:
        found = [record for (name, _, _), record in records.items() if name == suite]
        if processes == 1 and all("error" in record for record in found):
            raise UserError(f"No sample of suite {suite} could be answered. The first error: {found[0]['error']}"
                            if found else f"Suite {suite} holds no samples.")
    return records


def _cut(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    return [samples[start:start + size] for start in range(0, len(samples), size)]


def _answers(engine: Engine, group: Sequence[Arm], samples: Sequence[Sample],
             max_new_tokens: int) -> list[tuple[dict[str, str], list[Answer | str]]]:
    """For each sample, {"read": what was read aloud} if the group does that, and the answers [arm]; the message of the
    error in place of the answers to a sample that cannot be served."""
    lanes = [arm.lane for arm in group]
    try:
        read, seconds = _read_aloud(engine, group[0], samples)
        requests = [group[0].request(sample, text) for sample, text in zip(samples, read, strict=True)]
        answers = engine.answer_batch(requests, lanes=lanes, max_new_tokens=max_new_tokens)
    except UserError as error:
        if len(samples) == 1:
            return [({}, [str(error) for _ in group])]
        return [row for sample in samples for row in _answers(engine, group, [sample], max_new_tokens)]
    for row in answers:
        for answer in row:  # what an answer costs in this batch: the batch's rows share the machine
            answer.seconds = (answer.seconds + seconds) / (len(samples) * len(lanes))
    return [({"read": text} if group[0].reads_aloud else {}, list(row))
            for text, row in zip(read, answers, strict=True)]


def _read_aloud(engine: Engine, arm: Arm, samples: Sequence[Sample]) -> tuple[list[str], float]:
    """What the undefended model reads in each sample's own picture ("" without one), for an arm that has it read aloud;
    and the seconds that this took."""
    pictures = {number: sample.image for number, sample in enumerate(samples) if sample.image is not None}
    if not arm.reads_aloud or not pictures:
        return [""] * len(samples), 0.0
    rows = engine.answer_batch([Request(READ_ALOUD, image) for image in pictures.values()], lanes=[Lane("reading")],
                               max_new_tokens=ALOUD_TOKENS)
    heard = dict(zip(pictures, (answer for answer, in rows), strict=True))
    return ([heard[number].text.strip() if number in heard else "" for number in range(len(samples))],
            max(answer.seconds for answer in heard.values()))


def _known(sample: Sample) -> dict[str, Any]:
    """What is known about a sample and what answers are judged by, but does not change them."""
    return {"label": sample.label, "scenario": sample.scenario, "asked": sample.asked,
            "expected": list(sample.expected)}


def _record(suite: str, sample: Sample, arm: Arm, key: Mapping[str, Any], answer: Answer | str,
            out: Path) -> dict[str, Any]:
    """One line of the file: the sample, and the whole transcript in one arm. Where its picture lies is written relative
    to the folder of the answers, so that both can be moved together."""
    picture = None if sample.image is None else os.path.relpath(sample.image, out)
    record: dict[str, Any] = {"suite": suite, "id": sample.id, "arm": arm.name, "key": key, "prompt": sample.prompt,
                              "image": sample.image is not None, "picture": picture, **_known(sample)}
    if isinstance(answer, str):
        return record | {"error": answer}
    events = [{**asdict(event), "probability": round(event.probability, DIGITS)} for event in answer.events]
    harm = [None if value is None else round(value, DIGITS) for value in answer.harm]
    return record | {"tokens": answer.tokens, "finish": answer.finish, "events": events, "harm": harm,
                     "seconds": round(answer.seconds, DIGITS)}


def processes() -> tuple[int, int]:
    """(number of this process, number of processes) under `accelerate launch`; (0, 1) otherwise."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def one_gpu_each() -> None:
    """Show each process of a machine one GPU, in turn where there are fewer than processes.

    To be called before anything asks CUDA, which looks only once.
    """
    if processes()[1] > 1:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = shown.split(",") if shown else [str(number) for number in range(torch.cuda.device_count())]
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(os.environ.get("LOCAL_RANK", 0)) % len(gpus)]


def join() -> Callable[[], None]:
    """Meet the other processes of this launch, before the work; returns what waits until all have done theirs.

    Answers then lie complete in the folder, which all machines must share.
    """
    from accelerate import PartialState
    # Processes finish hours apart where one has the slower device; torch gives up after half an hour otherwise.
    PartialState(cpu=True, timeout=timedelta(days=7))
    # Not accelerate's wait_for_everyone, which names a GPU by the process's number: each process sees only one.
    return torch.distributed.barrier


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step, so that a reader never finds half of it."""
    draft = path.with_suffix(f".{os.getpid()}.part")
    draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)
