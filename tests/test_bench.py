"""The CPU benchmark on a tiny random model: every row is measured, and a busy machine is named."""

import json

import pytest
from tiny import random_artifacts, tiny_llava

from safety import bench


@pytest.fixture
def tiny(monkeypatch):
    lvlm = tiny_llava()
    monkeypatch.setattr(bench, "load", lambda: lvlm)
    monkeypatch.setattr(bench, "load_artifacts", random_artifacts)
    monkeypatch.setattr(bench, "_page_lag", lambda: None)
    monkeypatch.setattr(bench, "TOKENS", 4)


@pytest.mark.parametrize(("percent", "words"), [(80.0, "Other work keeps 80% of the processor busy"), (3.0, "")])
def test_every_ratio_is_measured_and_a_busy_machine_is_named(tiny, monkeypatch, capsys, percent, words):
    monkeypatch.setattr(bench.psutil, "cpu_percent", lambda interval: percent)
    assert bench.run(2, as_json=True) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["busy_before"] == percent / 100
    rows = ("lanes_vs_separate", "defended_vs_generate", "first_token_lanes_vs_one", "sasa_two_passes_vs_ours",
            "sapt_uncached_check_vs_ours", "reading_first_token_vs_one")
    for row in rows:
        assert 0 < found[row]["low"] <= found[row]["median"] <= found[row]["high"] and found[row]["n"] == 2
    assert (words in printed.err) if words else "Other work" not in printed.err
