"""The GPU benchmark at a tiny size on the CPU: it runs, and measures what it says."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from safety import __main__ as cli
from safety import bench_gpu
from safety.int4 import Int4Linear


def test_every_format_is_measured_and_written(tmp_path, capsys):
    out = tmp_path / "results" / "gpu.json"
    assert bench_gpu.run(1, out, tiny=True, tokens=3, prompt=80) == 0
    report = json.loads(out.read_text())
    assert set(report["formats"]) == {"bf16", "nf4", "int4"} and report["prompt_tokens"] == 80
    for found in report["formats"].values():
        assert set(found["rows"]) == {"generate()", "undefended", "sasa", "revision", "sapt", "all", "four lanes"}
        assert all(min(row["first_token"], row["seconds"]) > 0 for row in found["rows"].values())
        assert found["ratios"]["four_lanes_vs_one"] > 0
    memory = {"four_lanes_peak_gib"} if torch.cuda.is_available() else set()
    assert set(report["targets"]) == {"four_lanes_vs_one", "four_lanes_vs_separate", "all_vs_undefended"} | memory
    assert "four_lanes_vs_one: " in capsys.readouterr().out


def test_the_full_size_is_llava_7b_and_needs_a_gpu(tmp_path, monkeypatch, capsys):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("llava", **bench_gpu.FULL))
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_063_427_072
    assert model.config.image_token_id < model.get_input_embeddings().num_embeddings
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--gpu", "--out", str(tmp_path / "no.json")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_without_bitsandbytes_that_row_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu.importlib.util, "find_spec", lambda name: None)
    assert bench_gpu.run(1, tmp_path / "r.json", tiny=True, tokens=2, prompt=80, formats=("nf4",)) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["formats"]["nf4"] == {"not_measured": "bitsandbytes is not installed"}
    assert found["targets"] == {}


@pytest.mark.parametrize("bias", [False, True])
def test_int4_is_close_and_rows_are_independent(bias):
    torch.manual_seed(0)
    linear = nn.Linear(128, 96, bias=bias)
    quantised = Int4Linear(linear)
    x = torch.randn(3, 5, 128)
    with torch.inference_mode():
        expected, got = linear(x), quantised(x)
        assert got.dtype == x.dtype and (got - expected).norm() / expected.norm() < 0.09
        assert torch.allclose(got[1], quantised(x[1]), atol=1e-2)
