"""A Hugging Face Space: front matter that agrees with the requirements, and a start with a stand-in for `spaces`."""

import os
import pickle
import re
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from page_stand_in import StandInEngine
from PIL import Image

from safety.settings import Lane, Sampling, Sapt
from safety.ui import space

ROOT = Path(__file__).parent.parent
# What ZeroGPU offers, from Hugging Face's documentation of it (September 2026).
ZERO_GPU_PYTHON = ("3.10", "3.12")
ZERO_GPU_TORCH = ("2.8.0", "2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0")


def requirements() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    found = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    return {requirement.name.lower(): requirement for requirement in found}


@pytest.fixture(scope="module")
def front_matter() -> dict[str, Any]:
    block = re.match(r"---\n(.*?)\n---\n", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert block, "README.md has no front matter: a Space would not know what to start"
    return yaml.safe_load(block[1])


def test_front_matter_agrees_with_the_requirements(front_matter: dict[str, Any]) -> None:
    assert front_matter["sdk"] == "gradio" and (ROOT / front_matter["app_file"]).is_file()
    assert requirements()["gradio"].specifier.contains(front_matter["sdk_version"])
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    least = re.search(r'requires-python = ">=([\d.]+)"', project)
    assert least and Version(front_matter["python_version"]) >= Version(least[1])
    for key in ("title", "emoji", "colorFrom", "colorTo", "license", "short_description"):
        assert front_matter[key]
    assert len(front_matter["short_description"]) <= 60


def test_zero_gpu_offers_what_we_need(front_matter: dict[str, Any]) -> None:
    assert front_matter["python_version"] in ZERO_GPU_PYTHON
    assert any(requirements()["torch"].specifier.contains(version) for version in ZERO_GPU_TORCH)
    assert "spaces" not in requirements()  # a Space brings it; elsewhere it is not wanted


class StandInSpaces(types.ModuleType):
    """`spaces` as ZeroGPU has it: arguments and yields cross to another process, so they must survive pickling."""

    def __init__(self) -> None:
        super().__init__("spaces")
        self.estimates: list[int] = []
        self.closed = threading.Event()

    def GPU(self, duration: Any) -> Any:
        def decorate(task: Any) -> Any:
            def call(*arguments: Any) -> Any:
                self.estimates.append(duration(*arguments))
                steps = task(*pickle.loads(pickle.dumps(arguments)))
                try:
                    for row in steps:
                        yield pickle.loads(pickle.dumps(row))
                finally:
                    self.closed.set()
                    steps.close()

            return call

        return decorate


@pytest.fixture
def spaces(monkeypatch: Any) -> StandInSpaces:
    module = StandInSpaces()
    monkeypatch.setitem(sys.modules, "spaces", module)
    monkeypatch.setattr(space, "_engine", None)
    return module


def steps_of(source: Any, cancel: threading.Event, image: Any = None) -> Any:
    return source(
        None,
        prompt="Make a list.",
        image=image,
        lanes=[Lane("No defense"), Lane("SAPT", sapt=Sapt(interval=8))],
        max_new_tokens=120,
        sampling=Sampling(),
        cancel=cancel,
    )


def test_a_run_crosses_to_the_gpu_process_as_plain_data(spaces: StandInSpaces) -> None:
    engine = StandInEngine(5000, 0.0)
    source = space.use_zero_gpu(engine)  # type: ignore[arg-type]
    there = list(steps_of(source, threading.Event(), Image.new("RGB", (30, 20), "red")))
    request = engine.requests[-1]
    assert request["image"].size == (30, 20) and request["lanes"][1].sapt == Sapt(interval=8)
    lanes = request["lanes"]
    here = list(engine.stream("Make a list.", None, lanes=lanes, max_new_tokens=120))
    assert [(s.lane, s.index, s.text, s.harm, s.events, s.alternatives, s.layers) for s in there] == [
        (s.lane, s.index, s.text, s.harm, s.events, s.alternatives, s.layers) for s in here
    ]
    assert spaces.estimates == [25]  # seconds asked for


def test_stop_ends_the_work_on_the_gpu(spaces: StandInSpaces) -> None:
    cancel = threading.Event()
    steps = steps_of(space.use_zero_gpu(StandInEngine(5000, 0.0)), cancel)  # type: ignore[arg-type]
    next(steps)
    cancel.set()
    assert list(steps) == [] and spaces.closed.is_set()


PROBE = """
import os, sys
sys.path[:0] = [{tests!r}, {stub!r}, {root!r}]
os.chdir({root!r})
import app
assert sys.modules["spaces"].first, "torch or gradio came before spaces"
import gradio
from page_stand_in import StandInEngine
from safety.ui import host, space
host.Loader.__call__ = lambda self, choice, progress: StandInEngine()
launched = []
gradio.Blocks.launch = lambda self, **options: launched.append((self, options))
gradio.Blocks.block_thread = lambda self: None
assert app.main(["--port", "{port}"]) == 0
page, options = launched[0]
print("zero" if space._engine else "plain", options["server_name"], len(page.fns))
"""
STUB = """
import sys
first = "torch" not in sys.modules and "gradio" not in sys.modules
def GPU(duration):
    return lambda task: task
"""


def test_the_app_starts_on_zero_gpu(tmp_path: Path) -> None:
    (tmp_path / "spaces.py").write_text(STUB)
    script = PROBE.format(tests=str(ROOT / "tests"), stub=str(tmp_path), root=str(ROOT), port=18766)
    environment = {"SPACES_ZERO_GPU": "true", "SPACE_ID": "a/b", "GRADIO_SERVER_NAME": "0.0.0.0", "PATH": "/usr/bin",
                   "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith("zero 0.0.0.0"), run.stdout
