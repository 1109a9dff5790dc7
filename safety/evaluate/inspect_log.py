"""Answers as logs of inspect_ai, so that they open in the field's own viewer: `inspect view --log-dir DIR/inspect`.

One log per suite and lane. A model provider, "safety", says again what the lane said; inspect_ai runs its task with the
report's scores. Nothing is generated anew. Labels are those of when the answers were given, and pictures are left out:
the answers' file does not hold them. An optional extra: requirements-eval.txt.
"""

import json
from pathlib import Path
from typing import Any

from safety.errors import UserError
from safety.evaluate.judges import keyword_judge
from safety.evaluate.records import Key, read_records, text_of
from safety.evaluate.summary import Record, scored

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


def export(folder: Path) -> list[Path]:
    """Write the logs of an evaluation into `folder`/inspect.

    Raises:
        UserError: inspect_ai is not installed, or the folder holds no answers.
    """
    try:
        from inspect_ai import Task, eval  # inspect_ai's own name for it
        from inspect_ai.dataset import Sample
        from inspect_ai.model import ChatMessage, ChatMessageUser, Model, ModelAPI, ModelOutput, get_model, modelapi
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

    def judged(measure: str) -> Scorer:
        @scorer(name=measure, metrics=[mean(), stderr()])
        def make() -> Scorer:
            async def score(state: TaskState, target: Target) -> Score | None:
                record = records[state.metadata["suite"], str(state.sample_id), state.metadata["arm"]]
                value = record["scores"][measure]
                return None if value is None else Score(value=value, answer=text_of(record))
            return score
        return make()

    made = []
    for suite, arm in dict.fromkeys((suite, arm) for suite, _, arm in records):
        rows = [record for (other, _, lane), record in records.items() if (other, lane) == (suite, arm)]
        samples = [Sample(id=row["id"], target=row["asked"], metadata={
            "suite": suite, "arm": arm, "label": row["label"], "scenario": row["scenario"]},
            input=[ChatMessageUser(content=row["prompt"], metadata={"suite": suite, "id": row["id"]})]) for row in rows]
        applicable = [name for name in MEASURES if any(row["scores"][name] is not None for row in rows)]
        model: Model = get_model(f"safety/{arm}", memoize=False)
        log, = eval(Task(dataset=samples, solver=generate(), scorer=[judged(name) for name in applicable], name=suite),
                    model=model, log_dir=str(folder / "inspect"), display="none", log_format="eval")
        if log.status != "success":
            raise UserError(f"inspect_ai could not write the log of {suite} in lane {arm}: {log.error}.")
        made.append(Path(log.location))
    return made
