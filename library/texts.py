"""Names and texts that cannot be written as they are: on Linux a file's name is bytes, which need not be UTF-8."""

import re
import shlex

# Bytes that Python could not decode (PEP 383: each is 0xDC00 and the byte), and halves of UTF-16's pairs
_STRAY = re.compile("[\ud800-\udfff]+")


def is_text(name: object) -> bool:
    """Whether a name can be written in UTF-8, which libraries that are not Python's want of it."""
    return not _STRAY.search(str(name))


def readable(text: object) -> str:
    """A text for people and for files of UTF-8: what is no text in it is U+FFFD."""
    return _STRAY.sub(lambda stray: _decoded(stray[0]), str(text))


def _decoded(stray: str) -> str:
    """Bytes that were kept as they are, as text; in the locale C those of UTF-8 are among them."""
    try:
        return stray.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:
        return "\ufffd" * len(stray)


def shell_word(text: str) -> str:
    """A word for a shell's command line; bytes that are no text are written as bash and zsh read them."""
    if is_text(text):
        return shlex.quote(text)
    plain = text.replace("\\", r"\\").replace("'", r"\'")
    return "$'" + _STRAY.sub(lambda stray: "".join(rf"\x{ord(each) & 0xFF:02x}" for each in stray[0]), plain) + "'"
