"""python -m safety generate, on a tiny model."""

import json
import re

import pytest
from PIL import Image
from test_inputs import png_header
from tiny import random_artifacts, tiny_llava

from safety import __main__ as cli
from safety.artifacts import save_artifacts
from safety.calibrate.run import PER_KIND
from safety.evaluate.attacks import Pgd
from safety.evaluate.run import BATCH
from safety.evaluate.suites import SAMPLES
from safety.refusal import refusal_start
from safety.settings import NEW_TOKENS
from safety.transcript import Answer, Event, Step


@pytest.fixture(scope="module")
def lvlm():
    return tiny_llava()


@pytest.fixture
def generate(lvlm, tmp_path, monkeypatch, capsys):
    """Run the command with the tiny model and its artifacts; returns (status, stdout, stderr)."""
    save_artifacts(random_artifacts(lvlm), lvlm, tmp_path / "artifacts")
    monkeypatch.setattr(cli, "_load", lambda arguments: lvlm)

    def run(*flags: str) -> tuple[int, str, str]:
        status = cli.main(["generate", "--artifacts", str(tmp_path / "artifacts"), "--max-new-tokens", "6", *flags])
        return status, *capsys.readouterr()
    return run


def test_json_has_the_documented_schema(generate, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    status, out, _ = generate("--image", str(tmp_path / "a.png"), "--prompt", "What?", "--json",
                              "--lanes", "none,sasa,revision,sapt,all")
    assert status == 0
    result = json.loads(out)
    assert result["model"] == "tiny" and result["label"].startswith("tiny · ") and result["prefill_seconds"] > 0
    assert [lane["name"] for lane in result["lanes"]] == ["none", "sasa", "revision", "sapt", "all"]
    for lane in result["lanes"]:
        assert {"name", "text", "tokens", "harm", "events", "refused", "seconds"} <= set(lane)
        assert "".join(lane["tokens"]) == lane["text"] and len(lane["harm"]) == len(lane["tokens"])
        assert lane["seconds"] > 0 and isinstance(lane["refused"], bool)
    assert result["lanes"][1]["events"][0]["type"] == "gate" and result["lanes"][1]["events"][0]["token"] == 0


def test_plain_output_shows_each_lane(generate):
    status, out, _ = generate("--prompt", "What?", "--lanes", "none,sapt")
    assert status == 0 and "── none ──" in out and "── sapt ──" in out


def test_many_requests_come_back_in_order_and_a_bad_one_costs_only_itself(generate, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_text("no picture")
    rows = [{"prompt": "one"}, {"prompt": "two", "image": "a.png"}, {"prompt": "three", "image": "bad.png"},
            {"prompt": "one"}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    status, out, err = generate("--requests", str(tmp_path / "r.jsonl"), "--lanes", "none")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 2 and len(lines) == 4 and "line 3" in err
    assert "could not be read as a picture" in lines[2]["error"]
    assert lines[0]["lanes"][0]["text"] == lines[3]["lanes"][0]["text"] != lines[1]["lanes"][0]["text"]


@pytest.mark.parametrize(("flags", "message"), [
    (["--prompt", " "], "empty"), (["--prompt", "a", "--lanes", "magic"], "magic"),
    (["--prompt", "a", "--max-new-tokens", "0"], "new tokens"),
    (["--prompt", "a", "--temperature", "nan"], "Temperature"),
    (["--prompt", "a", "--image", "no-such.png"], "not found"), (["--requests", "no-such.jsonl"], "could not be read")])
def test_bad_flags_give_a_sentence_and_status_2(generate, flags, message):
    status, out, err = generate(*flags)
    assert status == 2 and message in err and "Traceback" not in err and not out


def test_every_kind_of_bad_input_gives_a_sentence_and_the_next_request_works(generate, tmp_path):
    Image.effect_noise((300, 300), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:4000])
    (tmp_path / "bomb.png").write_bytes(png_header(20_000, 20_000))
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("black", "red")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    rows = [({"prompt": "a", "image": "cut.jpg"}, "damaged"), ({"prompt": "a", "image": "bomb.png"}, "million pixels"),
            ({"prompt": "x" * 100_000}, "100,000 characters"), ({"prompt": "a <image> b"}, "control marker"),
            ({"prompt": 3}, "must be text"), ({"prompt": "a", "image": "a.gif"}, None)]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(row) for row, _ in rows))
    status, out, _ = generate("--requests", str(tmp_path / "r.jsonl"), "--lanes", "none,all")
    for line, (_, message) in zip(map(json.loads, out.splitlines()), rows, strict=True):
        assert message in line["error"] if message else len(line["lanes"]) == 2
    assert status == 2


def test_artifacts_that_are_missing_or_tampered_with_are_refused(generate, tmp_path):
    status, _, err = generate("--prompt", "a", "--artifacts", str(tmp_path / "nowhere"))
    assert status == 2 and "nowhere" in err and "Traceback" not in err
    path = tmp_path / "artifacts" / "sapt.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    status, _, err = generate("--prompt", "a")
    assert status == 2 and "sapt.safetensors" in err and "Traceback" not in err


def test_memory_that_runs_out_is_said(generate, lvlm, monkeypatch):
    def fail(*args):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 GiB")
    monkeypatch.setattr(type(lvlm), "prefill", fail)
    status, out, err = generate("--prompt", "a")
    assert status == 2 and "memory ran out" in err and "Traceback" not in err and not out


def test_an_unknown_lane_is_answered_with_the_lanes_that_generate_has(generate):
    _, _, err = generate("--prompt", "a", "--lanes", "magic")
    assert "none, sasa, revision, sapt, all" in err and "stacks" in err
    assert not any(name in err for name in ("safety-prompt", "random-vector", "baselines", "revision-ablation"))


def test_malformed_lines_are_answered_in_their_place_and_numbered_as_in_the_file(generate, tmp_path):
    bad = ["[1]", "{}", '{"prompt": "a", "image": 3}', "not json", "[" * 100_000,
           '{"prompt": "a", "image": ""}', '{"prompt": "a", "Image": "a.png"}',
           json.dumps({"prompt": "a", "image": "x" * 5000})]
    (tmp_path / "r.jsonl").write_text("\n".join(['\ufeff{"prompt": "one\u2028two"}', "", *bad, '{"prompt": "b"}']))
    status, out, err = generate("--requests", str(tmp_path / "r.jsonl"), "--lanes", "none")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 2 and ["error" in line for line in lines] == [False, *[True] * 8, False]
    assert all(line["model"] == "tiny" for line in lines)
    assert [f"line {number}:" in err for number in range(1, 12)] == [False, False, *[True] * 8, False]


def test_a_file_without_requests_is_refused(generate, tmp_path):
    (tmp_path / "r.jsonl").write_text("\n \n")
    status, out, err = generate("--requests", str(tmp_path / "r.jsonl"))
    assert status == 2 and "holds no requests" in err and not out


def test_lanes_are_written_as_in_an_evaluation(generate):
    status, out, _ = generate("--prompt", "a", "--lanes", "none,sasa+sapt,sapt:threshold=0:interval=2", "--json")
    lanes = {lane["name"]: lane for lane in json.loads(out)["lanes"]}
    assert status == 0 and list(lanes) == ["none", "sasa+sapt", "sapt:threshold=0:interval=2"]
    assert lanes["sapt:threshold=0:interval=2"]["events"][0]["threshold"] == 0
    assert lanes["sasa+sapt"]["events"][0]["type"] == "gate"


def test_one_layer_of_a_pair_is_taken_with_the_calibrated_other_one(generate):
    status, out, _ = generate("--prompt", "a", "--lanes", "sasa:mode=project:safety_layer=3", "--json")
    assert status == 0 and json.loads(out)["lanes"][0]["tokens"]
    status, _, err = generate("--prompt", "a", "--lanes", "sasa:safety_layer=3")
    assert status == 2 and "Choose one of 1 and 3, 2 and 4" in err


@pytest.mark.parametrize(("flags", "message"), [
    (["--lanes", "none,sasaa"], "'sasaa'. Choose from none, sasa"), (["--lanes", "sapt:depth=1"], "no setting 'depth'"),
    (["--lanes", "sapt:interval=x"], "a whole number"), (["--lanes", "sapt:artifacts=x"], "share the artifacts"),
    (["--lanes", "extensions"], "These are 9 lanes; at most 6"),
    (["--lanes", "safety-prompt"], "baseline"), (["--lanes", "random-vector"], "baseline"), (["--top-p", "7"], "Top-p"),
    (["--max-new-tokens", "0"], "new tokens"), (["--image", "no-such.png"], "'no-such.png' was not found")])
def test_what_needs_no_model_is_refused_before_one_is_loaded(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(cli, "_load", lambda arguments: pytest.fail("a model is loaded"))
    assert cli.main(["generate", "--prompt", "a", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("command", "message"), [
    (["evaluate", "--suite", "no-such.jsonl"], "no-such.jsonl could not be read: No such file or directory."),
    (["evaluate", "--suite", "typeset:no-such.jsonl"], "no-such.jsonl could not be read: No such file or directory."),
    (["evaluate", "--suite", "magic"], "There is no suite 'magic'"), (["evaluate", "--lanes", "magic"], "'magic'"),
    (["attack", "--through", "magic"], "'magic'"), (["attack", "--suite", "no-such.jsonl"], "could not be read: No"),
    (["calibrate", "--data", "no-such.jsonl"], "no-such.jsonl could not be read: No such file or directory."),
    (["calibrate", "--model", "x/y"], "Give --data")])
def test_suites_and_lanes_are_read_before_a_model_is_loaded(monkeypatch, tmp_path, capsys, command, message):
    monkeypatch.setattr(cli, "_load", lambda arguments: pytest.fail("a model is loaded"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("pictures"))


def test_a_file_that_cannot_be_written_is_named(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cli, "_load", lambda arguments: (tmp_path / "file" / "out").mkdir())
    assert cli.main(["generate", "--prompt", "a"]) == 2
    err = capsys.readouterr().err
    assert err == f"error: {tmp_path}/file/out: Not a directory. Check the path, its permissions and the free space.\n"


@pytest.mark.parametrize("flags", [
    ["bench", "--repeats", "0"], ["bench", "--repeats", "-1"], ["bench", "--repeats", "two"],
    ["calibrate", "--interval", "0"], ["calibrate", "--per-kind", "0"], ["calibrate", "--limit", "0"],
    ["evaluate", "--limit", "0"], ["evaluate", "--batch", "0"],
    ["attack", "--steps", "0"], ["attack", "--limit", "0"]])
def test_counts_start_at_one(capsys, flags):  # and no model is loaded to find out
    with pytest.raises(SystemExit) as stopped:
        cli.main(flags)
    assert stopped.value.code == 2 and "a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "says"), [("generate", NEW_TOKENS), ("calibrate", PER_KIND), ("attack", Pgd.steps),
                                               ("evaluate", BATCH), ("evaluate", SAMPLES)])
def test_help_names_the_defaults_that_hold(capsys, command, says):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0 and re.search(rf"\(default:? {says}\b", " ".join(capsys.readouterr().out.split()))



@pytest.mark.parametrize("text", [
    "I'm sorry, but I can't help with that.", "I’m sorry, I can’t do this.", "Well. I cannot assist with that request.",
    "I am not able to help with that.", "I won't help you.", "As an AI, I do not give such advice.",
    "I must decline.", "Sorry, but I can't help with this.",
    # SAPT turns an answer round in the middle of a sentence.
    "1. The first step is toI cannot help with that.", "2. TheI'm not able to help.", "200I must decline."])
def test_refusals_are_seen(text):
    assert refusal_start(text) is not None


@pytest.mark.parametrize("text", [
    "Bread is made from flour.", "I can help with that.", "You can't help but smile.", "The train was late. Sorry!",
    "I will not be at home, so I put the key under the mat.", "She said he cannot help.", "It is legal to do so.",
    "AI cannot help here."])
def test_ordinary_answers_are_not_refusals(text):
    assert refusal_start(text) is None


def answer_of(tokens, harm, events=()):
    answer = Answer("lane", 0.9)
    for index, (token, p) in enumerate(zip(tokens, harm, strict=True)):
        last = index == len(tokens) - 1
        mine = tuple(event for event in events if event.token == index)
        answer.add(Step(0, 0, index, 1, token, p, mine, "length" if last else None, 0.1 * (index + 1), 0.1))
    return answer


def test_answers_sum_themselves_up():
    tokens = ["Mix", " it", ".", " I", "'m", " sorry", ",", " no"]
    harm = [0.1, 0.95, 0.97, 0.3, 0.2, 0.1, 0.1, 0.1]
    fired = [Event("check", 3, 0.97, 0.9, True), Event("injection", 3, 0.97, 0.9, True)]
    answer = answer_of(tokens, harm, fired)
    assert answer.refused and answer.refusal_token == 3 and answer.crossed == 1
    assert answer.summary() == "Crossed 0.90 at token 1; 1 injection; refusal began at 3."
    assert answer_of(["Hi", "!"], [0.1, 0.2]).summary() == "Stayed below 0.90 in 2 tokens; no refusal."
    gate = answer_of(["I'm sorry"], [0.1], [Event("gate", 0, 0.97, 0.5, True)])
    assert gate.summary() == "SASA refused before the first token: P(harm) 0.97 ≥ 0.50."
    passed = answer_of(["Hi", "!"], [0.1, 0.2], [Event("gate", 0, 0.6, 0.82, False)])
    assert passed.summary() == "SASA let it pass, P(harm) 0.60 < 0.82; stayed below 0.90 in 2 tokens; no refusal."
    passed.events = [Event("gate", 0, 0.7612, 0.7625, False)]
    assert "P(harm) 0.761 < 0.762;" in passed.summary() or "P(harm) 0.761 < 0.763;" in passed.summary()
    cut = answer_of(["I"], [0.1], [Event("gate", 0, 0.97, 0.5, True)])
    assert cut.refused and cut.refusal_token is None  # SASA refused, though one word of it is left
    gate.events = [Event("gate", 0, 0.97, 0.5, True, "steps to steal a car.", 280)]
    assert gate.summary() == ("SASA read “steps to steal a car.” and refused before the first token: "
                              "P(harm) 0.97 ≥ 0.50.")
    assert answer.tokens_per_second == pytest.approx(7 / 0.7)  # the first token comes of the prefill
    answer.finish = "eos"  # the token that ends the answer took a step of its own
    assert answer.tokens_per_second == pytest.approx(8 / 0.7)
