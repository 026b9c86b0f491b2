"""Texts in pictures, in fonts that have their letters: the one that ships, then those of the system."""

import logging
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where letters are drawn
    from PIL import ImageDraw
    from PIL.ImageFont import FreeTypeFont

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parents[1] / "fonts" / "DejaVuSans.ttf"  # Latin, Greek, Cyrillic, Arabic, Hebrew and more
_MOST_OPENED = 300  # fonts of the system that are looked into
# names of fonts with many letters, in the order they are tried in; others follow
_LIKED = (
    *("notosanscjk", "notosans-", "notosans", "sourcehansans", "wqy", "droidsansfallback", "unifont", "dejavu"),
    *("pingfang", "hiragino", "applesdgothic", "arialunicode", "arial unicode", "msyh", "meiryo", "yugoth", "msgothic"),
    *("malgun", "simsun", "nirmala", "leelaw", "seguisym", "segoeui", "noto", "symbola", "freesans"),
)
_NO_LETTERS = ("lastresort", "adobeblank", "emoji")  # boxes or nothing for everything, or coloured pictures
_NO_CHARACTER = "\U0010fffd"  # in private use, where no font has any
_ADVICE = {  # beginnings of Unicode's names of letters → a package with a font that has them
    **dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "FULLWIDTH", "HALFWIDTH"), "fonts-noto-cjk"),
}


class Letters:
    """A size of letters, of all fonts that there are."""

    def __init__(self, size_px: int) -> None:
        self._size_px = size_px
        self._first = _font(SHIPPED, size_px)
        self._lacking: dict[str, None] = {}

    @property
    def lacking(self) -> str:
        """Letters that were asked for and are in no font."""
        return "".join(self._lacking)

    def getlength(self, text: str) -> float:
        """The width of a text in pixels."""
        return sum(font.getlength(part) for font, part in self._parts(text))

    def draw(self, draw: "ImageDraw.ImageDraw", place: tuple[float, float], text: str, fill: str = "black") -> None:
        """Draw one line of text, its top left corner at a place."""
        x, baseline = place[0], place[1] + self._first.getmetrics()[0]
        for font, part in self._parts(text):
            draw.text((x, baseline), part, fill, font, anchor="ls")
            x += font.getlength(part)

    def _parts(self, text: str) -> Iterator[tuple["FreeTypeFont", str]]:
        """A text in parts of one font each: in one where it can be, as right-to-left writing wants it."""
        files = [SHIPPED, *dict.fromkeys(filter(None, (self._file_of(character) for character in text)))]
        whole = next((file for file in files if all(has(file, character) for character in text)), None)
        if whole is not None:
            yield _font(whole, self._size_px), text
            return
        part, file = "", SHIPPED
        for character in text:
            its = file if _follows(character) else self._file_of(character) or SHIPPED
            if its != file and part:
                yield _font(file, self._size_px), part
                part = ""
            part, file = part + character, its
        if part:
            yield _font(file, self._size_px), part

    def _file_of(self, character: str) -> Path | None:
        """The first font that has a letter; it is noted where none has."""
        if has(SHIPPED, character):
            return SHIPPED
        file = _system_font_with(character)
        if file is None:
            self._lacking[character] = None
        return file


def warn_of_lacking(letters: Letters, what: str) -> None:
    """Warn of letters that are boxes in a picture, and say what brings them."""
    if not (lacking := letters.lacking):
        return
    name = unicodedata.name(lacking[0], "")
    usual = "fonts-symbola" if unicodedata.category(lacking[0]) == "So" else "fonts-noto-core"
    package = next((package for start, package in _ADVICE.items() if name.startswith(start)), usual)
    shown = lacking[:10] + "…" * (len(lacking) > 10)
    advice = f"install one that has them (on Debian and Ubuntu: apt install {package})"
    logger.warning("%s: no font here has the letters %s, which are boxes; %s", what, shown, advice)


def _follows(character: str) -> bool:
    """Whether a character belongs to the one before it, or shows nothing, so that any font does for it."""
    return character.isspace() or unicodedata.category(character) in ("Mn", "Me", "Cf", "Cc")


@cache
def _font(file: Path, size_px: int) -> "FreeTypeFont":
    from PIL import ImageFont

    return ImageFont.truetype(file, size_px)


@lru_cache(maxsize=64)
def _plain_font(file: Path) -> "FreeTypeFont":
    """A font that looks each character up by itself, without writing systems' rules."""
    from PIL import ImageFont

    return ImageFont.truetype(file, 20, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=1 << 16)
def has(file: Path, character: str) -> bool:
    """Whether a font has a letter of its own for a character, not what it draws for those that it lacks."""
    if _follows(character):
        return True
    return _drawn(file, character) != _drawn(file, _NO_CHARACTER)


@lru_cache(maxsize=1 << 12)
def _drawn(file: Path, character: str) -> tuple[object, bytes]:
    from PIL import Image, ImageDraw

    font = _plain_font(file)
    left, top, right, bottom = font.getbbox(character)
    drawn = Image.new("L", (40, 40))
    ImageDraw.Draw(drawn).text((10 - left, 10 - top), character, 255, font)
    return (right - left, bottom - top), drawn.tobytes()


@lru_cache(maxsize=1 << 12)
def _system_font_with(character: str) -> Path | None:
    for file in _system_fonts():
        try:
            if has(file, character):
                return file
        except (OSError, ValueError):  # a font of a kind that cannot be read
            continue
    return None


@cache
def _system_fonts() -> Sequence[Path]:
    """Fonts of the system, those with many letters first."""
    found = {}
    for folder in font_folders():
        for parent, _, names in os.walk(folder):
            found |= {
                Path(parent, name): name.lower() for name in names if name.lower().endswith((".ttf", ".ttc", ".otf"))
            }
    usable = (file for file, name in found.items() if not any(each in name for each in _NO_LETTERS))
    return sorted(usable, key=lambda file: (_rank(found[file]), found[file]))[:_MOST_OPENED]


def _rank(name: str) -> tuple[int, bool]:
    """Where a font stands among those that are tried; upright and regular ones before others."""
    rank = next((rank for rank, liked in enumerate(_LIKED) if liked in name), len(_LIKED))
    return rank, any(
        style in name for style in ("bold", "italic", "oblique", "black", "thin", "light", "mono", "serif")
    )


def font_folders() -> list[Path]:
    """Where systems keep their fonts."""
    home = Path.home()
    if sys.platform == "win32":
        own = Path(os.environ.get("LOCALAPPDATA", home), "Microsoft/Windows/Fonts")
        return [Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts"), own]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    own = os.environ.get("XDG_DATA_HOME") or home / ".local/share"
    return [Path(own, "fonts"), home / ".fonts", *(Path(each, "fonts") for each in shared.split(":"))]
