"""Attention kernels: PyTorch's and xFormers'; `matmul_attention` has one of our own."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

# (B, T, heads, size), (B, S, heads, size), (B, S, heads, size) → (B, T, heads, size)
AttentionKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Of keys in bfloat16 on a CPU, where no gradients are taken: to 77 of them attention takes twice as long as to 80
_TOKENS_AT_ONCE = 16


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PyTorch's fused attention. Its kernels hold the scores in float32 whatever the inputs' type."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, heads, T, size)
    mask, missing = None, -key.shape[2] % _TOKENS_AT_ONCE
    if missing and key.device.type == "cpu" and key.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        mask = F.pad(key.new_zeros(1, 1, 1, key.shape[2]), (0, missing), value=-torch.inf)
        key, value = (F.pad(x, (0, 0, 0, missing)) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


def xformers_attention() -> AttentionKernel:
    """xFormers' memory-efficient attention; ImportError or OSError where xFormers does not run."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention
