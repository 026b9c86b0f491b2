"""The texts that pictures carry beside their pixels: PNG's chunks, Exif, XMP."""

import json
from typing import TYPE_CHECKING

from library.files.png_chunks import decode
from library.texts import readable

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION, EXIF_IFD, USER_COMMENT = 0x0112, 0x8769, 0x9286  # Exif 2.32
IMAGE_DESCRIPTION = 0x010E
_OTHERS = {IMAGE_DESCRIPTION: "ImageDescription", 0x010F: "Make", 0x0110: "Model", 0x0131: "Software"}
_OWN_NAMES = {"seed", "sampler", "steps", "scale"}  # that this program's texts always have


def exif_value(picture: "Image", tag: int, ifd: int | None = None) -> object:
    """A value of an open picture's Exif, or of a part of it; None where it has none, or none that can be read."""
    try:
        exif = picture.getexif()
        return (exif if ifd is None else exif.get_ifd(ifd)).get(tag)
    except Exception:  # whatever reading damaged Exif comes to; the pixels are as good without it
        return None


def read_texts(picture: "Image") -> dict[str, str]:
    """The texts that an open picture carries: PNG's by their names, and Exif's.

    `parameters` may stand in Exif's UserComment, this program's others as JSON in ImageDescription. What other
    programs write into Exif has the names of its tags, XMP is `xmp`.
    """
    picture.load()
    texts = {str(name): text for name, text in picture.info.items() if isinstance(text, str)}
    for tag, name in _OTHERS.items():
        if said := _exif_text(exif_value(picture, tag)):
            texts |= (_own_texts(said) if tag == IMAGE_DESCRIPTION else {}) or {name: said}
    for ifd in (EXIF_IFD, None):  # where it belongs, and where Fooocus puts it
        if comment := decode_user_comment(exif_value(picture, USER_COMMENT, ifd)):
            texts.setdefault("parameters", comment)
    if isinstance(xmp := picture.info.get("xmp"), bytes):
        texts.setdefault("xmp", decode(xmp))
    return {name: readable(text).replace("\0", "") for name, text in texts.items()}


def _exif_text(value: object) -> str:
    """A text in Exif; Pillow takes its bytes for Latin-1, whatever was written."""
    return decode(value.encode("latin-1", "replace")).strip("\0 ") if isinstance(value, str) else ""


def _own_texts(described: str) -> dict[str, str]:
    """The texts that this program writes into ImageDescription; none where another one did."""
    try:
        content = json.loads(described)
    except (ValueError, RecursionError):
        return {}
    is_own = isinstance(content, dict) and content.keys() >= _OWN_NAMES
    return {str(name): str(text) for name, text in content.items()} if is_own else {}


# ---------------------------------------------------------------------------------------------------------------------
# UserComment


def decode_user_comment(comment: object) -> str:
    """Exif's UserComment: eight bytes that name an encoding, which some programs leave out, then the text."""
    if isinstance(comment, str):
        comment = comment.encode("latin-1", "replace")
    if not isinstance(comment, bytes):
        return ""
    code, text = comment[:8].rstrip(b"\0 ").upper(), comment[8:]
    if code == b"UNICODE":
        decoded = _decode_utf16(text)
    elif code == b"JIS":
        decoded = _decode_japanese(text)
    elif code in (b"ASCII", b""):
        decoded = decode(text)
    else:
        decoded = _decode_unsaid(comment)
    return decoded.strip("\0").removeprefix("\ufeff")


def _decode_unsaid(text: bytes) -> str:
    """A text whose encoding is not said: UTF-16, where every other byte of Latin letters is 0, or as `decode` does."""
    is_utf16 = text.startswith((b"\xff\xfe", b"\xfe\xff")) or text.rstrip(b"\0").count(0) > len(text) // 4
    return _decode_utf16(text) if is_utf16 else decode(text)


def _decode_utf16(text: bytes) -> str:
    """UTF-16 in either order of bytes, or the UTF-8 that some programs write in its place.

    Without a mark the order is told by the higher bytes, which vary less: letters of one script share them.
    """
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        return text.decode("utf-16", errors="replace")
    if 0 not in text.rstrip(b"\0"):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            pass
    little_endian = len(set(text[1::2])) < len(set(text[::2]))
    return text.decode("utf-16-le" if little_endian else "utf-16-be", errors="replace")


def _decode_japanese(text: bytes) -> str:
    """ISO-2022-JP, which the standard means, or the Shift-JIS or UTF-8 that is written in its place."""
    for encoding in ("iso2022_jp", "utf-8", "cp932"):
        try:
            return text.decode(encoding)
        except UnicodeDecodeError:
            continue
    return text.decode("latin-1")
