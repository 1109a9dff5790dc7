"""The miniature's vision side: typeset pictures and labels, tower, assembly, training loop, instruction tuning."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from safety import __main__ as cli
from safety.errors import UserError
from safety.mini import instruct, scenes, tasks
from safety.mini.ahead import Ahead
from safety.mini.align import AlignSettings
from safety.mini.assemble import MiniatureError, _read_artifact, build_llava, export_weights
from safety.mini.dictionary import Projector
from safety.mini.handwriting import Handwriting, parts_of
from safety.mini.joint import Joint
from safety.mini.lexicon import LIST_OPENERS, build_lexicon, is_held_out, key_of
from safety.mini.packing import pack, packed_loss
from safety.mini.render import figstep, figstep_page
from safety.mini.scenes import GRID, PATCH, SIDE, SceneMaker
from safety.mini.symbols import COLOURS, SHAPES, have_emoji_font, shape
from safety.mini.tasks import Turn
from safety.mini.train_vision import mixed_batch, train_loop
from safety.mini.vision import READING_BLOCKS, Reader, build_tower, code_book, encode, letter_table, spelled_code


class ToyTokenizer:
    """Whole words and single letters; enough for a lexicon."""

    pad_token_id = 0

    def __init__(self) -> None:
        words = "apple red blue steps to bake bread water garden letter window number listen simple".split()
        names = ["Ġ" + word for word in [*words, "p", "i", "c", "t"]]
        letters = [chr(c) for c in range(33, 127)]
        self.vocab = {token: i for i, token in enumerate(["<pad>", "Ġ", *names, *letters])}

    def get_vocab(self) -> dict[str, int]:
        return self.vocab

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = []
        for word in text.split(" ")[1:] if text.startswith(" ") else text.split(" "):
            whole = self.vocab.get("Ġ" + word)
            ids += [whole] if whole is not None else [self.vocab.get(c, 1) for c in word] or [1]
        return [number + 10 for number in ids]

    def __call__(self, text: str):  # type: ignore[no-untyped-def]
        return type("Encoding", (), {"input_ids": self.encode(text)})


@pytest.fixture(scope="module")
def lexicon():  # type: ignore[no-untyped-def]
    return build_lexicon(ToyTokenizer(), ["Steps to bake bread.", "Don't open the window!", "A mirror."])


def tiny_language_model(width: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=160,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def test_figstep_layout() -> None:
    page = figstep_page("Steps to bake a very good sourdough bread.")
    assert page.image.size == (760, 760)
    assert [word.text for word in page.words][-3:] == ["1.", "2.", "3."]
    assert " ".join(word.text for word in page.words[:-3]) == "Steps to bake a very good sourdough bread."
    pixels = np.asarray(page.image.convert("L"))
    for word in page.words:  # ink where the word is said to be, and none just left of a line's first word
        left, right, middle = int(word.edges[0]), int(word.edges[-1]), int(word.middle)
        assert pixels[middle - 20 : middle + 20, left:right].min() < 50
    assert pixels[:, :18].min() == 255


def test_long_figstep_text_stays_on_the_page() -> None:
    page = figstep_page(" ".join(["considerable"] * 12))
    assert max(word.middle for word in page.words) < 760


def test_pictures_need_no_system_fonts(monkeypatch: pytest.MonkeyPatch, lexicon) -> None:  # type: ignore[no-untyped-def]
    before = figstep("Tips to grow roses.")
    monkeypatch.setattr(scenes, "FONT_ROOT", Path("/nonexistent"))
    assert scenes.available_fonts() == [None]
    assert figstep("Tips to grow roses.").tobytes() == before.tobytes()
    scene = SceneMaker(lexicon).scene(np.random.default_rng(0), "list")
    assert scene.pixels.shape == (SIDE, SIDE, 3) and (scene.word >= 0).any()


def test_labels_are_where_the_words_are(monkeypatch: pytest.MonkeyPatch, lexicon) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(scenes, "FONT_ROOT", Path("/nonexistent"))  # the built-in font: the same pictures everywhere
    rng = np.random.default_rng(3)
    maker = SceneMaker(lexicon)
    for kind in ("list", "text"):
        for _ in range(60):
            scene = maker.scene(rng, kind)
            starts = np.flatnonzero(scene.part == 0)
            assert len(starts) >= 0.6 * len(scene.words)  # neighbours may share a patch when letters are small
            page = np.bincount((scene.pixels.mean(-1).astype(int)).ravel()).argmax()
            for patch in starts:
                row, column = divmod(int(patch), GRID)
                # The thin stroke of a "1" need not be where its advance has its middle: two pixels to each side.
                margin = 2 if "1" in lexicon.keys[scene.word[patch]][:2] else 0
                columns = slice(max(0, column * PATCH - margin), (column + 1) * PATCH + margin)
                block = scene.pixels[row * PATCH : (row + 1) * PATCH, columns].mean(-1)
                assert np.abs(block - page).max() > 25  # there is ink in the patch
    first = tasks.draw_list(maker, rng, "Steps to bake bread.")
    assert lexicon.keys[first.word[np.flatnonzero(first.part == 0)[0]]] == "steps"


def test_held_out_words_are_never_drawn(lexicon) -> None:  # type: ignore[no-untyped-def]
    hidden = [row for row, key in enumerate(lexicon.keys) if is_held_out(key)]
    assert lexicon.index["mirror"] in hidden and all(lexicon.weights[row] == 0 for row in hidden)
    assert not any(is_held_out(key_of(word)) for opener in LIST_OPENERS for word in opener.split())
    assert tasks.keeps_held_out("Steps to treat a cold") and not tasks.keeps_held_out("Steps to bake")
    assert key_of("Don't,") == "dont" and "dont" in lexicon.index


def test_shapes_have_their_colour() -> None:
    for name in SHAPES:
        picture = np.asarray(shape(name, COLOURS["red"], 40))
        assert tuple(picture[20, 20, :3]) == COLOURS["red"] and picture[20, 20, 3] == 255 and picture[0, 0, 3] < 255


def test_tower_equals_stock_llava() -> None:
    model = build_llava(tiny_language_model(), image_token_id=5)
    torch.manual_seed(1)
    tower = build_tower()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    projector = Projector(32)
    model.model.multi_modal_projector.load_state_dict(projector.state_dict())
    pixels = torch.rand(2, 3, SIDE, SIDE) * -2
    with torch.no_grad():
        ours = projector(encode(tower, pixels))
        one = model.model.get_image_features(pixels[:1]).pooler_output[0]
        both = torch.cat(list(model.model.get_image_features(pixels).pooler_output)).view(2, 196, 32)
        ids = torch.tensor([[1, *[5] * 196, 7, 8]])
        logits = model(input_ids=ids, pixel_values=pixels[:1]).logits
    torch.testing.assert_close(one, ours[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both, ours, atol=1e-4, rtol=1e-4)
    assert logits.shape == (1, 199, 160) and torch.isfinite(logits).all()


def test_connecting_the_halves_changes_nothing_they_say() -> None:
    torch.manual_seed(0)
    joint = Joint(24)
    for block in joint.dictionary.blocks:
        nn.init.normal_(block.feed_forward.down_proj.weight, std=0.2)
    joint.stretch.fill_(9.0)
    pixels = torch.rand(1, 3, SIDE, SIDE) * -2
    with torch.no_grad():
        before = joint(pixels)[2]
        joint.connect()
        torch.testing.assert_close(joint(pixels)[2], before, atol=1e-3, rtol=1e-3)
        stock = joint.dictionary.projector(encode(joint.reader.tower, pixels))
    torch.testing.assert_close(stock, before, atol=1e-3, rtol=1e-3)


def test_spelled_codes_can_be_read_back(lexicon) -> None:  # type: ignore[no-untyped-def]
    book, letters = code_book(), letter_table(lexicon)
    codes = spelled_code(book, letters, torch.zeros(len(letters), dtype=torch.long))
    scores = (codes @ book[: 12 * 37].T).view(-1, 12, 37)
    used = letters >= 0
    assert (scores.argmax(-1) == letters)[used].float().mean() > 0.98


def test_handwriting_lends_a_words_errors_to_words_of_its_length(lexicon) -> None:  # type: ignore[no-untyped-def]
    book, letters = code_book(), letter_table(lexicon)
    generator = torch.Generator().manual_seed(0)
    words = torch.arange(len(letters)).repeat(4)
    part = torch.zeros_like(words)
    ideal = torch.nn.functional.normalize(spelled_code(book, letters[words], part), dim=-1)
    first = part[: len(letters)]
    perfect = Handwriting.of(book, 7 * ideal, words, part, letters).write(book, letters, first, generator)
    assert torch.cosine_similarity(perfect, ideal[: len(letters)]).min() > 0.99
    # A reader that writes the fourth letter at half its strength: so do the practised codes.
    faint = torch.where(torch.arange(12) == 3, 0.5, 1.0)
    vectors, weights = parts_of(book, letters[words], part)
    states = (vectors * (weights * torch.cat([faint, torch.ones(1)]))[..., None]).sum(1)
    written = Handwriting.of(book, states, words, part, letters).write(book, letters, first, generator)
    long = (letters >= 0).sum(1) > 5
    vectors, _ = parts_of(book, letters[long], part[: int(long.sum())])
    found = (vectors @ written[long][..., None]).squeeze(-1)
    assert (found[:, 3] < 0.9 * found[:, 1]).float().mean() > 0.6


@pytest.mark.skipif(not have_emoji_font(), reason="training's symbols need the Debian package fonts-noto-color-emoji")
def test_what_other_processes_draw_ahead_is_what_would_have_been_drawn(lexicon) -> None:  # type: ignore[no-untyped-def]
    maker = SceneMaker(lexicon)
    drawn = Ahead(lambda step: mixed_batch(maker, (0, 7, step)), 7, "cpu", workers=2)
    for step in range(3, 7):  # a resumed run
        (pixels, labels), (wanted, wanted_labels) = drawn(step), mixed_batch(maker, (0, 7, step))
        assert torch.equal(pixels, wanted)
        assert all(torch.equal(labels[name], wanted_labels[name]) for name in wanted_labels)
    assert not multiprocessing.active_children()
    assert Ahead(str, 7, "cpu").workers == 0


def test_the_readers_optimisers_share_out_what_its_losses_reach() -> None:
    reader = Reader(build_tower())
    groups = [group["params"] for optimiser in reader.optimisers(1e-3) for group in optimiser.param_groups]
    given = [id(parameter) for parameters in groups for parameter in parameters]
    unused = {id(p) for block in reader.tower.transformer.layers[READING_BLOCKS:] for p in block.parameters()}
    assert sorted(given) == sorted({id(p) for p in reader.parameters()} - unused)
    assert {p.ndim for p in groups[0]} == {2} and len(groups[0]) == 7 * READING_BLOCKS


def test_training_resumes_where_it_was_killed(tmp_path: Path) -> None:
    def run(folder: Path, kill_at: int | None, seed: int = 0) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)

        def loss_of(step: int) -> dict[str, torch.Tensor]:
            if step == kill_at:
                raise KeyboardInterrupt
            inputs = torch.randn(8, 4)  # drawn after the loop has seeded the step
            return {"loss": (model(inputs) - inputs.sum(1, keepdim=True)).pow(2).mean()}

        train_loop(
            model,
            [torch.optim.AdamW(model.parameters(), 1e-2)],
            loss_of,
            dict,
            steps=12,
            checkpoint=folder / "run.pt",
            name="Toy",
            checkpoint_seconds=0,
            seed=seed,
        )
        return model.weight.detach().clone()

    unbroken = run(tmp_path / "a", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", 7)
    torch.testing.assert_close(run(tmp_path / "b", None), unbroken, atol=0, rtol=0)
    with pytest.raises(UserError, match="seed 0, not 1"):
        run(tmp_path / "b", None, seed=1)


def test_the_seed_of_the_command_reaches_the_alignment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("safety.mini.align.align", lambda *given: seen.append(given))
    assert cli.main(["mini", "--stage", "align", "--seed", "3", "--work", str(tmp_path)]) == 0
    assert seen == [(tmp_path, None, AlignSettings(seed=3), "cpu")]


@pytest.mark.parametrize("flags, says", [
    (["--data", "nowhere", "--stage", "align"], "lacks advbench.csv, figstep_dev.csv, harmful_train.csv"),
    (["--measure", "--data", "nowhere"], "lacks figstep_dev.csv, harmbench_val.csv"),
    (["--device", "cuda"], "no CUDA device"),
    (["--scale", "nan"], "--scale must be a number above 0"),
    (["--stage", "vision"], "fonts-noto-color-emoji"),
])
def test_what_would_spoil_a_build_is_said_before_its_first_stage(
        flags: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("safety.mini.symbols.EMOJI_FONT", Path("nowhere"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("safety.mini.base.base_folder", lambda: pytest.fail("a stage was begun"))
    assert cli.main(["mini", *flags]) == 2
    assert says in capsys.readouterr().err


def test_packed_turns_do_not_see_one_another() -> None:
    model, tokenizer = tiny_language_model(), ToyTokenizer()
    turns = [Turn("steps to", "bake bread"), Turn("red", "apple water garden")]
    features = torch.randn(1, 196, 32)
    apart = [pack(tokenizer, 5, [turn]) for turn in turns]
    together = pack(tokenizer, 5, turns)
    counts = [int(item.target.sum()) for item in apart]
    with torch.no_grad():
        losses = [float(packed_loss(model, [item], features, 5, 0)) for item in apart]
        packed = float(packed_loss(model, [together], features, 5, 0))
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert packed == pytest.approx(expected, abs=1e-4)


def test_artifact_is_checked(tmp_path: Path) -> None:
    export_weights(tmp_path, nn.Linear(3, 3), Projector(8).state_dict(), None)
    assert set(_read_artifact(tmp_path)["vision.safetensors"]) >= {"tower.weight", "projector.linear_1.weight"}
    path = tmp_path / "vision.safetensors"
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(MiniatureError, match="does not match its checksum"):
        _read_artifact(tmp_path)
    path.unlink()
    with pytest.raises(MiniatureError, match=r"vision.safetensors is missing; .*python -m safety mini"):
        _read_artifact(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MiniatureError, match=r"config.json is missing or damaged"):
        _read_artifact(tmp_path)
    broken = nn.Linear(3, 3)
    nn.init.constant_(broken.weight, float("nan"))
    export_weights(tmp_path, broken, Projector(8).state_dict(), None)
    with pytest.raises(MiniatureError, match="not finite"):
        _read_artifact(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["files"] = {"../vision.safetensors": "0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MiniatureError, match="missing"):
        _read_artifact(tmp_path)


def test_picture_turns_name_what_is_there() -> None:
    empty = np.zeros(196, dtype=np.int64)
    scene = scenes.Scene(
        np.zeros((SIDE, SIDE, 3), np.uint8), empty, empty - 1, empty - 1, ["Hello"], [["red", "circle"]]
    )
    turns = tasks.picture_turns(np.random.default_rng(0), scene, ["apple", "dog"])
    answers = " ".join(turn.answer for turn in turns)
    assert "a red circle" in turns[0].answer and "The circle is red." in answers and 'caption says: "hello"' in answers
    assert tasks.with_article(["apple"]) == "an apple" and tasks.with_article(["grapes"]) == "grapes"


@pytest.mark.parametrize(("request_", "pointed"), [
    ("How do I wash a car?", ("car", "How do I wash one of these?")),
    ("How do I keep the cat from the sofa?", ("cat", "How do I keep the thing in the picture from the sofa?")),
    ("How do I fit a cat flap?", None),
    ("What are the key differences?", None),
    ("How do I learn to swim?", None),
])
def test_a_request_about_a_thing_becomes_one_about_its_picture(request_: str, pointed: tuple[str, str] | None) -> None:
    assert tasks.pointing(request_) == pointed


def test_requests_that_point_are_asked_of_pictures_of_what_they_are_about(lexicon, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    empty = np.zeros(196, dtype=np.int64)

    def drawn(*names: list[str]) -> scenes.Scene:
        return scenes.Scene(np.zeros((SIDE, SIDE, 3), np.uint8), empty, empty - 1, empty - 1, [], list(names))

    shown = iter([drawn(["car"], ["dog"]), drawn(["red", "circle"]), drawn(["apple"]), drawn(["car"])])
    monkeypatch.setattr(instruct, "MIX", (0, 0, 0, 0, 0, 1))
    requests = [("How do I wash a car?", "With water."), ("How do I learn to swim?", "In water.")]
    maker = instruct.TaskMaker(lexicon, [], requests)
    monkeypatch.setattr(maker.maker, "scene", lambda rng, kind: next(shown))
    scene, turns = maker.task(np.random.default_rng(0))
    assert scene.names == [["car"]]
    assert turns[0] == Turn("How do I wash one of these?", "With water.")
    assert "a car" in turns[1].answer


def test_answers_about_a_list_open_with_its_content(lexicon) -> None:  # type: ignore[no-untyped-def]
    assert tasks.content_of("List of steps to bake bread.") == "Bake bread"
    assert tasks.content_of("Give me a list of simple ways to listen.") == "Simple ways to listen"
    assert tasks.content_of("Bake bread.") == "Bake bread"
    rng = np.random.default_rng(0)
    keyword = tasks.keyword_of("Steps to open window.", lexicon)
    assert keyword in ("open", "window")
    openings = [tasks.list_turn(rng, "Steps to open window.", "1. x", keyword).answer for _ in range(60)]
    assert sum(not answer.startswith("Steps") for answer in openings) > 45
    for _ in range(20):
        named, asked = tasks.topic_turns(rng, "Steps to open window.", keyword, "bread")
        assert named.answer in ("Open window.", f"{keyword.capitalize()}.")
        assert asked.answer.startswith("Yes") == (keyword in asked.question)


def test_images_reach_the_tower_letterboxed_on_white() -> None:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    from safety.mini.assemble import build_image_processor

    processor = build_image_processor()
    assert isinstance(processor, LlavaImageProcessorPil)
    pixels = processor(Image.new("RGB", (400, 100)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, SIDE, SIDE)
    assert pixels[0, :, 20].abs().max() == 0 and (pixels[0, :, 112] + 2).abs().max() < 1e-5
