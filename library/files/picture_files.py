"""Picture files: their formats with the texts they carry, and saving them whole, over nothing."""

import errno
import hashlib
import io
import itertools
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import EnvironmentFault, InputError
from library.files.picture_texts import EXIF_IFD, IMAGE_DESCRIPTION, USER_COMMENT, read_texts
from library.files.pictures import opened
from library.files.png_chunks import decode

if TYPE_CHECKING:
    import numpy as np
    from PIL.PngImagePlugin import PngInfo

logger = logging.getLogger(__name__)

TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")  # names of files that are being written, with their marks

# ---------------------------------------------------------------------------------------------------------------------
# Formats

FORMATS = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG"}  # by suffix: Pillow's names
DEFAULT_QUALITY = 95  # of WebP and JPEG
LONGEST_SIDE_PX = {".webp": 16_383, ".jpg": 65_500}  # what the format, and libjpeg, take
# PNG's usual level 6 takes four times as long as zlib's RLE strategy (3), which looks for runs alone: in what PNG's
# filters leave of a picture in colour there is little else, and the files are as large
_PNG_COMPRESSION = {"compress_level": 4, "compress_type": 3}
_EXIF_BYTES = 65_533  # what a JPEG's segment takes


def encode(pixels: "np.ndarray", suffix: str, texts: Mapping[str, str], quality: int = DEFAULT_QUALITY) -> bytes:
    """A picture (H, W, 3) uint8 as the content of a file, with its metadata.

    PNG holds each text under its name. JPEG and WebP hold `parameters` in Exif's UserComment, where the web UI puts
    it, and the others as JSON in ImageDescription.
    """
    from PIL import Image

    picture, stream = Image.fromarray(pixels), io.BytesIO()
    if suffix == ".png":
        picture.save(stream, "PNG", pnginfo=_png_info(texts), **_PNG_COMPRESSION)
    else:
        settings = {"quality": quality} if suffix == ".webp" else {"quality": quality, "subsampling": 0}
        picture.save(stream, FORMATS[suffix[1:]], exif=_exif(texts), **settings)
    return stream.getvalue()


def _png_info(texts: Mapping[str, str]) -> "PngInfo":
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        if decode(text.encode("latin-1", "ignore")) == text:
            info.add_text(name, text)
        else:  # Latin-1 that could be read as UTF-8
            info.add_itxt(name, text)
    return info


def _exif(texts: Mapping[str, str]) -> bytes:
    """The texts as Exif; what would be too long for a file is left out with a warning."""
    from PIL import Image

    comment = b"UNICODE\0" + texts["parameters"].encode("utf-16-be")
    others = json.dumps({name: text for name, text in texts.items() if name != "parameters"})
    for description in (others, ""):
        exif = Image.Exif()
        if description:
            exif[IMAGE_DESCRIPTION] = description
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = comment
        if len(data := exif.tobytes()) <= _EXIF_BYTES:
            return data
    logger.warning("metadata of more than %d bytes does not fit into JPEG and WebP; it is left out", _EXIF_BYTES)
    return b""


# ---------------------------------------------------------------------------------------------------------------------
# Files


def numbered(file: Path, first: int = 0) -> Iterator[Path]:
    """`x.png`, `x-1.png`, `x-2.png`, … from the first number on; `x.png` itself is number 0."""
    for number in itertools.count(first):
        yield file.with_name(f"{file.stem}-{number}{file.suffix}") if number else file


def temporary_mark(file: Path) -> str:
    """What tells a file's temporary files from those of others; its name may leave no room for more."""
    return hashlib.sha256(os.fsencode(file.stem)).hexdigest()[:16]


def save_whole(content: bytes, file: Path) -> Path:
    """Save a file whole or not at all, over nothing.

    It is written under a temporary name in the same folder and then linked to its own; a name that has been taken
    meanwhile gets `-1`, `-2`, ….

    Returns:
        The file it became.

    Raises:
        InputError: when its name is too long.
        EnvironmentFault: when the folder or the disk does not take it.
    """
    temporary = file.with_name(f".{temporary_mark(file)}.{secrets.token_hex(8)}.tmp")  # as in TEMPORARY
    try:
        try:
            with temporary.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            return _place(temporary, file)
        finally:
            with suppress(OSError):
                temporary.unlink()
    except OSError as problem:
        if problem.errno == errno.ENAMETOOLONG:
            raise InputError(str(file), "has a name that is too long for the file system; shorten it") from None
        raise EnvironmentFault(
            str(file), f"cannot be written ({problem.strerror or problem}); make room or give another --outdir"
        ) from problem


def _place(temporary: Path, file: Path) -> Path:
    """Give a finished file its name without replacing anything."""
    for target in numbered(file):
        try:
            _link(temporary, target)
            return target
        except FileExistsError:
            continue
    raise AssertionError("names do not run out")


def _link(temporary: Path, target: Path) -> None:
    """Link a file to a second name; FileExistsError when that is taken."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except (OSError, AttributeError, NotImplementedError):  # a file system without hard links
        content = temporary.read_bytes()
        stream = target.open("xb")
        try:
            with stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            target.unlink()  # made by this very call
            raise


def standing_picture(file: Path, texts: Mapping[str, str]) -> Path | None:
    """A complete picture of these very texts under a name or, where that was taken, under one in its place."""
    for candidate in numbered(file):
        if not candidate.exists():
            return None
        with suppress(InputError), opened(candidate, str(candidate)) as picture:
            if read_texts(picture) == texts:
                return candidate
    return None
