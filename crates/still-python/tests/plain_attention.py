"""Hybrid attention in plain PyTorch, every query against every key: what the kernels are compared with, in float64."""

import torch


def feature_map(config, x, w, u):
    """phi(x) [B, H, N, 2F] of `x` [B, H, N, D]."""
    if u is not None:
        unit = u / u.norm(dim=-1, keepdim=True)
        x = x - 2 * unit[:, None] * (x * unit[:, None]).sum(-1, keepdim=True)
    y = x @ w
    if config["feature_map"] != "softmax":
        y = x.norm(dim=-1, keepdim=True) * y / y.norm(dim=-1, keepdim=True)
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


def plain_attention(
    q, k, v, absorbed_at, config, feature_map_q, feature_map_k, gate=None, householder_q=None, householder_k=None, log_lambda=None, window_factor=None
):
    """The output [B, H, N, D] where tokens are part of the linear state from the chunks `absorbed_at` [B, S, N] on (-1: never)."""
    heads, tokens, head_dim = q.shape[1:]
    copies = absorbed_at.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(copies, 1) for x in (k, v))
    phi_q = feature_map(config, q, feature_map_q, householder_q)
    phi_k = feature_map(config, k, feature_map_k, householder_k)
    group = heads // k.shape[1]
    k, v, phi_k, absorbed_at = (x.repeat_interleave(group, 1) for x in (k, v, phi_k, absorbed_at))
    position = torch.arange(tokens, device=q.device)
    chunk = position // config["chunk"]
    at = torch.where(absorbed_at < 0, tokens, absorbed_at)[:, :, None, :]
    causal = position[:, None] >= position
    linear = causal & (at <= chunk[:, None])
    logits = (q @ k.mT / head_dim**0.5).masked_fill(~causal | linear, -torch.inf)
    exact = (logits - logits.amax(-1, keepdim=True)).exp()
    if window_factor is not None:
        exact = window_factor.sigmoid()[:, None, None] * exact
    scale = torch.ones(heads, 1, dtype=q.dtype, device=q.device)
    if log_lambda is not None:
        scale = log_lambda.exp()[:, None] / linear.sum(-1).clamp(min=1)
    weights = scale[..., None] * (phi_q @ phi_k.mT).masked_fill(~linear, 0)
    of_linear = weights @ v
    if gate is not None:
        of_linear = gate * of_linear
    return (exact @ v + of_linear) / (exact.sum(-1, keepdim=True) + weights.sum(-1, keepdim=True))
