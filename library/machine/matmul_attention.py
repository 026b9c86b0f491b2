"""Attention by matrix products, on CPUs: PyTorch's kernel takes almost twice as long, without AMX thrice in bfloat16.

The weights of a row of scores s are exp(s - m) over their sum, whatever m is. oneDNN's product with a sigmoid gives
them in one pass, from scores still in float32: sigmoid(x) = exp(x) / (1 + exp(x)) is exp(x) where x is far below zero.
So m is a bound of the row's scores and `_BELOW` more; a further channel of queries and keys subtracts it, and a further
channel of the values, of ones, sums the weights up.
"""

import torch
import torch.nn.functional as F

_BELOW = 14.0  # exp(-14) is a millionth: so near is the sigmoid to exp there
# Weights are no smaller than exp(-87); thousands of exp(-15) times the row's largest still count together
_HIGHEST_BOUND = 87 - 15 - _BELOW
_SCORES_AT_A_TIME = 2**21  # what lies between two products stays in the processor's cache
_WORTH_ITS_CALLS = {torch.float32: 2**18, torch.bfloat16: 2**21}  # scores of a head, from which on calls for each pay


def _matmul_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention: (B, T, heads, size), (B, S, heads, size), (B, S, heads, size) → (B, T, heads, size).

    Weights are rounded to the inputs' type, and queries, keys or scores once more, which adds less than the other
    layers' rounding does. It needs oneDNN's operators, see `packed_layers.can_pack`.
    """
    batch, rows, heads, size = query.shape
    # (batch * heads, T or S, size)
    query, key, value = (x.transpose(1, 2).reshape(batch * heads, -1, size) for x in (query, key, value))
    if rows * key.shape[1] < _WORTH_ITS_CALLS[query.dtype]:
        output = _with_softmax(query, key, value)
    else:
        # each by itself: its numbers depend on no other head or picture
        output = torch.stack([_with_sigmoid(*head) for head in zip(query, key, value)])
    return output.unflatten(0, (batch, heads)).transpose(1, 2).contiguous()


def _with_softmax(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(heads, T, size), (heads, S, size), (heads, S, size) → (heads, T, size), some heads or rows at a time"""
    if query.dtype == torch.float32:  # here PyTorch's own kernel is as fast
        return F.scaled_dot_product_attention(query[None], key[None], value[None])[0]
    (heads, rows, size), columns = query.shape, key.shape[1]
    key, output, nothing = key.transpose(1, 2), torch.empty_like(query), query.new_empty(1, 1, 1)
    rows_at_a_time = min(rows, max(1, _SCORES_AT_A_TIME // columns))
    heads_at_a_time = max(1, _SCORES_AT_A_TIME // (rows_at_a_time * columns))
    for first in range(0, heads, heads_at_a_time):
        some = slice(first, first + heads_at_a_time)
        for top in range(0, rows, rows_at_a_time):
            part = slice(top, top + rows_at_a_time)
            scores = torch.baddbmm(nothing, query[some, part], key[some], beta=0, alpha=size**-0.5)
            output[some, part] = scores.softmax(-1) @ value[some]
    return output


def _with_sigmoid(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(T, size), (S, size), (S, size) → (T, size): a head as told above, or by softmax where that does not suffice."""
    (rows, size), columns = query.shape, len(key)
    wide_query, wide_key = query.float() * size**-0.5, key.float()
    # A row's weights stay the same; its largest score is then above 0 and below the bound (Cauchy and Schwarz)
    wide_key = wide_key - wide_key.mean(0)
    bounds = wide_query.norm(dim=1, keepdim=True) * wide_key.norm(dim=1).max()
    if not bounds.max() <= _HIGHEST_BOUND:  # scores lie too far apart, or are NaN
        return _with_softmax(query[None], key[None], value[None])[0]
    lowered_query = torch.cat([wide_query, -_BELOW - bounds], 1).to(query.dtype)  # (T, size + 1)
    counted_key = torch.cat([wide_key, wide_key.new_ones(columns, 1)], 1).to(key.dtype)  # (S, size + 1)
    counted_value = torch.cat([value.T, value.new_ones(1, columns)])  # (size + 1, S)
    output = torch.empty_like(query)
    rows_at_a_time = min(rows, max(1, _SCORES_AT_A_TIME // columns))
    for some in (slice(top, top + rows_at_a_time) for top in range(0, rows, rows_at_a_time)):
        weights = _product(lowered_query[some], counted_key, "sigmoid")
        sums = _product(weights, counted_value, "none")
        torch.div(sums[:, :size], sums[:, size:], out=output[some])
    return output


def _product(rows: torch.Tensor, columns: torch.Tensor, then: str) -> torch.Tensor:
    """(T, size), (S, size) → (T, S), with a function of each number"""
    return torch.ops.mkldnn._linear_pointwise(rows, columns, None, then, [], "")


# One operator where the U-Net is compiled; `torch.library.custom_op` would import the compiler in any case
_operators = torch.library.Library("gen_img", "FRAGMENT")
_operators.define("matmul_attention(Tensor query, Tensor key, Tensor value) -> Tensor")
_operators.impl("matmul_attention", _matmul_attention, "CPU")
_operators.impl("matmul_attention", lambda query, key, value: query.new_empty(query.shape), "Meta")
matmul_attention = torch.ops.gen_img.matmul_attention
