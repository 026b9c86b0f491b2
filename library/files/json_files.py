"""Configurations in JSON, as Diffusers folders have them."""

import json
from pathlib import Path
from typing import Any

from library.errors import InputError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: when the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(str(path), f"cannot be read as JSON ({problem}); download it again") from None
    if not isinstance(content, dict):
        raise InputError(str(path), "is no configuration (a JSON object); download it again")
    return content
