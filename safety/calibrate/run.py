"""The stages of a calibration, from samples to artifacts, and the command that runs them.

Everything slow is kept in the work folder, under names that change with whatever it depends on (weights, number format,
samples, recipe). A start after a kill, at any point, takes up what holds and does the rest; nothing stale is trusted.
"""

import argparse
import json
import platform
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import sklearn
import torch
import transformers
from tqdm import tqdm

from safety.artifacts import Artifacts, default_folder, load_artifacts, save_artifacts
from safety.benchmarks import read_all
from safety.calibrate import revision, sapt, sasa, trace, trial
from safety.calibrate.material import JUDGES, PARTS, Construction, Material, Recipe
from safety.calibrate.observe import digest, model_key, observe, refusal_for, sample_key
from safety.calibrate.progress import Progress, Report
from safety.calibrate.samples import miniature_samples
from safety.engine import Engine
from safety.errors import UserError
from safety.evaluate.arms import parse_arms
from safety.evaluate.run import write_json
from safety.flags import count, seed
from safety.lvlm import LVLM, MINIATURE
from safety.samples import Sample
from safety.settings import Sapt, check_length

FITS = {"sasa": sasa.fit, "revision": revision.fit, "sapt": sapt.fit, "trace": trace.fit}
LEAST = 20  # samples of each label
PER_KIND = 180  # the miniature's samples of each kind that it answers: an hour or two on two cores
HELD_OUT = 60  # the miniature's samples of each kind for the closing trial


def calibrate(lvlm: LVLM, samples: Sequence[Sample], held_out: Sequence[Sample], out: Path, work: Path,
              parts: Sequence[str] = PARTS, report: Report = lambda stage, done, total: None,
              cancel: threading.Event | None = None, recipe: Recipe = Recipe(), command: str | None = None
              ) -> Artifacts:
    """Fit `parts` and write the artifact folder `out`; parts that are there already and not asked for are kept.

    The model's lock is held only while something runs on the model, so other runs wait for a sample, not for the end.

    Args:
        held_out: samples that take no part, for the closing trial of all lanes (run when all four parts are there).
        work: intermediate results; see above. Delete it to free the disk.
        report: called with (stage, steps done, steps in all). cancel: set it to stop at the next step.
        command: what would do it again; noted in the artifacts.

    Raises:
        UserError: settings out of range, too few samples, none that a part can learn from, or another model's parts in
            `out`; says what to do.
        Cancelled: `cancel` was set; what was finished stays in the work folder.
    """
    Sapt(interval=recipe.interval).check()
    check_length(recipe.answer_tokens)
    unsafe = sum(sample.unsafe for sample in samples)
    if min(unsafe, len(samples) - unsafe) < LEAST:
        raise UserError(f"Calibration needs at least {LEAST} safe and {LEAST} unsafe samples; these are "
                        f"{len(samples) - unsafe} safe and {unsafe} unsafe ones: give more, or another set too.")
    if set(parts) != set(PARTS) and (out / "config.json").exists():
        load_artifacts(lvlm, out)  # what is kept must fit, or be refused before the work rather than after it
    judge = Material(lvlm, samples, [], recipe, work, out).validation
    if not all(any(judge[i] and sample.unsafe == side for i, sample in enumerate(samples)) for side in (True, False)):
        raise UserError(f"One in {JUDGES} samples of each kind judges, so at least one kind of safe and one of unsafe "
                        f"samples needs {JUDGES} or more: give more, or fewer kinds.")
    progress = Progress(report, cancel)
    work = work / model_key(lvlm)
    refusals = [refusal_for(sample, index) if sample.unsafe and sample.response != "" else None
                for index, sample in enumerate(samples)]
    observed = observe(lvlm, samples, refusals, sasa.tried_pairs(lvlm), work / "samples", recipe.answer_tokens,
                       progress, unanswered="sasa" in parts)
    material = Material(lvlm, samples, observed, recipe, work, out, progress)
    made = Artifacts()
    for part in parts:
        made.about[part] = FITS[part](material, made)
    artifacts = _merged(made, parts, lvlm, out)
    about = artifacts.about
    # Parts that were kept learned from the samples of their own calibration: none of those is unseen either.
    digests = {sample.request_digest for sample in samples} | set(about.get("sample_digests", []))
    if command:
        about["command"] = command
    about |= {"samples": _census(material), "sample_digests": sorted(digests),
              "recipe": asdict(recipe),
              "seconds": about.get("seconds", {}) | progress.seconds,
              "date": datetime.now(UTC).date().isoformat(), "number_format": lvlm.label,
              "versions": {"python": platform.python_version(), "torch": torch.__version__,
                           "transformers": transformers.__version__, "scikit-learn": sklearn.__version__}}
    save_artifacts(artifacts, lvlm, out)  # before the trial, so that nothing is lost if it is stopped
    if held_out and set(PARTS) <= set(about):
        about["held_out"] = _try_lanes(Engine(lvlm, artifacts), held_out, recipe, out, work, progress)
        save_artifacts(artifacts, lvlm, out)
    return artifacts


def _merged(made: Artifacts, parts: Sequence[str], lvlm: LVLM, out: Path) -> Artifacts:
    """The parts just made, in place of those in the folder. It is read only now: another process may have fitted other
    parts meanwhile."""
    if set(parts) == set(PARTS) or not (out / "config.json").exists():
        return made
    there = load_artifacts(lvlm, out)
    for part in (*parts, *(["layers"] if "sasa" in parts else [])):
        setattr(there, part, getattr(made, part))
        if hasattr(made.settings, part):
            setattr(there.settings, part, getattr(made.settings, part))
    there.about |= made.about
    there.about.pop("held_out", None)  # was measured with the parts that were replaced
    return there


def _census(material: Material) -> dict[str, dict[str, int]]:
    """Per kind: how many samples; kept out of fits; with a whole answer; of those, complied with and read rightly."""
    table: dict[str, dict[str, int]] = {}
    for index, sample in enumerate(material.samples):
        row = table.setdefault(sample.kind, dict.fromkeys(("n", "validation", "answered", "complied", "understood"), 0))
        row["n"] += 1
        row["validation"] += int(material.validation[index])
        row["answered"] += int(material.whole[index])
        row["complied"] += int(material.complied[index] and material.whole[index])
        row["understood"] += int(material.understood[index] and material.whole[index])
    return table


def _try_lanes(engine: Engine, samples: Sequence[Sample], recipe: Recipe, out: Path, work: Path, progress: Progress
               ) -> dict[str, Any]:
    """Refusals of each shipped lane on samples that calibration has not seen; every batch is kept when it is done."""
    sasa_part = engine.artifacts.sasa
    names = "none,sasa,revision,sapt,all" + (",sasa:mode=reading" if sasa_part and sasa_part.reading else "")
    lanes = [arm.lane for arm in parse_arms(names, lambda folder: engine.artifacts)]
    config = json.loads((out / "config.json").read_text())
    depends_on = (config["files"], config["settings"], names, recipe.answer_tokens,
                  [sample_key(sample) for sample in samples])
    path = work / f"trial-{digest(*depends_on)}.json"
    known: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {}
    missing = [sample for sample in samples if sample.id not in known]
    with progress.stage("held-out trial", len(samples), len(samples) - len(missing)) as tick:
        for start in range(0, len(missing), trial.BATCH):
            part = missing[start:start + trial.BATCH]
            rows = trial.answer_all(engine, part, lanes, recipe.answer_tokens, tick=tick)
            known |= {sample.id: [answer.text for answer in answers]
                      for sample, answers in zip(part, rows, strict=True)}
            write_json(path, known)
    return {lane.name: trial.tally(samples, [known[sample.id][number] for sample in samples])
            for number, lane in enumerate(lanes)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--data", action="append", metavar="SPEC", help="samples: a JSONL file or a benchmark such as "
                        "figstep:DIR (see docs/evaluation.md); may be given several times. The miniature has its own")
    parser.add_argument("--held-out", action="append", metavar="SPEC", help="samples for the closing trial, likewise")
    parser.add_argument("--limit", type=count, help="read at most so many samples of each --data and --held-out")
    parser.add_argument("--out", type=Path, help="where the artifacts go (default artifacts/<model>/defenses)")
    parser.add_argument("--work", type=Path, default=Path("build") / "calibrate",
                        help="intermediate results, taken up again (default build/calibrate)")
    for part in PARTS:
        parser.add_argument(f"--{part}", action="store_true", help=f"fit {part} (default: everything)")
    recipe = Recipe()
    parser.add_argument("--per-kind", type=count, default=PER_KIND, help="the miniature's samples of each kind "
                        "(default %(default)s: an hour or two on two cores)")
    parser.add_argument("--per-scenario", type=count, help="fit SASA's probes on so many samples of each scenario, "
                        "label and kind; 10 is the paper (default: all)")
    parser.add_argument("--construction", choices=get_args(Construction),
                        default=recipe.construction, help="revision's contrasting pairs (default %(default)s)")
    parser.add_argument("--soft-tokens", type=count, default=recipe.soft.length, help="length of SAPT's soft prompt")
    parser.add_argument("--soft-steps", type=count, default=recipe.soft.steps, help="training steps at most")
    parser.add_argument("--interval", type=count, default=recipe.interval, help="tokens between SAPT's checks")
    parser.add_argument("--detector", choices=("joint", "frozen"), default=recipe.detector, help="SAPT's detector")
    parser.add_argument("--false-alarms", type=float, default=recipe.false_alarms, help="share of benign requests of "
                        "any kind that a threshold may stop (default %(default)s)")
    parser.add_argument("--answer-tokens", type=count, default=recipe.answer_tokens,
                        help="length of the answers that are learned from")
    parser.add_argument("--seed", type=seed, default=recipe.seed)


def run(load: Callable[[], LVLM], arguments: argparse.Namespace) -> int:
    """The command: read samples, load the model, calibrate with progress bars, and print what came of it."""
    parts = [part for part in PARTS if getattr(arguments, part)] or list(PARTS)
    if not 0 < arguments.false_alarms < 1:
        raise UserError(f"--false-alarms must lie between 0 and 1, but it is {arguments.false_alarms:g}.")
    recipe = Recipe(arguments.answer_tokens, arguments.false_alarms, arguments.per_scenario, arguments.construction,
                    detector=arguments.detector, interval=arguments.interval, seed=arguments.seed)
    recipe = replace(recipe, soft=replace(recipe.soft, length=arguments.soft_tokens, steps=arguments.soft_steps,
                                          seed=arguments.seed))
    held_out = read_all(arguments.held_out or [], arguments.limit, arguments.seed)
    if arguments.data:
        samples = read_all(arguments.data, arguments.limit, arguments.seed)
    elif arguments.model == MINIATURE:
        samples = miniature_samples(arguments.work / "images", "train", arguments.per_kind, arguments.seed)
        held_out = held_out or miniature_samples(arguments.work / "images", "heldout", HELD_OUT, arguments.seed)
    else:
        raise UserError("Give --data: only the miniature brings samples of its own.")
    lvlm = load()
    out = arguments.out or default_folder(lvlm)
    with _Bars() as bars:
        artifacts = calibrate(lvlm, samples, held_out, out, arguments.work, parts, bars, recipe=recipe,
                              command=f"python -m safety {shlex.join(sys.argv[1:])}")
    for lane, kinds in artifacts.about.get("held_out", {}).items():
        print(f"{lane:9}", *(f"{kind}: refused {row['refused']['hits']}/{row['refused']['n']}"
                             f" garbage {row['garbage']['hits']}" for kind, row in kinds.items()), sep="  ")
    print(f"Saved to {out}.")
    return 0


class _Bars:
    """A progress bar with the time left for each stage, one below the other."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.bar is None or self.stage != stage:
            self.close()
            self.bar, self.stage = tqdm(total=total, initial=done, desc=stage), stage
        self.bar.n = done
        self.bar.refresh()

    def close(self) -> None:
        """Finish the current bar."""
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
