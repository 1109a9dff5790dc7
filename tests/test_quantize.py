"""Int8 on the CPU: close to fp32, and a row's numbers do not depend on the other rows."""

import torch
from tiny import random_artifacts, tiny_llava
from torch import nn

from safety.engine import Engine
from safety.quantize import WIDE, Int8Linear, fast_dtype, int8_is_faster, quantize_linears
from safety.settings import Lane, Revision, Sapt, Sasa


def test_int8_is_close_to_fp32_and_rows_are_independent():
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=False)
    quantised = Int8Linear(linear)
    x = torch.randn(3, 7, 64) * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    with torch.inference_mode():
        expected, got = linear(x), quantised(x)
        assert ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 0.03
        for row in range(3):  # a thousand times larger neighbours change nothing, nor does the number of rows
            assert torch.equal(got[row], quantised(x[row]))
            assert torch.equal(got[row, :2], quantised(x[row, :2]))


def test_lanes_of_an_int8_model_equal_the_same_lanes_alone():
    lvlm = tiny_llava()
    quantize_linears(lvlm.decoder)
    engine = Engine(lvlm, random_artifacts(lvlm))
    lanes = [Lane("none"), Lane("a", Sasa(2, 4, threshold=1.0), Revision(3, alpha=0.5), Sapt(0.0, 5)),
             Lane("b", sasa=Sasa(1, 3, mode="project"))]
    together = [answer.text for answer in engine.answer("Hello there", lanes=lanes, max_new_tokens=20)]
    assert together == [engine.answer("Hello there", lanes=[lane], max_new_tokens=20)[0].text for lane in lanes]
    assert len(set(together)) == 3


def test_the_fast_dtype_of_a_cpu_is_measured_even_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # Seconds of products in float32, then in bfloat16; a product that other work held up does not decide.
    for fast, full, half in ((torch.float32, [9, 1, 9], [4, 4, 4]), (torch.bfloat16, [4, 4, 4], [9, 1, 9])):
        runs = iter((full, half))
        monkeypatch.setattr("safety.quantize.timeit.repeat", lambda *_, runs=runs, **__: next(runs))
        assert fast_dtype("cpu") == fast
    assert fast_dtype("cuda:1") == torch.bfloat16


def test_a_busy_machine_does_not_change_the_number_format(monkeypatch):
    for exact, small, plain, faster in ((True, 9, 1, True), (False, 9, 1, False), (False, 1, 9, True)):
        ticks = iter([tick for took in (small, plain) for _ in range(4) for tick in (0, took)])
        monkeypatch.setattr("safety.quantize.onednn_is_exact", lambda exact=exact: exact)
        monkeypatch.setattr("safety.quantize.time.perf_counter", lambda ticks=ticks: next(ticks))
        assert int8_is_faster(8, 8, 1) == faster


def test_a_vocabulary_wide_layer_gives_the_same_with_and_without_onednn(monkeypatch):
    torch.manual_seed(0)
    linear, x = nn.Linear(64, WIDE, bias=False), torch.randn(5, 64) * torch.tensor([[0], [1e-3], [1], [7], [1e3]])
    packed = Int8Linear(linear)
    monkeypatch.setattr("safety.quantize.onednn_is_exact", lambda: False)
    plain = Int8Linear(linear)
    assert not plain.packed
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), plain(x), rtol=1e-6, atol=1e-6)
        assert torch.equal(packed(x)[3], packed(x[3]))
