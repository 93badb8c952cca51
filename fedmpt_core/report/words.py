"""What a report says whatever the run was, out of `words.toml`: paragraphs by key, and the checklist's questions."""

import tomllib
from importlib.resources import files
from typing import Any

WORDS: dict[str, Any] = tomllib.loads(files("fedmpt_core.report").joinpath("words.toml").read_text(encoding="utf-8"))
