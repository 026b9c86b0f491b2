"""Models that are not given as a file: from a cache when they are there, else from the network."""

import hashlib
import secrets
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from library.errors import InputError
from library.files.families import TEXT_PARTS
from library.files.shards import choose_index, shards_of
from library.files.weight_files import TEXT_STEMS, WEIGHT_STEMS, choose_weights

_PARTS = {"unet": WEIGHT_STEMS, "vae": WEIGHT_STEMS} | dict.fromkeys(TEXT_PARTS, TEXT_STEMS)
_TIMEOUT_S = 10


def fetch_model(repo_id: str, subject: str, stems: tuple[str, ...]) -> Path:
    """Return the local folder of a model of the Hugging Face Hub, or of a single component.

    The network is asked only for what the cache lacks, and then for one weight file of each component.

    Args:
        repo_id: `owner/name`.
        subject: what messages are about.
        stems: how the weight file's name may begin where the repository holds a single component.

    Raises:
        InputError: when a file is neither in the cache nor to be had, naming it.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for index in ("model_index.json", "config.json"):
        try:
            cached = try_to_load_from_cache(repo_id, index)
        except HFValidationError as problem:
            raise InputError(subject, f"no such file or folder, and no id of the Hub ({problem}); check it") from None
        if isinstance(cached, str) and _missing_weights(_names(Path(cached).parent), stems) == []:
            return Path(cached).parent
    return _download(repo_id, subject, stems)


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _chosen_weights(names: list[str], stems: tuple[str, ...]) -> dict[str, list[str]]:
    """The weight files of each component among a repository's file names, by its folder ("" for a single one)."""
    parts = {"": stems}
    if "model_index.json" in names:  # families differ in how many text encoders they have
        parts = {part: s for part, s in _PARTS.items() if part not in TEXT_PARTS[1:] or f"{part}/config.json" in names}
    chosen = {}
    for part, part_stems in parts.items():
        folder = f"{part}/" if part else ""
        inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
        weights, index = choose_weights(inside, part_stems), choose_index(inside, part_stems)
        files = [weights] if weights else [index, *shards_of(index, inside)] if index else []
        chosen[part] = [folder + file for file in files] if folder + "config.json" in names else []
    return chosen


def _missing_weights(names: list[str], stems: tuple[str, ...]) -> list[str]:
    return [part for part, files in _chosen_weights(names, stems).items() if not files]


def _download(repo_id: str, subject: str, stems: tuple[str, ...]) -> Path:
    from huggingface_hub import model_info, snapshot_download

    wanted = "config.json or model_index.json"
    try:
        # First the small files: this call fails at once, without retries, where there is no network.
        snapshot_download(repo_id, allow_patterns=[wanted, "config.json"], etag_timeout=_TIMEOUT_S)
        names = [sibling.rfilename for sibling in model_info(repo_id, timeout=_TIMEOUT_S).siblings or ()]
        if missing := _missing_weights(names, stems):
            raise InputError(subject, f"has no weights in {missing[0] or 'its'} folder; choose another repository")
        wanted = "the weights"
        files = [file for chosen in _chosen_weights(names, stems).values() for file in chosen]
        patterns = ["*.json", "tokenizer/*", *files]
        return Path(snapshot_download(repo_id, allow_patterns=patterns, etag_timeout=_TIMEOUT_S))
    except InputError:
        raise
    except Exception as problem:  # the client raises its own errors, its HTTP library's and the system's
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]
        raise InputError(
            subject,
            f"is no path here, and {wanted} cannot be fetched from the Hugging Face Hub ({reason}); "
            "check the id and the network, or download the model and give its folder",
        ) from None


def fetch_file(url: str, path: Path, sha256_start: str, subject: str, option: str) -> None:
    """Fetch a published file to where it is kept, unless it is there: whole and unchanged, or not at all.

    Args:
        url: where it is published.
        path: where it is kept.
        sha256_start: the first digits of its SHA-256.
        subject: what messages are about.
        option: what names another place of the file.

    Raises:
        InputError: when it is not there and cannot be fetched, saying what to put where.
    """
    if path.is_file():
        return
    import http.client  # here: it takes a tenth of the time to --help

    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            digits = _download_file(url, temporary)
            if not digits.startswith(sha256_start):
                raise OSError("what came is another file")
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink()
    except (OSError, http.client.HTTPException) as problem:
        raise InputError(
            subject,
            f"{path.name} is not here and cannot be fetched ({problem}); "
            f"get {url} elsewhere and put it at {path}, or give it with {option}",
        ) from None


def _download_file(url: str, path: Path) -> str:
    """Fetch a file, showing a bar on terminals; returns its SHA-256."""
    import urllib.request

    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, path.open("xb") as file:
        size = int(response.headers.get("Content-Length") or 0) or None
        with tqdm(total=size, unit="B", unit_scale=True, desc=url.rpartition("/")[2], disable=None) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
    return digest.hexdigest()


def fetch_again(place: str) -> None:
    """Fetch a file of the cache that another machine has, of the same revision; it may lack afterwards, too.

    Args:
        place: its path from the cache's folder, `models--OWNER--NAME/snapshots/REVISION/FILE`.
    """
    folder, kind, revision, *file = place.split("/")
    if kind != "snapshots" or not folder.startswith("models--") or not file:
        return
    from huggingface_hub import hf_hub_download

    repo_id = folder.removeprefix("models--").replace("--", "/")
    with suppress(Exception):  # whatever the client raises: what lacks is named by its path
        hf_hub_download(repo_id, "/".join(file), revision=revision, etag_timeout=_TIMEOUT_S)
