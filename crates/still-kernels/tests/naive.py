"""The operator by its equations, in float64, with quadratic matrices; differentiable."""
import itertools
from typing import NamedTuple

import torch

CHUNK = 64


def np_map(x, w):
    f = x @ w
    f = f / f.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    u = f * x.norm(dim=-1, keepdim=True)
    return torch.cat([u.softmax(-1), (-u).softmax(-1)], -1)


def scores(q, k):
    """Self-Saliency by its definition (two distributions, then their divergence): [B, K, N]."""
    b, h, n, d = q.shape
    group = h // k.shape[1]
    s = q @ k.repeat_interleave(group, 1).transpose(-1, -2) / d**0.5
    t = torch.arange(n, device=q.device)
    window = (t[None] <= t[:, None]) & (t[None] > t[:, None] - CHUNK)
    a = s.masked_fill(~window, -torch.inf).softmax(-1)
    other = window & (t[None] != t[:, None])
    c = torch.where(other.any(-1, keepdim=True), s.masked_fill(~other, -torch.inf).softmax(-1).nan_to_num(), 0.0)
    sigma = (a * ((a + 1e-8) / (c + 1e-8)).log()).sum(-1)
    return sigma.view(b, -1, group, n).mean(2)


def select(score, budgets):
    """[B, K, N] bool: the top `budget` of each whole chunk, ties to the earlier."""
    chosen = torch.zeros_like(score, dtype=torch.bool)
    for start in range(0, score.shape[-1] - CHUNK + 1, CHUNK):
        part = score[..., start : start + CHUNK]
        order = part.sort(dim=-1, descending=True, stable=True).indices
        for head, budget in enumerate(budgets):
            chosen[:, head].scatter_(-1, order[:, head, :budget] + start, True)
    return chosen


def absorbed_at(score, selected, cap=None):
    """[B, K, N] int64: the chunk that first finds a token in the state, the number of chunks if none does."""
    n = score.shape[-1]
    chunks = -(-n // CHUNK)
    at = torch.full(score.shape, chunks, dtype=torch.int64, device=score.device)
    for b, head in itertools.product(range(score.shape[0]), range(score.shape[1])):
        values, chosen, kept = score[b, head].tolist(), selected[b, head].tolist(), []
        for now in range(2, chunks):
            retiring = range((now - 2) * CHUNK, (now - 1) * CHUNK)
            kept = sorted(kept + [t for t in retiring if chosen[t]], key=lambda t: (-values[t], t))
            beyond = len(kept) if cap is None else cap
            leaving = [t for t in retiring if not chosen[t]] + kept[beyond:]
            kept = kept[:beyond]
            at[b, head, leaving] = now
    return at


def rotated(x):
    """Each whole 32 channels times a Walsh-Hadamard matrix."""
    i = torch.arange(32, device=x.device)
    bits = (i[:, None] & i[None])[..., None] >> torch.arange(5, device=x.device) & 1
    h = (1 - 2 * (bits.sum(-1) % 2)).to(x.dtype) / 32**0.5
    whole = x.shape[-1] // 32 * 32
    return torch.cat([(x[..., :whole].unflatten(-1, (-1, 32)) @ h).flatten(-2), x[..., whole:]], -1)


def rotated_in_f32(x):
    """`rotated` by the additions of the kernels, in their order."""
    lane, whole = torch.arange(32, device=x.device), x.shape[-1] // 32 * 32
    y = x[..., :whole].unflatten(-1, (-1, 32))
    for m in (1, 2, 4, 8, 16):
        other = y[..., lane ^ m]
        y = torch.where((lane & m).bool(), other - y, y + other)
    return torch.cat([(y * x.new_tensor(32**-0.5)).flatten(-2), x[..., whole:]], -1)


def kept_rows(x, coding, keys):
    """What a state gives back of rows that it keeps so, in float64. Codes are discrete, as a selection is, and what lies halfway
    between two of them is not rare where values have 8 bits: they are made by the format's own steps, in f32."""
    if keys and coding == "int4":
        return rotated(coded(rotated_in_f32(x.float()), coding))
    return coded(x.float(), coding)


def coded(x, coding):
    away = lambda x: (x.sign() * (x.double().abs() + 0.5).floor()).double()  # halves away from zero
    # PyTorch divides numbers by tensors, and on CUDA tensors by numbers, through the reciprocal: another f32 now and then.
    number = lambda x: torch.full_like(top, x)
    top = x.abs().amax(-1, keepdim=True)
    if coding == "int8":
        inverse = torch.where(top > 0, number(127) / top, 0.0)
        return away(x * inverse) * (top / number(127)).double()
    back = []
    for group in x.split(32, -1):
        low, high = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
        offset, scale = low.half().float(), ((high - low) / number(15)).half().float()
        inverse = torch.where(scale > 0, number(1) / scale, 0.0)
        back.append(away((group - offset) * inverse).clamp(0, 15) * scale.double() + offset.double())
    return torch.cat(back, -1)


class Attention(NamedTuple):
    out: torch.Tensor
    maximum: torch.Tensor
    denominator: torch.Tensor
    exact: torch.Tensor  # the exact branch's share of the denominator
    behind: torch.Tensor  # how far the logits of the given `arg_max` are below the maximum


def attention(q, k, v, w_q, w_k, absorbed_at, log_scale=None, kept=None, arg_max=None):
    """`absorbed_at` [B, K, N]; `kept`: keys and values as they are once they are salient, if not as they come; `arg_max` [B, H, N]:
    through which key the maximum's gradient goes, if not the largest logit's."""
    b, h, n, d = q.shape
    group = h // k.shape[1]
    rep = lambda x: x.repeat_interleave(group, 1)
    chunk = torch.arange(n, device=q.device) // CHUNK
    t = torch.arange(n, device=q.device)
    out_of_window = chunk[:, None] >= chunk[None] + 2
    absorbed = out_of_window & (chunk[:, None] >= rep(absorbed_at)[:, :, None, :])
    exact = (t[None] <= t[:, None]) & ~absorbed
    s = q @ rep(k).transpose(-1, -2) / d**0.5
    if kept is not None:
        s = torch.where(out_of_window, q @ rep(kept[0]).transpose(-1, -2) / d**0.5, s)
        late = (absorbed_at > chunk + 2)[..., None]  # what was kept for a while
        k, v_absorbed = torch.where(late, kept[0], k), torch.where(late, kept[1], v)
    s = s.masked_fill(~exact, -torch.inf)
    m, behind = s.amax(-1, keepdim=True), torch.zeros_like(s[..., 0])
    if arg_max is not None:
        at = s.gather(-1, arg_max[..., None].long())
        behind = (m - at).detach().squeeze(-1)
        m = at + (m - at).detach()
    e = (s - m).exp()
    weight = (np_map(q, w_q) @ rep(np_map(k, w_k)).transpose(-1, -2)).masked_fill(~absorbed, 0.0)
    if log_scale is not None:
        count = absorbed.sum(-1, keepdim=True).clamp_min(1)
        weight = weight * log_scale.exp()[:, None, None] / count
    total = e + weight
    den = total.sum(-1, keepdim=True)
    if kept is None:
        out = total @ rep(v)
    else:
        of = lambda seen, rows: torch.where(seen, e, 0.0) @ rep(rows)
        out = of(~out_of_window, v) + of(out_of_window, kept[1]) + weight @ rep(v_absorbed)
    return Attention(out / den, m.squeeze(-1), den.squeeze(-1), e.sum(-1), behind)
