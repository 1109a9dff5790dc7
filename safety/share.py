"""python -m safety artifacts list | push | pull | transfer"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

from safety.artifacts import (
    SHIPPED,
    artifact_folders,
    default_folder,
    load_artifacts,
    read_config,
    save_artifacts,
    transfer_revision,
)
from safety.errors import UserError
from safety.hub import pull, push
from safety.lvlm import LVLM


def add_arguments(parser: argparse.ArgumentParser, add_model: Callable[[argparse.ArgumentParser], None]) -> None:
    """The four commands and their flags; `add_model` adds those that name a model."""
    commands = parser.add_subparsers(dest="what", required=True)
    listing = commands.add_parser("list", help="folders of artifacts that fit a model, and why others do not")
    add_model(listing)
    listing.add_argument("folder", nargs="?", type=Path, default=SHIPPED, help="where to look (default %(default)s)")
    pushing = commands.add_parser("push", help="upload a folder of artifacts to the Hugging Face Hub")
    pushing.add_argument("folder", type=Path)
    pushing.add_argument("repository", help="owner/name; made if it is not there")
    pushing.add_argument("--private", action="store_true", help="if it is made, only its owner can see it")
    pulling = commands.add_parser("pull", help="download artifacts from the Hub into artifacts/ and print their folder")
    pulling.add_argument("repository")
    pulling.add_argument("--revision", help="branch, tag or commit")
    transfer = commands.add_parser("transfer", help="give a model the revision vectors of another one of its shape")
    transfer.add_argument("source", type=Path, help="the other model's artifacts")
    add_model(transfer)
    transfer.add_argument("--out", type=Path, help="where the model's artifacts are and go (default: its usual folder)")


def run(arguments: argparse.Namespace, load: Callable[[], LVLM]) -> int:
    """Run one of them; returns the exit status. `load` loads the model that the flags name."""
    if arguments.what == "push":
        print(push(arguments.folder, arguments.repository, arguments.private))
    elif arguments.what == "pull":
        print(_keep(pull(arguments.repository, arguments.revision), arguments.repository, SHIPPED))
    elif arguments.what == "list":
        return _list(load(), arguments.folder)
    else:
        lvlm = load()
        out = arguments.out or default_folder(lvlm)
        if out.resolve() == arguments.source.resolve():
            raise UserError("--out is the folder that the vectors come from: give another one.")
        existing = load_artifacts(lvlm, out if (out / "config.json").exists() else None)
        save_artifacts(transfer_revision(arguments.source, lvlm, existing), lvlm, out)
        print(f"Saved to {out}. Measure before use: python -m safety evaluate --model {arguments.model}")
    return 0


def _keep(pulled: Path, repository: str, root: Path) -> Path:
    """Copy pulled artifacts to where those of their model are looked for, so that the page offers them too.

    Raises:
        UserError: the model that they name cannot be a folder's name.
    """
    model = str(read_config(pulled)["fingerprint"].get("model")).rstrip("/").rpartition("/")[2]
    if model in ("", ".", ".."):
        raise UserError(f"The artifacts of {repository} do not say which model they are for: ask their author.")
    folder = root / model / repository.replace("/", "--")
    if folder.exists():
        shutil.rmtree(folder)
    return Path(shutil.copytree(pulled, folder))  # follows the cache's links


def _list(lvlm: LVLM, folder: Path) -> int:
    found = artifact_folders(lvlm, folder)
    for item in found:
        print(f"does not fit  {item.folder}\n    {item.reason}" if item.reason else f"fits  {item.folder}")
    if not found:
        print(f"There are no artifacts in {folder}.")
    return 0 if any(not item.reason for item in found) else 1
