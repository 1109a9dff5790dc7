"""python -m safety generate | calibrate | evaluate | attack | report | artifacts | bench | mini"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safety.errors import UserError, about_file, out_of_memory
from safety.flags import count
from safety.settings import MAX_LANES, NEW_TOKENS, Lane, Sampling, check_length

if TYPE_CHECKING:
    from safety.artifacts import Artifacts
    from safety.engine import Request


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. A UserError, a file or disk that fails, or memory that runs out becomes
    one sentence on stderr and status 2."""
    parser = argparse.ArgumentParser(prog="python -m safety", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="answer one or many requests in several lanes")
    _add_generate(generate)
    calibrate = commands.add_parser("calibrate", help="fit the three defenses and the trace detector for a model")
    _add_model(calibrate, revision=False)  # there, --revision is a defense
    from safety.calibrate import run as calibration
    calibration.add_arguments(calibrate)
    evaluate = commands.add_parser("evaluate", help="measure every lane on attacks and on benign requests")
    _add_model(evaluate)
    from safety.evaluate import command as evaluation
    evaluation.add_arguments(evaluate)
    attack = commands.add_parser("attack", help="perturb pictures until refused requests are answered")
    _add_model(attack)
    from safety.evaluate import adversarial
    adversarial.add_arguments(attack)
    evaluation.add_report_arguments(commands.add_parser("report", help="write an evaluation's report again"))
    from safety import share
    share.add_arguments(commands.add_parser("artifacts", help="list, push, pull or transfer artifacts"), _add_model)
    bench = commands.add_parser("bench", help="measure speed ratios on this machine")
    bench.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    bench.add_argument("--repeats", type=count, default=5, help="measurements of each row (default %(default)s)")
    bench.add_argument("--gpu", action="store_true", help="LLaVA-1.5-7B, random weights, on a GPU: bf16 and 4 bits")
    bench.add_argument("--tiny", action="store_true", help="with --gpu: try it out on a small model, on a CPU too")
    bench.add_argument("--out", type=Path, default=Path("build/bench_gpu.json"), help="with --gpu: where results go")
    mini = commands.add_parser("mini", help="build or measure the miniature LVLM")
    from safety.mini import build
    build.add_arguments(mini)
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "generate":
            return _generate(arguments)
        if arguments.command == "calibrate":
            return calibration.run(lambda: _load(arguments), arguments)
        if arguments.command == "evaluate":
            if arguments.check_judge:
                return evaluation.check_judge(arguments.check_judge)
            evaluation.run.one_gpu_each()
            return evaluation.evaluate(lambda: _load(arguments), arguments)
        if arguments.command == "attack":
            return adversarial.run(lambda: _load(arguments), arguments)
        if arguments.command == "report":
            return evaluation.report(arguments)
        if arguments.command == "artifacts":
            return share.run(arguments, lambda: _load(arguments))
        if arguments.command == "bench":
            if arguments.gpu:
                if arguments.json:
                    raise UserError("With --gpu, results are written as JSON to --out: leave --json out.")
                from safety import bench_gpu
                return bench_gpu.run(arguments.repeats, arguments.out, arguments.tiny)
            if arguments.tiny:
                raise UserError("--tiny is a way to try --gpu out: give both, or neither.")
            from safety.bench import run as run_bench
            return run_bench(arguments.repeats, arguments.json)
        return build.run(arguments) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"error: {about_file(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print("error: The memory ran out. Try fewer lanes, shorter answers, smaller pictures or batches, or a smaller "
              "--quantization.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _add_model(parser: argparse.ArgumentParser, revision: bool = True) -> None:
    parser.add_argument("--model", default="miniature", help="miniature (default), a Hugging Face id, or a folder")
    parser.add_argument("--quantization", help="none, bf16, int8 or nf4 (default: what is fastest here)")
    if revision:
        parser.add_argument("--revision", dest="model_revision", metavar="REVISION",
                            help="branch, tag or commit on the Hub; --model owner/name@REVISION says the same")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--artifacts", type=Path, help="calibrated artifacts (default: those shipped for the model)")
    parser.add_argument("--image", type=Path, help="a picture; without one the run is text-only")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="what to ask")
    what.add_argument("--requests", type=Path, metavar="FILE.jsonl",
                      help='many requests, one {"prompt": …, "image": …} per line; one JSON object per line comes out')
    parser.add_argument("--lanes", default="none,all",
                        help="none, sasa, revision, sapt, all, stacks such as sasa+sapt, and settings such as "
                             "sapt:threshold=0.7 (default none,all)")
    parser.add_argument("--max-new-tokens", type=int, default=NEW_TOKENS, help="(default %(default)s)")
    parser.add_argument("--temperature", type=float, default=Sampling.temperature, help="0 (default) is greedy")
    parser.add_argument("--top-p", type=float, default=Sampling.top_p)
    parser.add_argument("--seed", type=int, default=Sampling.seed)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _load(arguments: argparse.Namespace) -> Any:
    from safety.loading import load
    return load(arguments.model, arguments.quantization, getattr(arguments, "model_revision", None),
                progress=lambda message: print(message, file=sys.stderr))


def _generate(arguments: argparse.Namespace) -> int:
    from safety.artifacts import load_artifacts
    from safety.engine import Engine
    from safety.evaluate.arms import UNCALIBRATED
    from safety.samples import numbered_lines
    if arguments.requests is not None and arguments.image is not None:
        raise UserError("With --requests, give each image in its line of the file instead of --image.")
    # All that needs no model is refused before one is loaded.
    lines = numbered_lines(arguments.requests, "requests file") if arguments.requests else [(1, "")]
    if not lines:
        raise UserError(f'{arguments.requests} holds no requests. Write one {{"prompt": …}} per line.')
    asked = None if arguments.requests else _single_request(arguments.prompt, arguments.image)
    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.seed)
    sampling.check()
    check_length(arguments.max_new_tokens)
    _lanes(arguments.lanes, UNCALIBRATED)
    lvlm = _load(arguments)
    engine = Engine(lvlm, load_artifacts(lvlm, arguments.artifacts))
    lanes = _lanes(arguments.lanes, engine.artifacts)
    failed = False
    for number, line in lines:
        try:
            request = asked or _request(line, arguments.requests.parent)
            answers = engine.answer(request.prompt, request.image, lanes=lanes, sampling=sampling,
                                    max_new_tokens=arguments.max_new_tokens)
        except UserError as error:
            if arguments.requests is None:
                raise
            # One bad line must not lose the others: it is answered in its place.
            failed = True
            print(json.dumps({"model": lvlm.name, "error": str(error)}), flush=True)
            print(f"error: line {number}: {error}", file=sys.stderr)
            continue
        if arguments.json or arguments.requests is not None:
            print(json.dumps({"model": lvlm.name, "label": lvlm.label,
                              "lanes": [answer.to_json() for answer in answers],
                              "prefill_seconds": round(answers[0].prefill_seconds, 4)}), flush=True)
        else:
            for answer in answers:
                print(f"── {answer.name} ── {answer.summary()}\n{answer.text.strip()}\n")
    return 2 if failed else 0


def _lanes(spec: str, artifacts: "Artifacts") -> list[Lane]:
    """Lanes as `evaluate` writes them, with the settings of these artifacts.

    Raises:
        UserError: an unknown lane or setting, a defense that is not calibrated, or a lane that only `evaluate` has,
            because it changes the request or the artifacts.
    """
    from safety.evaluate.arms import parse_arms
    arms = parse_arms(spec, lambda folder: artifacts, baselines=False)
    if len(arms) > MAX_LANES:
        raise UserError(f"These are {len(arms)} lanes; at most {MAX_LANES} can run side by side. Name fewer, or "
                        "compare more with python -m safety evaluate.")
    for arm in arms:
        if arm.folder is not None:
            raise UserError(f"Lane {arm.name!r}: here all lanes share the artifacts of --artifacts. Leave artifacts= "
                            "out, or use python -m safety evaluate.")
    return [arm.lane for arm in arms]


def _single_request(prompt: str, image: Path | None) -> "Request":
    from safety.engine import Request
    from safety.inputs import check_prompt, open_image
    return Request(check_prompt(prompt, []), open_image(image) if image else None)


def _request(line: str, folder: Path) -> "Request":
    """The request of a line {"prompt": text, "image": path or nothing}; image paths are relative to the folder."""
    from safety.engine import Request
    try:
        row = json.loads(line)
        prompt, image = row["prompt"], row.get("image")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError('This is not a JSON object with a "prompt".') from error
    if image is not None and not (isinstance(image, str) and image):
        raise UserError('"image" must be a path; leave it out where there is none.')
    if odd := [key for key in row if key.lower() in ("prompt", "image") and key not in ("prompt", "image")]:
        raise UserError(f'{odd[0]!r} is not read: write "{odd[0].lower()}".')
    return Request(prompt, folder / image if image else None)


if __name__ == "__main__":
    sys.exit(main())
