"""What comes from and goes to the Hugging Face Hub."""

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safety.artifacts import CONFIG, PARTS, read_config, read_tensors
from safety.card import CARD, write_card
from safety.errors import UserError

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]  # configuration, tokenizer, processor, list of weight files
SUBFOLDERS = ["*/*"]  # other formats of the same weights (onnx/, gguf/ …) are kept in folders
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

Progress = Callable[[str], None]


def fetch_description(name: str, revision: str | None) -> Path:
    """Folder in the Hub cache with everything of a model repository but its weights; its name is the commit.

    Raises:
        UserError: there is no such repository or revision, no permission, or no network and no cached copy.
    """
    return _snapshot(name, revision, SMALL_FILES)


def fetch_weights(name: str, folder: Path, progress: Progress) -> None:
    """Complete a folder of `fetch_description` with the safetensors files that transformers will load.

    Raises:
        UserError: as above, or there are no safetensors weights.
    """
    _snapshot(name, folder.name, [*SMALL_FILES, *weight_files(folder)], _bar_class(name, progress))


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files of a model folder: those of its index, or the usual single one.

    Raises:
        UserError: the index is damaged.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        return sorted(set(index["weight_map"].values()))
    except FileNotFoundError:
        return [SINGLE]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} is damaged. Fetch the model again.") from error


@contextmanager
def sentences(name: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises inside into a UserError that says what to do.

    Args:
        name, revision: of the repository that is being reached.
    """
    from huggingface_hub import errors
    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{name!r} is neither a folder here nor a Hugging Face id such as "
                        "llava-hf/llava-1.5-7b-hf.") from error
    except errors.GatedRepoError as error:
        raise UserError(f"{name} is gated: accept its terms at https://huggingface.co/{name}, then log in with "
                        "`hf auth login`.") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision!r} on the Hugging Face Hub.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{name} is not on the Hugging Face Hub, or it is private. Check the spelling; for a private "
                        "repository log in with `hf auth login`.") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{name} is not in the cache (or not all of it), and the Hugging Face Hub cannot be reached. "
                        "Connect to the internet, or give a folder.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = "Log in with `hf auth login`." if status in (401, 403) else "Try again later."
        raise UserError(f"The Hugging Face Hub answered {status} for {name}. {advice}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"The disk is full: there is no room for {name} in the Hugging Face cache. Free some "
                            "space, or set HF_HOME to another disk.") from error
        raise UserError(f"{name} could not be reached on the Hugging Face Hub ({error}). Check the connection and "
                        "try again; what was fetched is kept.") from error


def _snapshot(name: str, revision: str | None, patterns: list[str], bar: type | None = None) -> Path:
    from huggingface_hub import snapshot_download
    with sentences(name, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=SUBFOLDERS,
                                      tqdm_class=bar or _bar_class(name, lambda line: None)))


def at_twentieths(tell: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """A report of (bytes so far, bytes in total) that passes on only those at which another twentieth is done."""
    told = 0

    def report(done: int, total: int) -> None:
        nonlocal told
        if done * 20 // total > told:
            told = done * 20 // total
            tell(done, total)
    return report


def _bar_class(name: str, progress: Progress) -> type:
    """A tqdm class that says how far the bytes are, at every twentieth, instead of drawing a bar."""
    from tqdm import tqdm
    report = at_twentieths(lambda done, total: progress(
        f"Downloading {name}: {done / 1e9:.1f} of {total / 1e9:.1f} GB ({done / total:.0%})"))

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, total=kwargs.get("total"), disable=True)
            self.counts_bytes = kwargs.get("unit") == "B"

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.counts_bytes and self.total:
                report(int(self.n), int(self.total))
    return Bar


def push(folder: Path, name: str, private: bool = False) -> str:
    """Upload a folder of artifacts, and a model card made from it, to the Hub; returns the address.

    Only what belongs to the artifacts is uploaded, once it has been found whole; the repository is made if need be.

    Raises:
        UserError: the artifacts are damaged, nobody is logged in, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    config = read_config(folder)
    for file, digest in config["files"].items():
        read_tensors(folder, file, digest)
    write_card(folder, config, name)
    pictures = [path.name for path in folder.glob("*.png")]
    with sentences(name):
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload calibrated artifacts",
                          allow_patterns=[CONFIG, CARD, *config["files"], *pictures])
    return f"{api.endpoint}/{name}"


def pull(name: str, revision: str | None = None) -> Path:
    """Download a repository of artifacts; returns its folder in the Hub cache, for `load_artifacts`.

    Files that an artifact does not have, whatever they are, are not fetched.

    Raises:
        UserError: it is not there, cannot be reached, is damaged, or holds no artifacts.
    """
    folder = _snapshot(name, revision, [CONFIG, *(f"{part}.safetensors" for part in PARTS), "*.md", "*.png"])
    config = read_config(folder)
    for file, digest in config["files"].items():
        try:
            read_tensors(folder, file, digest)
        except FileNotFoundError as error:
            raise UserError(f"{name} is incomplete on the Hugging Face Hub: {file} is missing.") from error
    return folder
