"""Names and texts that cannot be written as they are: on Linux a file's name is bytes, which need not be UTF-8."""

import os
import re
import shlex

_STRAY = re.compile(r"[\ud800-\udfff]+")  # bytes that were no text (PEP 383), and halves of UTF-16's pairs


def readable(text: object) -> str:
    """A text for people and for files of UTF-8: what was no text in it is U+FFFD."""
    return _STRAY.sub("\ufffd", str(text))


def shell_word(text: str) -> str:
    """A word for a shell's command line; bytes that are no text are written out, as bash and zsh read them."""
    if not _STRAY.search(text):
        return shlex.quote(text)
    plain = text.replace("\\", r"\\").replace("'", r"\'")
    return "$'" + _STRAY.sub(lambda stray: "".join(rf"\x{byte:02x}" for byte in os.fsencode(stray[0])), plain) + "'"
