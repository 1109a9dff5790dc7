"""python -m safety attack: make suites of perturbed pictures, which `evaluate --suite FILE` then runs.

Without --suite, each sample is a harmful request as text, of the held-out split, beside a picture that has nothing to
do with it: a coloured shape. Undefended, the model refuses most of them; the picture is perturbed until it does not.
With --suite, the harmful samples of a suite, file or benchmark that have a picture are perturbed instead. There is a
suite for every radius and every lane that is attacked through; "none" is the attacker who knows the model only. Radius
0 is the control: the same pictures, unperturbed.
"""

import argparse
import functools
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from safety.artifacts import Artifacts, fingerprint, load_artifacts
from safety.errors import UserError
from safety.evaluate import draw, suites
from safety.evaluate.arms import UNCALIBRATED, Arm, digest, parse_arms
from safety.evaluate.attacks import Pgd, Surrogate, descend
from safety.flags import count
from safety.inputs import open_image
from safety.loading import load
from safety.lvlm import LVLM
from safety.mini import corpus
from safety.quantize import Int8Linear
from safety.samples import Sample, write_samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `attack` (the model's are added by the caller)."""
    parser.add_argument("--epsilon", default="0,16,32,64,128", help="radii in 255ths (default %(default)s)")
    parser.add_argument("--through", default="none", help="lanes that are attacked through: none (default) attacks the "
                        "undefended model, sasa,revision,sapt,all their defenses")
    parser.add_argument("--suite", metavar="NAME|FILE|BENCHMARK:DIR", help="harmful requests with pictures to perturb, "
                        "as `evaluate` names them (default: requests as text, each beside a coloured shape)")
    parser.add_argument("--steps", type=count, default=Pgd.steps, help="steps of the descent (default %(default)s)")
    parser.add_argument("--limit", type=count, default=20, help="samples of each suite (default %(default)s)")
    parser.add_argument("--artifacts", type=Path, help="calibrated artifacts (default: those shipped for the model)")
    parser.add_argument("--out", type=Path, default=Path("build/attack"),
                        help="folder of suites and pictures; taken up again (default build/attack)")


def run(load_model: Callable[[], LVLM], arguments: argparse.Namespace) -> int:
    """Write OUT/pgd-RADIUS-LANE.jsonl for every radius and lane; pictures that are there already are kept."""
    try:
        radii = [int(text) for text in arguments.epsilon.split(",")]
    except ValueError as error:
        raise UserError(f"--epsilon must be whole numbers such as 16,64, but it is {arguments.epsilon!r}.") from error
    if not all(0 <= radius <= 255 for radius in radii):
        raise UserError(f"--epsilon must be between 0 and 255, but it is {arguments.epsilon!r}.")

    for arm in parse_arms(arguments.through, lambda folder: UNCALIBRATED):
        if arm.baseline & {"no-image", "blank-image", "read-aloud"}:
            raise UserError(f"The lane {arm.name!r} cannot be attacked through: it is asked something else than the "
                            "picture, or more. Attack through none, and evaluate the pictures in this lane.")
        if arm.lane.sasa is not None and arm.lane.sasa.mode == "project":
            raise UserError(f"The lane {arm.name!r} cannot be attacked through: its answers are written behind SASA's "
                            "projection, which the attack does not follow. Attack through none, and evaluate the "
                            "pictures in this lane.")
    pictures = arguments.out / "pictures"
    requests = (suite_samples(arguments.suite, pictures, arguments.limit) if arguments.suite
                else base_samples(pictures, arguments.limit))
    pictures.mkdir(parents=True, exist_ok=True)
    lvlm = load_model()

    @functools.cache
    def calibrated(folder: str | None) -> Artifacts:
        return load_artifacts(lvlm, folder or arguments.artifacts)

    arms = parse_arms(arguments.through, calibrated)
    int8 = any(isinstance(module, Int8Linear) for module in lvlm.model.modules())
    differentiable = load(lvlm.name, "none") if int8 else lvlm  # the same weights; gradients cannot pass through int8
    jobs = [(radius, arm) for radius in radii for arm in (arms if radius else arms[:1])]
    with tqdm(total=len(jobs) * len(requests), unit="picture", mininterval=1) as bar:
        for radius, arm in jobs:
            name = f"pgd-{radius}-{_file_name(arm.name)}" if radius else "pgd-0"
            samples = []
            for sample in requests:
                samples.append(_perturbed(differentiable, arm.artifacts(calibrated(arm.folder)), arm, sample,
                                          Pgd(radius, arguments.steps), name, pictures, bar))
                bar.update()
            write_samples(samples, arguments.out / f"{name}.jsonl")
            bar.write(str(arguments.out / f"{name}.jsonl"))
    return 0


def base_samples(folder: Path, count: int) -> list[Sample]:
    """Harmful held-out requests as text, each beside the picture of a coloured shape."""
    rows = list(corpus.harmful("heldout"))
    random.Random("perturbed pictures").shuffle(rows)  # so that a smaller suite is the beginning of a larger one
    samples = []
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows[:count]):
        path = folder / f"shape-{number:03}.png"
        draw.any_shape(f"shape {number}").save(path)
        samples.append(Sample(f"pgd-{number:03}", row.text, "unsafe", row.category, str(path), kind="pgd"))
    return samples


def suite_samples(suite: str, folder: Path, count: int) -> list[Sample]:
    """The first harmful samples with pictures of a suite.

    Raises:
        UserError: it has none, or is unknown.
    """
    found = [sample for sample in suites.suite(suite, folder, None)[1] if sample.unsafe and sample.image]
    if not found:
        raise UserError(f"{suite} has no harmful request with a picture to perturb.")
    return found[:count]


def _file_name(lane: str) -> str:
    """A lane's name as part of a file's: what cannot stand there is replaced, and a digest keeps lanes apart."""
    plain = re.sub(r"[^\w.=+-]", "-", lane)
    return plain if plain == lane else f"{plain}-{digest(lane)[:6]}"


def _perturbed(lvlm: LVLM, artifacts: Artifacts, arm: Arm, sample: Sample, settings: Pgd, name: str, folder: Path,
               bar: tqdm) -> Sample:
    """The sample with its picture perturbed; made once for these weights, artifacts and settings."""
    key = digest([fingerprint(lvlm), artifacts, arm, settings, sample.prompt, Path(str(sample.image))])
    path = folder / f"{name}-{_file_name(sample.id)}-{key}.png"
    if not path.exists():
        artifacts.check(arm.lane, lvlm.blocks)
        surrogate = Surrogate(lvlm, artifacts, arm.lane, arm.request(sample).prompt, open_image(str(sample.image)),
                              settings.target)
        picture, losses = descend(surrogate, settings,
                                  lambda step, loss: bar.set_postfix_str(f"{name} step {step}: loss {loss:.2f}"))
        draft = path.with_suffix(".tmp")
        picture.save(draft, "PNG")
        draft.replace(path)
        bar.write(f"{name} {sample.id}: loss {losses[0]:.2f} → {min(losses):.2f}")
    return replace(sample, id=f"{name}-{sample.id}", image=str(path), kind=name, response=None, request=sample.asked)
