"""python -m safety evaluate, and report."""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safety.artifacts import CONFIG, Artifacts, default_folder, fingerprint, load_artifacts, read_config
from safety.evaluate import judges, run, suites
from safety.evaluate.arms import SAFETY_PROMPT, UNCALIBRATED, digest, parse_arms
from safety.evaluate.model_judges import judge_records, model_judge
from safety.evaluate.records import read_records
from safety.evaluate.summary import summarise
from safety.flags import count, seed
from safety.lvlm import LVLM
from safety.settings import check_length

SUMMARY, MARKDOWN = "summary.json", "report.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `evaluate` (the model's are added by the caller)."""
    parser.add_argument("--suite", action="append", default=[], metavar="NAME|FILE|BENCHMARK:DIR",
                        help=f"may be repeated: {', '.join((*suites.SETS, *suites.SUITES))}, a sample file, "
                             "typeset:FILE (its requests as pictures in FigStep's layout), or a benchmark such as "
                             "figstep:DIR or vlguard:hub (default standard)")
    parser.add_argument("--lanes", default="standard",
                        help="see safety/evaluate/arms.py, such as none,sasa,sapt:interval=8,safety-prompt; the first "
                             "is what the others are compared with (default standard)")
    parser.add_argument("--out", type=Path, default=Path("build/evaluate"),
                        help="folder of answers, summary and report; taken up again (default build/evaluate)")
    parser.add_argument("--artifacts", type=Path, help="calibrated artifacts (default: those shipped for the model)")
    parser.add_argument("--limit", type=count, help=f"samples of each suite (default: {suites.SAMPLES} of each that "
                        "comes with the project, all of a file or benchmark)")
    parser.add_argument("--max-new-tokens", type=int, default=run.ANSWER_TOKENS,
                        help="length of the answers (default %(default)s)")
    parser.add_argument("--batch", type=count, default=run.BATCH,
                        help="requests answered at once, in all lanes (default %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="which samples of a file or benchmark --limit draws")
    parser.add_argument("--judge", default="safety.refusal",
                        help="what counts as a refusal: safety.refusal (default), or 'AdvBench prefixes' or 'garak "
                             "mitigation' if garak is installed; answers on disk are judged again, not given again")
    parser.add_argument("--model-judge", metavar="JUDGE",
                        help="also ask a language model whether answers are harmful: llama-guard, strongreject:MODEL "
                             "or template:FILE:MODEL (see safety/evaluate/model_judges.py)")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    parser.add_argument("--check-judge", type=Path, metavar="FILE.csv",
                        help="instead: agreement of the refusal judges with human labels, stored beside the judge")


def check_judge(path: Path) -> int:
    """Measure the refusal judges against human labels and keep the figures for the reports.

    Figures of judges that are not installed now stay, where they were measured on this very file.
    """
    found = judges.agreement(path)
    known = judges.known_agreement()
    kept = known["judges"] if known and (known["data"], known["n"]) == (found["data"], found["n"]) else {}
    run.write_json(judges.AGREEMENT, found | {"judges": kept | found["judges"]})
    for name, row in found["judges"].items():
        print(f"{name:20} κ {row['kappa']:.3f} (n = {row['n']}; with partial refusals as refusals "
              f"{row['kappa_partial_is_refusal']:.3f}, n = {found['n']})")
    return 0


def evaluate(load: Callable[[], LVLM], arguments: argparse.Namespace) -> int:
    """Answer, sum up, and write the report; under `accelerate launch` every process answers its share.

    What needs no model is checked, and the suites are read, before one is loaded.
    """
    from safety.evaluate.report import write_report

    process, processes = run.processes()
    wait_for_everyone = run.join() if processes > 1 else None
    check_length(arguments.max_new_tokens)
    judge = judges.keyword_judge(arguments.judge)
    asked = model_judge(arguments.model_judge) if arguments.model_judge else None
    parse_arms(arguments.lanes, lambda folder: UNCALIBRATED)
    names = [name for given in arguments.suite or ["standard"] for name in suites.SETS.get(given, (given,))]
    # Each process draws the pictures for itself: writing one file twice at a time would tear it.
    pictures = arguments.out / "pictures" if process == 0 else arguments.out / f"pictures-{process}"
    made = {title: suites.suite(name, pictures, arguments.limit, arguments.seed)
            for title, name in suites.titles(names).items()}
    samples = {name: rows for name, (_, rows) in made.items()}
    lvlm = load()

    @functools.cache
    def calibrated(folder: str | None) -> Artifacts:
        return load_artifacts(lvlm, folder or arguments.artifacts)

    arms = parse_arms(arguments.lanes, calibrated)
    records = run.collect(lvlm, calibrated, samples, arms, arguments.out, max_new_tokens=arguments.max_new_tokens,
                          batch=arguments.batch, process=process, processes=processes)
    if wait_for_everyone:
        wait_for_everyone()
        if process:
            return 0
        records = run.collect(lvlm, calibrated, samples, arms, arguments.out, max_new_tokens=arguments.max_new_tokens,
                              batch=arguments.batch)
    if asked:
        records = judge_records(records, asked, arguments.out)
    known = {request for arm in arms for request in calibrated(arm.folder).about.get("sample_digests", ())}
    summary: dict[str, Any] = {
        "model": lvlm.name, "label": lvlm.label, "fingerprint": fingerprint(lvlm),
        "artifacts": {arm.folder or "default": artifacts_digest(arm.folder or arguments.artifacts or
                                                                default_folder(lvlm)) for arm in arms},
        "seen_in_calibration": {name: sum(sample.request_digest in known for sample in rows)
                                for name, rows in samples.items()} if known else None,
        "lanes": {arm.name: repr(arm.lane) for arm in arms},
        "safety_prompt": SAFETY_PROMPT, "about": {name: about for name, (about, _) in made.items()},
        "settings": {"max_new_tokens": arguments.max_new_tokens, "limit": arguments.limit, "seed": arguments.seed,
                     "batch": arguments.batch, "decoding": "greedy"},
        "judge": {"name": arguments.judge, "agreement": judges.known_agreement(), "model": arguments.model_judge},
        "date": datetime.now(UTC).date().isoformat(),
        "left_out": sorted({suite for suite, _, _ in read_records(arguments.out)} - set(samples)),
        **summarise(records, samples, arms, judge)}
    agreement = (summary["judge"]["agreement"] or {"judges": {}})["judges"].get(arguments.judge, {})
    for lanes in [*summary["suites"].values(), *summary["pooled"].values()]:
        for measures in lanes.values():
            measures["judge_kappa"] = agreement.get("kappa")  # beside every rate that the refusal judge decides
    run.write_json(arguments.out / SUMMARY, summary)
    write_report(arguments.out)
    if arguments.json:
        print(json.dumps(summary, ensure_ascii=False))
    else:
        print((arguments.out / MARKDOWN).read_text(encoding="utf-8"))
    print(f"Saved to {arguments.out}.", file=sys.stderr)
    if summary["left_out"]:
        print(f"The folder also holds answers to {', '.join(summary['left_out'])}, which this report leaves out: it is "
              "about the suites of this command alone. Name them too to have them in it.", file=sys.stderr)
    return 0


def artifacts_digest(folder: Path | str) -> str | None:
    """Digest of a folder of artifacts as its config.json has it: the files' own digests, and the calibrated settings.

    None: the model has no artifacts there. (Lanes without defenses can be evaluated all the same.)
    """
    if not (Path(folder) / CONFIG).is_file():
        return None
    config = read_config(Path(folder))
    return digest([config[name] for name in ("files", "settings", "trace_threshold")])


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `report`."""
    parser.add_argument("folder", type=Path, help="the --out of an evaluation")
    parser.add_argument("--inspect", action="store_true",
                        help="also write logs for inspect_ai's viewer into the folder (requirements-eval.txt)")


def report(arguments: argparse.Namespace) -> int:
    """Write the report of an evaluation again, from its summary; with --inspect, its answers as logs as well."""
    from safety.evaluate.report import write_report
    written = write_report(arguments.folder)
    if arguments.inspect:
        from safety.evaluate.inspect_log import export
        written += export(arguments.folder)
    print(*written, sep="\n")
    return 0
