"""The front door: flags, addresses, and a page that opens whatever becomes of the model."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

import app
from safety.errors import UserError


@pytest.mark.parametrize("port", ["0", "99999", "-1", "http", "", "７８６０"])
def test_app_rejects_what_is_no_port(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([f"--port={port}"]) == 2
    assert "--port must be a number from 1 to 65535" in capsys.readouterr().err


def test_app_says_when_the_port_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert app.main(["--port", str(taken.getsockname()[1])]) == 2
    assert "Another program may use that port" in capsys.readouterr().err


def test_app_says_when_the_host_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--host", "no.such.host.invalid"]) == 2
    assert "is not an address" in capsys.readouterr().err


def test_app_says_when_the_artifacts_folder_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--port", "18767", "--artifacts", "/nowhere/at/all"]) == 2
    assert "there is no folder /nowhere/at/all" in capsys.readouterr().err


def test_app_opens_the_page_although_the_model_cannot_be_loaded(
    monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("The model was not found: check its name.")

    opened: list[str] = []
    monkeypatch.setattr("safety.load", refuse)
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: opened.append(options["server_name"]))
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda self: None)
    monkeypatch.setattr("safety.ui.mode.trust_proxies", lambda: opened.append("proxies known"))
    assert app.main(["--port", "18765", "--model", "nobody/nothing"]) == 0
    told = capsys.readouterr().out
    assert opened == ["proxies known", "127.0.0.1"] and "loading nobody/nothing" in told
    assert "The model was not found: check its name." in told and "Ready" not in told


def test_app_listens_on_ipv6_too(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    opened: list[str] = []
    monkeypatch.setattr(app, "check_address", lambda host, port: int(port))  # a machine may have no IPv6
    monkeypatch.setattr(app, "report", lambda host: None)
    monkeypatch.setattr("safety.load", lambda *_, **__: None)
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: opened.append(options["server_name"]))
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda self: None)
    for host in ("::1", "::"):
        assert app.main(["--host", host]) == 0
    told = capsys.readouterr().out
    assert opened == ["[::1]", "[::]"] and told.count("Open http://[::1]:7860") == 2


def test_app_can_be_stopped_while_the_model_loads(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(host: Any) -> None:
        raise KeyboardInterrupt
    monkeypatch.setattr(app, "report", interrupt)
    monkeypatch.setattr("safety.load", lambda *_, **__: None)
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: None)
    assert app.main(["--port", "18766"]) == 130
    assert "Stopped." in capsys.readouterr().err


def test_app_takes_its_defaults_from_a_spaces_variables(monkeypatch: Any) -> None:
    monkeypatch.setenv("DEMO_MODEL", "org/model")
    monkeypatch.setenv("DEMO_QUANTIZATION", "nf4")
    flags = app.parse(["--artifacts", "here", "--revision", "main"])
    assert (flags.model, flags.quantization, flags.artifacts, flags.revision) == ("org/model", "nf4", "here", "main")


def test_a_wrong_flag_is_refused_before_torch_is_imported() -> None:
    code = "import sys, app; status = app.main(['--port', 'x']); sys.exit(status if 'torch' not in sys.modules else 1)"
    root = Path(app.__file__).parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "--port must be a number" in run.stderr


def test_the_library_offers_what_it_names() -> None:
    import safety
    assert {name: getattr(safety, name).__name__ for name in safety.__all__} == {name: name for name in safety.__all__}
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        safety.magic  # noqa: B018
