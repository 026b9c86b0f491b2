"""Regional LoRA: network i acts for part i of a prompt, where its region is.

In the text encoder and in cross-attention's keys and values a network sees its own part's text alone; elsewhere in the
U-Net its effect is multiplied by its region. In cross-attention's output the parts are averaged, and the networks'
effects are weighted by their regions without being divided by the sum of them. The embeddings of time and of sizes know
no place.
"""

from collections.abc import Callable

import torch

from library.draw.regions import Regions
from networks.layers import Gate


def make_gate(path: str, regions: Regions) -> Gate | None:
    """Where the networks act in the U-Net's layer at a module path; None where they all act as without regions.

    Networks beyond `regions.networks` act everywhere.
    """
    if "time_emb" in path or path.startswith("add_embedding"):
        return None
    if ".attn2.to_k" in path or ".attn2.to_v" in path:
        shares = _in_own_text
    elif ".attn2.to_out" in path:
        shares = _in_own_outcome
    else:
        shares = _in_own_region
    return _gate(shares, regions)


def _gate(shares: Callable[[torch.Tensor, Regions], torch.Tensor], regions: Regions) -> Gate:
    def gate(effect: torch.Tensor, networks: list[tuple[int, int]]) -> torch.Tensor:
        factors = shares(effect, regions).to(effect.dtype)[..., None]  # (networks, rows, places, 1)
        channels = -1
        if effect.dim() == 4:
            factors = factors.transpose(2, 3).unflatten(3, effect.shape[2:])  # (networks, rows, 1, h, w)
            channels = 1
        parts = effect.split([count for _, count in networks], dim=channels)
        shared = (
            part * factors[number] if number < len(factors) else part for part, (number, _) in zip(parts, networks)
        )
        return torch.cat(list(shared), dim=channels)

    return gate


def _in_own_text(effect: torch.Tensor, regions: Regions) -> torch.Tensor:
    """A network sees the rows of its own part's text: (networks, rows of the text, 1)."""
    own = torch.eye(regions.networks, regions.parts, device=effect.device)
    return _among_others(own.repeat_interleave(regions.pictures, dim=1)[..., None], len(effect), regions)


def _in_own_outcome(effect: torch.Tensor, regions: Regions) -> torch.Tensor:
    """Where the parts are averaged afterwards, a factor undoes the division: (networks, rows of the text, places)."""
    own = torch.eye(regions.networks, regions.parts, device=effect.device)[:, :, None, None]
    sums = regions.sums(regions.token_size).flatten(1)  # (pictures, places)
    return _among_others((own * sums).flatten(1, 2), len(effect), regions)


def _in_own_region(effect: torch.Tensor, regions: Regions) -> torch.Tensor:
    """A network acts where its region is, in all branches: (networks, branches * pictures, places)."""
    height, width = effect.shape[2:] if effect.dim() == 4 else regions.token_size
    return regions.masks((height, width))[: regions.networks].flatten(2).repeat(1, len(effect) // regions.pictures, 1)


def _among_others(shares: torch.Tensor, rows: int, regions: Regions) -> torch.Tensor:
    """The shares in the rows of the prompt's parts, (networks, rows, places), with zeros for the other branches."""
    count = shares.shape[1]
    first = 0 if rows == count else regions.pictures
    result = shares.new_zeros(len(shares), rows, shares.shape[2])
    result[:, first : first + count] = shares
    return result
