"""The CPU benchmark on a tiny random model: every row is measured, and a busy machine is named."""

import json

import pytest
from absent import absent
from tiny import random_artifacts, tiny_llava

from safety import bench
from safety.__main__ import main
from safety.errors import UserError
from safety.ui.lag import measure_lag


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


def test_the_table_says_what_is_met_and_what_is_missed(tiny, monkeypatch, capsys):
    lags = iter(({"median": 0.04, "max": 0.07, "updates": 9}, {"median": 0.3, "max": 0.9, "updates": 9}, None))
    monkeypatch.setattr(bench, "_page_lag", lambda: next(lags))
    for said in ("worst 0.07 s behind  target ≤ 0.5: met", "worst 0.90 s behind  target ≤ 0.5: MISSED", "not measured"):
        assert bench.run(1, as_json=False) == 0
        table = capsys.readouterr().out
        assert said in table and "1 repeats" in table
        row = next(line for line in table.splitlines() if "lanes_vs_separate" in line)
        assert "target ≤ 0.4" in row and ("met" in row or "MISSED" in row)


@pytest.mark.parametrize(("flags", "says"), [(["--gpu", "--json"], "leave --json out"), (["--tiny"], "--gpu")])
def test_flags_that_would_do_nothing_are_refused(flags, says, capsys):
    assert main(["bench", *flags]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.browser
def test_every_updates_way_into_the_browser_is_timed():
    try:
        lag = measure_lag(seconds=1)
    except UserError as error:
        absent(str(error))
    assert 2 <= lag.updates <= 2 * 15 and 0 < lag.median <= lag.max
