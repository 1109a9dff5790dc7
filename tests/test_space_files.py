"""What the Hub asks of the files of a Space: a plain git push takes none above 10 MiB, `hf upload` takes them all."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIMIT = 10 * 2**20


def test_how_to_send_files_that_git_alone_cannot_is_told() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    large = [path.name for path in paths if path.is_file() and path.stat().st_size > LIMIT]
    assert not large or "hf upload OWNER/SPACE . --repo-type space" in (ROOT / "README.md").read_text("utf-8")
