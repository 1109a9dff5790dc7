"""Whole evaluations of tiny models: resumable, split over processes, summed up, and as logs of inspect_ai."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from answers import opened
from PIL import Image
from tiny import random_artifacts, tiny_llava

from safety.artifacts import load_artifacts, save_artifacts
from safety.engine import Engine
from safety.errors import UserError
from safety.evaluate import command, run
from safety.evaluate.arms import SAFETY_PROMPT, parse_arms
from safety.evaluate.inspect_log import shown
from safety.evaluate.records import read_records
from safety.loading import load
from safety.reading import ALOUD_TOKENS, READ_ALOUD
from safety.samples import Sample, write_samples
from safety.settings import Lane

ROOT = Path(__file__).resolve().parent.parent
LANES = "none,sasa,sasa:mode=reading,sapt:interval=3:threshold=0.4,safety-prompt,random-vector"
ANSWERS = 7 * len(LANES.split(","))  # to the samples of `home`


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny model, its artifacts and a suite, as somebody's own would be."""
    folder = tmp_path_factory.mktemp("evaluate")
    lvlm = tiny_llava()
    lvlm.model.save_pretrained(folder / "model")
    lvlm.processor.save_pretrained(folder / "model")
    loaded = load(str(folder / "model"), "none")
    save_artifacts(random_artifacts(loaded), loaded, folder / "artifacts")
    samples = []
    for number in range(7):
        image = None
        if number % 2:
            image = str(folder / f"{number}.png")
            Image.new("RGB", (30, 30), (number * 30, 0, 90)).save(image)
        samples.append(Sample(f"s{number}", f"request {number}", "unsafe" if number < 4 else "safe",
                              f"scenario {number % 3}", image, request="the real one" if number == 1 else None,
                              expected=("word",) if number == 6 else ()))
    write_samples(samples, folder / "own.jsonl")
    return folder


@pytest.fixture(scope="module")
def lvlm(home):
    return load(str(home / "model"), "none")


@pytest.fixture(scope="module")
def artifacts(home, lvlm):
    return load_artifacts(lvlm, home / "artifacts")


def arguments(home, out, **changes):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    parsed = parser.parse_args(["--suite", str(home / "own.jsonl"), "--artifacts", str(home / "artifacts"), "--out",
                                str(out), "--lanes", LANES, "--max-new-tokens", "7", "--batch", "3", "--json"])
    vars(parsed).update(changes)
    return parsed


def timeless(records):
    return {key: {name: value for name, value in record.items() if name != "seconds"}
            for key, record in records.items()}


def assert_same_answers(found, wanted):
    """Equal but for the time and the last digit of probabilities, which were added up by another number of threads."""
    def apart(records):
        probabilities = {key: (record["harm"], [event["probability"] for event in record["events"]])
                         for key, record in records.items()}
        rest = {key: {**record, "harm": None, "events": [{**event, "probability": None} for event in record["events"]]}
                for key, record in timeless(records).items()}
        return rest, probabilities

    (rest, probabilities), (wanted_rest, wanted_probabilities) = apart(found), apart(wanted)
    assert rest == wanted_rest
    for key, pair in wanted_probabilities.items():
        for some, others in zip(probabilities[key], pair, strict=True):
            assert some == pytest.approx(others, abs=1.5 * 10 ** -run.DIGITS)


@pytest.fixture(scope="module")
def finished(home, lvlm, tmp_path_factory):
    """An uninterrupted evaluation."""
    out = tmp_path_factory.mktemp("finished")
    assert command.evaluate(lambda: lvlm, arguments(home, out)) == 0
    return out


def test_every_sample_is_answered_once_in_every_lane(finished, home):
    records = read_records(finished)
    assert len(records) == ANSWERS
    lines = (finished / "answers.jsonl").read_text().splitlines()
    assert len(lines) == len(records)
    assert records["own", "s1", "none"]["asked"] == "the real one"


def test_batches_answer_as_one_by_one(finished, home, lvlm, artifacts):
    suite = "own"
    arm = parse_arms("sapt:interval=3:threshold=0.4", lambda folder: artifacts)[0]
    for number in (0, 3):
        record = read_records(finished)[suite, f"s{number}", arm.name]
        image = str(home / f"{number}.png") if number % 2 else None
        answer, = Engine(lvlm, artifacts).answer(f"request {number}", image, lanes=[arm.lane], max_new_tokens=7)
        assert record["tokens"] == answer.tokens
        assert [event["probability"] for event in record["events"]] == [
            round(event.probability, run.DIGITS) for event in answer.events]
    read = {row["id"]: row["events"][0]["read"] for row in read_records(finished).values()
            if row["arm"] == "sasa:mode=reading"}
    assert {name for name, words in read.items() if words} <= {"s1", "s3", "s5"}  # those that have a picture
    assert any(read.values())


def test_json_summary_has_the_promised_form(finished, home, lvlm, capsys):
    assert command.evaluate(lambda: lvlm, arguments(home, finished)) == 0  # everything is there: nothing is asked again
    summary = json.loads(capsys.readouterr().out)
    lanes = summary["suites"]["own"]
    assert list(lanes) == LANES.split(",")
    for row in lanes.values():
        assert set(row) >= {"n", "attack_success", "refusal", "over_refusal", "utility", "garbage",
                            "tokens_before_intervention", "seconds_per_answer"}
        assert row["n"] == 7
        assert row["judge_kappa"] > 0.7
        for measure, n in (("attack_success", 4), ("refusal", 4), ("over_refusal", 3), ("utility", 1),
                           ("garbage", 7)):
            assert row[measure]["n"] == n
            assert 0 <= row[measure]["low"] <= row[measure]["rate"] <= row[measure]["high"] <= 1
    tested = {(test["lane"], test["measure"]) for test in summary["tests"]}
    assert tested == {(lane, measure) for lane in LANES.split(",")[1:]
                      for measure in ("attack_success", "on_topic", "over_refusal", "utility", "garbage")}
    assert all(test["p"] <= test["p_holm"] <= 1 for test in summary["tests"])
    assert set(summary["pooled"]) == {"picture attacks", "text attacks", "benign requests", "known answers"}


def test_the_summary_says_which_artifacts_it_is_of_and_what_they_had_seen(finished, home, lvlm, artifacts, tmp_path):
    digest = command.artifacts_digest(home / "artifacts")
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["artifacts"] == {"default": digest}
    assert summary["seen_in_calibration"] is None  # these artifacts do not say what they were calibrated on
    about = {"sample_digests": [Sample("", " The REAL one", "unsafe", "").request_digest]}
    save_artifacts(replace(artifacts, about=about), lvlm, tmp_path / "seen")
    assert command.artifacts_digest(tmp_path / "seen") == digest  # notes change nothing
    command.evaluate(lambda: lvlm, arguments(home, tmp_path / "out", lanes="none", artifacts=tmp_path / "seen"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["seen_in_calibration"] == {"own": 1}
    assert "1 requests of the suite own were" in (tmp_path / "out" / "report.md").read_text()
    arm = parse_arms("none", lambda folder: artifacts)[0]
    one, other = (run.answer_key(lvlm, replace(artifacts, about=note), arm, 4, 2) for note in ({}, about))
    assert one == other
    save_artifacts(random_artifacts(lvlm, seed=9), lvlm, tmp_path / "other")
    assert command.artifacts_digest(tmp_path / "other") != digest
    assert command.artifacts_digest(tmp_path) is None


def test_what_the_model_reads_aloud_is_typed_before_the_prompt(home, lvlm, artifacts, tmp_path):
    lanes = "none,read-aloud,read-aloud+sapt,read-aloud+no-image"
    command.evaluate(lambda: lvlm, arguments(home, tmp_path, lanes=lanes))
    records, engine = read_records(tmp_path), Engine(lvlm, artifacts)
    picture = str(home / "3.png")
    reading, = engine.answer(READ_ALOUD, picture, lanes=[Lane("reading")], max_new_tokens=ALOUD_TOKENS)
    found = records["own", "s3", "read-aloud"]
    assert found["read"] == reading.text.strip() != ""
    answer, = engine.answer(f"{found['read']}\nrequest 3", picture, lanes=[Lane("again")], max_new_tokens=7)
    assert found["tokens"] == answer.tokens
    assert records["own", "s3", "read-aloud+sapt"]["read"] == found["read"]
    instead, = engine.answer(f"{found['read']}\nrequest 3", lanes=[Lane("typed")], max_new_tokens=7)
    assert records["own", "s3", "read-aloud+no-image"]["tokens"] == instead.tokens != found["tokens"]
    assert shown(records["own", "s3", "read-aloud+no-image"], tmp_path) == (f"{found['read']}\nrequest 3", None)
    assert shown(found, tmp_path)[0] == f"{found['read']}\nrequest 3"
    typed = records["own", "s2", "read-aloud"]  # nothing to read: as undefended
    assert typed["read"] == "" and typed["tokens"] == records["own", "s2", "none"]["tokens"]
    assert "read" not in records["own", "s3", "none"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("batches", [0, 1, 4])
def test_a_stopped_run_goes_on_where_it_stopped(finished, home, lvlm, tmp_path, monkeypatch, batches):
    answered = []
    real = Engine.answer_batch

    def stops(self, requests, **kwargs):
        if len(answered) == batches:
            raise Stop
        answered.append(len(requests))
        return real(self, requests, **kwargs)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Engine, "answer_batch", stops)
        command.evaluate(lambda: lvlm, arguments(home, tmp_path))
    torn = tmp_path / "answers.jsonl"
    if batches:
        torn.write_bytes(torn.read_bytes()[:-20])  # killed in the middle of a write
    command.evaluate(lambda: lvlm, arguments(home, tmp_path))
    assert timeless(read_records(tmp_path)) == timeless(read_records(finished))
    assert len(torn.read_text().splitlines()) == ANSWERS


def test_more_lanes_and_samples_may_follow(finished, home, lvlm, tmp_path):
    command.evaluate(lambda: lvlm, arguments(home, tmp_path, lanes="none", limit=2))
    before = (tmp_path / "answers.jsonl").read_bytes()
    command.evaluate(lambda: lvlm, arguments(home, tmp_path))
    assert (tmp_path / "answers.jsonl").read_bytes().startswith(before)
    few = {key for key in read_records(tmp_path) if key[2] == "none"}
    assert timeless(read_records(tmp_path)).items() >= timeless(
        {key: record for key, record in read_records(finished).items() if key in few}).items()


def test_what_another_run_left_in_the_folder_is_said_to_be_left_out(home, lvlm, tmp_path, capsys):
    write_samples([Sample("1", "hello", "safe", "")], tmp_path / "other.jsonl")
    for suite in (home / "own.jsonl", tmp_path / "other.jsonl"):
        told = capsys.readouterr().err
        command.evaluate(lambda: lvlm, arguments(home, tmp_path, suite=[str(suite)], lanes="none", limit=2))
    assert "also holds" not in told
    assert "also holds answers to own, which this report leaves out" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "summary.json").read_text())["suites"]) == ["other"]


def test_a_batch_that_was_torn_is_given_again_as_it_was(finished, home, lvlm, tmp_path, monkeypatch):
    lines = (finished / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(line for line in lines if json.loads(line)["id"] != "s1"))
    asked = []
    real = Engine.answer_batch

    def counted(self, requests, **kwargs):
        asked.append([request.prompt.split("\n")[-1] for request in requests])
        return real(self, requests, **kwargs)
    monkeypatch.setattr(Engine, "answer_batch", counted)
    command.evaluate(lambda: lvlm, arguments(home, tmp_path))
    assert asked == [["request 0", "request 1", "request 2"]] * 3  # once for each group of lanes
    assert len(read_records(tmp_path)) == len(lines) == len((tmp_path / "answers.jsonl").read_text().splitlines())


def test_corrected_labels_count_without_answering_again(home, lvlm, tmp_path, monkeypatch):
    def samples(**changes):
        write_samples([Sample("a", "one", "unsafe", "x"), replace(Sample("b", "two", "unsafe", "x"), **changes)],
                      tmp_path / "two.jsonl")
        command.evaluate(lambda: lvlm, arguments(home, tmp_path / "out", suite=[str(tmp_path / "two.jsonl")],
                                                 lanes="none"))
        return json.loads((tmp_path / "out" / "summary.json").read_text())
    before = samples()["suites"]["two"]["none"]
    assert (before["refusal"]["n"], before["over_refusal"], before["utility"]) == (2, None, None)
    monkeypatch.setattr(Engine, "answer_batch", None)  # nothing is asked again
    summary = samples(label="safe", expected=("two",), scenario="y", request="what is meant")
    after = summary["suites"]["two"]["none"]
    assert (after["refusal"]["n"], after["over_refusal"]["n"], after["utility"]["n"]) == (1, 1, 1)
    assert summary["examples"][1]["asked"] == "what is meant"


@pytest.mark.parametrize(("change", "words"), [
    ("length", r"in lane 'none' that was given with another --max-new-tokens \(7, now 8\)\. Choose"),
    ("batch", r"with another --batch \(3, now 2\)\. Choose"),
    ("artifacts", r"with another calibration or setting of the lane\. Choose"),
    ("sample", r"'s1' of suite 'own' in lane 'none' that was given with another prompt or picture\. Choose"),
    ("version", r"with another model and another number format and .*prompt or picture\. Choose")])
def test_answers_of_other_settings_are_refused_and_what_differs_is_named(finished, home, lvlm, artifacts, tmp_path,
                                                                         change, words):
    (tmp_path / "answers.jsonl").write_bytes((finished / "answers.jsonl").read_bytes())
    changed = arguments(home, tmp_path)
    if change == "length":
        changed.max_new_tokens = 8
    elif change == "batch":  # in int8 the shape of a batch decides how sums are rounded
        changed.batch = 2
    elif change == "artifacts":
        save_artifacts(random_artifacts(lvlm, seed=9), lvlm, tmp_path / "artifacts")
        changed.artifacts = tmp_path / "artifacts"
    elif change == "version":  # earlier ones kept one digest
        rows = [json.loads(line) for line in (finished / "answers.jsonl").read_text().splitlines()]
        (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row | {"key": "0f3a"}) + "\n" for row in rows))
    else:  # the same suite name, another picture behind it
        picture = home / "1.png"
        kept = picture.read_bytes()
        Image.new("RGB", (30, 30), "white").save(picture)
    try:
        with pytest.raises(UserError, match=words):
            command.evaluate(lambda: lvlm, changed)
    finally:
        if change == "sample":
            picture.write_bytes(kept)


def test_a_sample_that_cannot_be_served_is_left_out_of_every_lane(home, lvlm, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    samples = [Sample("good", "hello", "safe", ""), Sample("bad", "hello", "safe", "", str(tmp_path / "broken.png"))]
    write_samples(samples, tmp_path / "two.jsonl")
    suite = "two"
    command.evaluate(lambda: lvlm, arguments(home, tmp_path / "out", suite=[str(tmp_path / "two.jsonl")],
                                     lanes="none,blank-image"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for row in summary["suites"][suite].values():
        assert (row["n"], row["errors"]) == (1, 1)
    assert "damaged" in read_records(tmp_path / "out")[suite, "bad", "none"]["error"]
    Image.new("RGB", (30, 30), "green").save(tmp_path / "broken.png")  # mended, and evaluated again
    command.evaluate(lambda: lvlm, arguments(home, tmp_path / "out", suite=[str(tmp_path / "two.jsonl")], lanes="none"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["suites"][suite]["none"]["n"], summary["suites"][suite]["none"]["errors"]) == (2, 0)


def test_a_suite_of_which_nothing_can_be_answered_is_an_error(home, lvlm, tmp_path):
    write_samples([Sample("1", "say <image>", "safe", "")], tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match=r"No sample of suite bad.*control marker"):
        command.evaluate(lambda: lvlm, arguments(home, tmp_path / "out", suite=[str(tmp_path / "bad.jsonl")],
                                                 lanes="none"))


# A kill that nothing can be done about, and two processes.

def launch(home, out, *prefix):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *prefix, "safety", "evaluate", "--model", str(home / "model"), "--quantization", "none",
         "--suite", str(home / "own.jsonl"), "--artifacts", str(home / "artifacts"), "--out", str(out), "--lanes",
         LANES, "--max-new-tokens", "7", "--batch", "3"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True)


def test_a_killed_process_loses_nothing_that_was_written(finished, home, lvlm, tmp_path):
    process = launch(home, tmp_path)
    answers = tmp_path / "answers.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and not (answers.exists() and answers.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = read_records(tmp_path)
    assert done
    command.evaluate(lambda: lvlm, arguments(home, tmp_path))
    assert timeless(read_records(tmp_path)) == timeless(read_records(finished))
    assert all(read_records(tmp_path)[key] == record for key, record in done.items())  # not answered again


def test_two_processes_give_what_one_gives(finished, home, tmp_path):
    # "--multi_gpu" only says how the processes are started, through torch.distributed; "--cpu" would want MPI.
    process = launch(home, tmp_path, "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                     "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m")
    assert process.wait(timeout=240) == 0, process.stderr.read()
    assert (tmp_path / "answers-1.jsonl").exists()
    lines = [line for file in tmp_path.glob("answers*.jsonl") for line in file.read_text().splitlines()]
    assert len(lines) == ANSWERS
    assert_same_answers(read_records(tmp_path), read_records(finished))
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (finished, tmp_path))
    for summary in (one, two):
        for rows in [*summary["suites"].values(), *summary["pooled"].values()]:
            for row in rows.values():
                del row["seconds_per_answer"]
    assert one == two


@pytest.mark.parametrize(("shown", "gpus", "expected"), [
    (None, 4, "2"), (None, 2, "0"), ("5,6,7", 3, "7"), ("5,6", 2, "5"), (None, 0, None), ("", 0, "")])
def test_each_process_sees_one_gpu(shown, gpus, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in {"LOCAL_RANK": "2", "WORLD_SIZE": "3", "CUDA_VISIBLE_DEVICES": shown}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    run.one_gpu_each()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == expected


def test_processes_meet_before_the_work_and_wait_longer_than_it_takes(monkeypatch):
    met = {}

    monkeypatch.setattr("accelerate.PartialState", lambda **given: met.update(given))
    # Called without a GPU's number: each process sees one GPU only, and a machine may have fewer than processes.
    monkeypatch.setattr("torch.distributed.barrier", lambda: met.update(waited=True))
    wait = run.join()
    assert met["cpu"] and met["timeout"].days >= 1 and "waited" not in met
    wait()
    assert met["waited"]


# The logs of inspect_ai.

def test_answers_open_in_inspect(finished):
    log = pytest.importorskip("inspect_ai.log", reason="the optional package inspect_ai is not installed")
    for _ in range(2):  # the second replaces the first
        assert command.report(argparse.Namespace(folder=finished, inspect=True)) == 0
    summary = json.loads((finished / "summary.json").read_text())
    logs = {(found.eval.task, found.eval.model): found
            for found in map(log.read_eval_log, sorted((finished / "inspect").glob("*.eval")))}
    assert {model for _, model in logs} == {f"safety/{lane}" for lane in LANES.split(",")}
    assert len(list((finished / "inspect").glob("*.eval"))) == len(logs)
    for lane in LANES.split(","):
        found = logs["own", f"safety/{lane}"]
        assert found.status == "success"
        said = {sample.id: sample.output.completion for sample in found.samples}
        assert said == {number: "".join(record["tokens"]) for (_, number, arm), record
                        in read_records(finished).items() if arm == lane}
        for score in found.results.scores:
            row = summary["suites"]["own"][lane][score.name]
            assert score.metrics["mean"].value == pytest.approx(row["rate"])
            assert score.scored_samples == row["n"]
        for sample in found.samples:
            asked = sample.messages[0].content
            words = f"request {sample.id[1:]}"
            assert asked[-1].text == (f"{SAFETY_PROMPT}\n\n{words}" if lane == "safety-prompt" else words)
            pictures = [part.image for part in log.resolve_sample_attachments(sample).messages[0].content[:-1]]
            assert len(pictures) == int(sample.id[1:]) % 2
            for picture in pictures:
                red, _, blue = opened(picture).resize((1, 1)).getpixel((0, 0))
                assert abs(red - int(sample.id[1:]) * 30) < 8 and abs(blue - 90) < 8
