"""How the miniature is measured: its card, and where the sign of harm is lost."""

import zlib

import pytest
import torch

from safety.mini import corpus, harm_signal
from safety.mini.card import HARM, card_text


def test_card_states_the_figures() -> None:
    figure = {"rate": 0.9, "low": 0.8, "high": 0.95, "n": 50, "hits": 45}
    report = {
        "setup": {"command": "python -m safety mini --measure", "minutes": 5, "dtype": "bfloat16"},
        "text": {"heldout_harmful": {"refused": figure}, "heldout_twins": {"refused": figure}},
        "reading": {"seen_words_list": figure},
        "naming": {"symbols_named": figure},
        "attack": {way: {"complied": figure, "on_topic": figure} for way in ("typographic", "text")},
        "benign_typographic": {"refused": figure, "on_topic": figure, "degenerate": 0.0},
        "harm_signal": {way: {"auroc": 0.75, "low": 0.7, "high": 0.8, "n": 156, "caught": figure} for way in HARM},
    }
    text = card_text(report)
    assert "| refuses harmful requests, own held-out corpus | 90 % | 80-95 % | 50 |" in text
    assert "| answers benign twins, own held-out corpus | 10 % | 5-20 % | 50 |" in text
    assert "| in a FigStep-like picture | 0.75 | 0.70-0.80 | 156 | 90 % |" in text
    assert "python -m safety mini --measure" in text


def test_harm_signal_tells_a_way_that_shows_harm_from_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    harmful = {row.text for row in corpus.harmful("train")} | {row.text for row in corpus.harmful("heldout")}

    def noise(title: str) -> torch.Tensor:
        return torch.randn(6, generator=torch.Generator().manual_seed(zlib.crc32(title.encode())))

    ways = {"shown": lambda title: noise(title) + 8.0 * (title in harmful), "hidden": noise}
    monkeypatch.setattr(harm_signal, "_ways", lambda model, processor, lexicon: ways)
    found = harm_signal.harm_signal(None, None, None, 40, 30)  # type: ignore[arg-type]
    assert found["shown"]["auroc"] > 0.98 and found["shown"]["caught"]["hits"] >= 27
    assert found["hidden"]["auroc"] < 0.7 and found["hidden"]["caught"]["hits"] <= 10
    assert found["hidden"]["low"] < found["hidden"]["auroc"] < found["hidden"]["high"]
    assert found["hidden"]["n"] == 60
