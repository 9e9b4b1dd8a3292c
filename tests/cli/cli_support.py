"""What the tests of several commands share."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import Result
from PIL import Image
from support import picture

LIMITS = ["--max-visual-tokens", "64", "--max-text-tokens", "64"]
SMALL = ("--trials", 3, "--side", 140, "--text-tokens", 12)  # a search
PROMPT = ["--prompt", "how many objects are there ?"]


def refused(result: Result, message: str, code: int = 1) -> None:
    """One line on stderr, nothing on stdout, the exit code, and no traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.output
    if code == 1:
        assert result.stderr.splitlines()[-1] == errors[0]


def write_data(folder: Path) -> Path:
    Image.fromarray(picture(4, 5)).save(folder / "a.png")
    lines = [{"image": "a.png", "prompt": prompt, "answer": "left"} for prompt in ("what is there ?", "list the objects .")]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "data.jsonl"
