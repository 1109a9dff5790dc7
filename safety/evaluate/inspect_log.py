"""Answers as logs of inspect_ai, so that they open in the field's own viewer: `inspect view --log-dir DIR/inspect`.

One log per suite and lane. A model provider, "safety", says again what the lane said; inspect_ai runs its task with the
report's scores. Nothing is generated anew. Labels are those of when the answers were given. An optional extra:
requirements-eval.txt.

A request is shown as its lane asked it, with its picture (the blank one in the lane blank-image) as a JPEG of at most
320 pixels a side: 7 to 15 kB each, so some 7 MB for a log of 500 samples. The answers say only where the pictures lie;
the logs hold them, and open anywhere. Of a picture that has been moved since, the log says that it is missing.
"""

import functools
import json
from pathlib import Path
from typing import Any

from safety.errors import UserError
from safety.evaluate.arms import request_of
from safety.evaluate.judges import keyword_judge
from safety.evaluate.records import Key, read_records, text_of
from safety.evaluate.summary import Record, scored
from safety.inputs import open_image, small_copy
from safety.samples import Sample

MEASURES = ("attack_success", "refusal", "over_refusal", "utility", "garbage")  # of a row's "scores"


def scored_answers(folder: Path) -> dict[Key, Record]:
    """The answers that the report counts, with its "scores": by its judge, of samples that every lane answered.

    Raises:
        UserError: the folder holds no summary, or no such answers.
    """
    advice = f"Evaluate first: python -m safety evaluate --out {folder}."
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        refuses, lanes, suites = keyword_judge(summary["judge"]["name"]), summary["lanes"], summary["suites"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'summary.json'} is missing or damaged ({error}). {advice}") from error
    records = read_records(folder)
    found: dict[Key, Record] = {}
    for suite, number in dict.fromkeys((suite, number) for suite, number, _ in records if suite in suites):
        rows = [records.get((suite, number, lane), {"error": "not answered"}) for lane in lanes]
        if not any("error" in row for row in rows):
            found |= zip([(suite, number, lane) for lane in lanes], scored(rows, refuses), strict=True)
    if not found:
        raise UserError(f"{folder} holds no answers. {advice}")
    return found


@functools.lru_cache(maxsize=64)  # one picture follows in every lane
def _copy_of(picture: str) -> str:
    return small_copy(open_image(picture))


def shown(record: Record, folder: Path) -> tuple[str, str | None]:
    """(text, picture as a data URI or None): what the lane of an answer was asked; `folder` holds the answers."""
    picture = record.get("picture")
    sample = Sample(record["id"], record["prompt"], record["label"], record["scenario"],
                    str(folder / picture) if picture else None)
    request = request_of(record["arm"], sample, record.get("read", ""))
    try:
        if request.image is None:
            # Answers of earlier versions do not say where the picture lies.
            return request.prompt + ("\n[Its picture is not known.]" if record["image"] and not picture else ""), None
        return request.prompt, (_copy_of(request.image) if isinstance(request.image, str) else
                                small_copy(open_image(request.image)))
    except UserError as error:
        return f"{request.prompt}\n[Its picture is missing: {error}]", None


def export(folder: Path) -> list[Path]:
    """Write the logs of an evaluation into `folder`/inspect.

    Raises:
        UserError: inspect_ai is not installed, or the folder holds no answers.
    """
    try:
        from inspect_ai import Task, dataset, eval  # inspect_ai's own name for it
        from inspect_ai.model import (
            ChatMessage,
            ChatMessageUser,
            ContentImage,
            ContentText,
            Model,
            ModelAPI,
            ModelOutput,
            get_model,
            modelapi,
        )
        from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
        from inspect_ai.solver import TaskState, generate
    except ImportError as error:
        raise UserError("Logs for inspect_ai need the package inspect-ai: pip install -r requirements-eval.txt."
                        ) from error
    records = scored_answers(folder)

    class Replay(ModelAPI):
        """Says what lane `model_name` said to the sample that the message names."""

        def __init__(self, model_name: str, base_url: str | None = None, api_key: str | None = None,
                     config: Any = None, **arguments: Any) -> None:
            super().__init__(model_name, base_url, api_key)

        async def generate(self, input: list[ChatMessage], tools: Any, tool_choice: Any, config: Any) -> ModelOutput:
            record = records[(input[-1].metadata or {})["suite"], (input[-1].metadata or {})["id"], self.model_name]
            output = ModelOutput.from_content(self.model_name, text_of(record))
            output.metadata = {"events": record["events"], "harm": record["harm"], "finish": record["finish"]}
            return output

    modelapi(name="safety")(Replay)

    def message(record: Record) -> ChatMessageUser:
        text, picture = shown(record, folder)
        images = [ContentImage(image=picture)] if picture else []
        return ChatMessageUser(content=[*images, ContentText(text=text)],
                               metadata={"suite": record["suite"], "id": record["id"]})

    def judged(measure: str) -> Scorer:
        @scorer(name=measure, metrics=[mean(), stderr()])
        def make() -> Scorer:
            async def score(state: TaskState, target: Target) -> Score | None:
                record = records[state.metadata["suite"], str(state.sample_id), state.metadata["arm"]]
                value = record["scores"][measure]
                return None if value is None else Score(value=value, answer=text_of(record))
            return score
        return make()

    for old in (folder / "inspect").glob("*.eval"):  # of an earlier call: they would stand beside the new ones
        old.unlink()
    made = []
    for suite, arm in dict.fromkeys((suite, arm) for suite, _, arm in records):
        rows = [record for (other, _, lane), record in records.items() if (other, lane) == (suite, arm)]
        samples = [dataset.Sample(id=row["id"], target=row["asked"], input=[message(row)], metadata={
            "suite": suite, "arm": arm, "label": row["label"], "scenario": row["scenario"]}) for row in rows]
        applicable = [name for name in MEASURES if any(row["scores"][name] is not None for row in rows)]
        model: Model = get_model(f"safety/{arm}", memoize=False)
        log, = eval(Task(dataset=samples, solver=generate(), scorer=[judged(name) for name in applicable], name=suite),
                    model=model, log_dir=str(folder / "inspect"), display="none", log_format="eval", log_images=True)
        if log.status != "success":
            raise UserError(f"inspect_ai could not write the log of {suite} in lane {arm}: {log.error}.")
        made.append(Path(log.location))
    return made
