"""Models named by their Hugging Face id: from the client's cache when they are there, else from the network."""

from pathlib import Path

from library.errors import InputError
from library.weight_files import choose_weights

_PARTS = {
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
}
_TIMEOUT_S = 10


def fetch_model(repo_id: str, subject: str) -> Path:
    """Return the local folder of a model (or a lone VAE) of the Hugging Face Hub.

    The network is asked only for what the cache lacks, and then for one weight file of each network.

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
        if isinstance(cached, str) and _missing_weights(_names(Path(cached).parent)) == []:
            return Path(cached).parent
    return _download(repo_id, subject)


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _chosen_weights(names: list[str]) -> dict[str, str | None]:
    """The weight file of each network among a repository's file names, by the network's folder ("" for a lone VAE)."""
    parts = _PARTS if "model_index.json" in names else {"": _PARTS["vae"]}
    chosen = {}
    for part, stems in parts.items():
        folder = f"{part}/" if part else ""
        inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
        weights = choose_weights(inside, stems)
        chosen[part] = folder + weights if weights and folder + "config.json" in names else None
    return chosen


def _missing_weights(names: list[str]) -> list[str]:
    return [part for part, weights in _chosen_weights(names).items() if weights is None]


def _download(repo_id: str, subject: str) -> Path:
    from huggingface_hub import model_info, snapshot_download

    wanted = "model_index.json"
    try:
        # First the small files: this call fails at once, without retries, where there is no network.
        snapshot_download(repo_id, allow_patterns=[wanted, "config.json"], etag_timeout=_TIMEOUT_S)
        names = [sibling.rfilename for sibling in model_info(repo_id, timeout=_TIMEOUT_S).siblings]
        if missing := _missing_weights(names):
            raise InputError(subject, f"has no weights in {missing[0] or 'its'} folder; choose a Diffusers repository")
        wanted = "the weights"
        patterns = ["*.json", "tokenizer/*", *_chosen_weights(names).values()]
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
