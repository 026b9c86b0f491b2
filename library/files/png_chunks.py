"""PNG files taken apart: the chunks that the pixels need, and the texts beside them.

Pillow refuses a whole file for a long text or colour profile, or for damage in one. Here a picture is what its pixels
say, and texts are read by themselves. The format: https://www.w3.org/TR/png-3/
"""

import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
XMP = "XML:com.adobe.xmp"  # the text that holds XMP
_FRAME_BYTES = 12  # of a chunk: the length and kind before its data, the checksum after it
_LONGEST_TEXT = 1 << 24  # characters of a text that are read; a graph of thousands of nodes is shorter


def take_apart(content: bytes) -> tuple[bytes, dict[str, str]]:
    """Part a PNG file into a PNG of its pixels alone, with Exif where that is whole, and its texts by name."""
    kept: list[bytes | memoryview] = [SIGNATURE]
    texts: dict[str, str] = {}
    for kind, data, whole in _chunks(content):
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            texts |= _text(kind, bytes(data))
        elif _is_needed(kind) or (kind == b"eXIf" and zlib.crc32(whole[4:-4]) == int.from_bytes(whole[-4:])):
            kept.append(whole)
    return b"".join(kept), texts


def _chunks(content: bytes) -> Iterator[tuple[bytes, memoryview, memoryview]]:
    """Each chunk's kind, its data, and the whole of it up to IEND; the last one may be cut short."""
    view, place = memoryview(content), len(SIGNATURE)
    kind = b""
    while place < len(view) and kind != b"IEND":
        end = place + _FRAME_BYTES + int.from_bytes(view[place : place + 4])
        kind = bytes(view[place + 4 : place + 8])
        yield kind, view[place + 8 : end - 4], view[place:end]
        place = end


def _is_needed(kind: bytes) -> bool:
    """Whether a chunk has to do with pixels: it is critical (its kind begins with a capital), or transparency."""
    return kind == b"tRNS" or not kind[:1].islower()


def _text(kind: bytes, data: bytes) -> dict[str, str]:
    """A chunk's text under its name; none where it is damaged."""
    name, _, rest = data.partition(b"\0")
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed = rest[:1] == b"\1"
        rest = rest[2:].split(b"\0", 2)[-1]  # after the language, and the name in that language
    elif packed:
        rest = rest[1:]  # after the method, of which there is one
    try:
        text = zlib.decompressobj().decompress(rest, _LONGEST_TEXT) if packed else rest
    except zlib.error:
        return {}
    return {name.decode("latin-1"): decode(text)}


def decode(text: bytes) -> str:
    """A text whose encoding is not said: UTF-8 where it can be, else Latin-1, which PNG means by tEXt and zTXt."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")
