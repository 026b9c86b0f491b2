"""The program's version, and those of the libraries whose versions show in the pictures."""

from importlib.metadata import PackageNotFoundError, version

VERSION = "0.2.0"
_LIBRARIES = ("torch", "diffusers", "transformers")


def versions() -> dict[str, str]:
    """The versions of the program and of its libraries, by name."""
    found = {"gen_img_diffusers": VERSION}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "none"
    return found
