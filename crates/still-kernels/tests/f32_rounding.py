"""f32_rounding.py: how far from float64 the f32 kernels must be, because a value is two planes of bf16 in their products.

The definition in float64 twice: as it is, and with operands of products rounded as the kernels round them. `inputs`: q, k, v, the
maps and the output's gradient alone, once. `operands`: what each product reads, on both ways. Needs no GPU.
"""
import sys

import torch

import naive

# (batch, query heads, KV heads, D, tokens, budgets, mean): some of check.py's.
CASES = [
    (1, 4, 1, 128, 129, [4], False), (2, 4, 4, 64, 333, [4, 0, 64, 7], True), (2, 9, 3, 64, 451, [4, 64, 0], True),
    (1, 8, 2, 128, 517, [4, 11], True), (1, 16, 2, 96, 640, [5, 0], True), (1, 6, 2, 128, 777, [64, 3], True),
]
NAMES = ("dq", "dk", "dv", "dwq", "dwk", "dl")


def planes(x):
    high = x.bfloat16().double()
    return high + (x - high).bfloat16().double()


class Operand(torch.autograd.Function):
    """Rounds a product's operand on the way, and its gradient, which is an operand of the products before it, on the way back."""

    @staticmethod
    def forward(_, x):
        return planes(x)

    @staticmethod
    def backward(_, d):
        return planes(d)


def inputs(b, h, kv, d, n, mean, seed):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s, sc=1.0: (torch.randn(*s, generator=g) * sc).double()
    q, k, v = (r(b, x, n, d, sc=s) for x, s in ((h, 1.5), (kv, 1.5), (kv, 1.0)))
    w_q, w_k = r(h, d, d, sc=d**-0.5), r(kv, d, d, sc=d**-0.5)
    return [q, k, v, w_q, w_k, r(h, sc=0.5) + 2.0 if mean else None], r(b, h, n, d)


def gradients(values, d_out, absorbed_at, operand):
    values = [x if x is None else x.clone().requires_grad_() for x in values]
    q, k, v, w_q, w_k, log_scale = values
    r = operand
    b, h, n, d = q.shape
    group = h // k.shape[1]
    rep = lambda x: x.repeat_interleave(group, 1)
    chunk, t = torch.arange(n) // naive.CHUNK, torch.arange(n)
    absorbed = (chunk[:, None] >= chunk[None] + 2) & (chunk[:, None] >= rep(absorbed_at)[:, :, None, :])
    exact = (t[None] <= t[:, None]) & ~absorbed

    def np_map(x, w):
        f = r(x) @ r(w)
        u = f / f.norm(dim=-1, keepdim=True).clamp_min(1e-12) * x.norm(dim=-1, keepdim=True)
        return torch.cat([u.softmax(-1), (-u).softmax(-1)], -1)

    s = (r(q) @ r(rep(k)).transpose(-1, -2) / d**0.5).masked_fill(~exact, -torch.inf)
    e = (s - s.amax(-1, keepdim=True).detach()).exp()
    phi_q, phi_k = np_map(q, w_q), np_map(k, w_k)
    weight = (r(phi_q) @ rep(r(phi_k)).transpose(-1, -2)).masked_fill(~absorbed, 0.0)
    if log_scale is not None:
        weight = weight * log_scale.exp()[:, None, None] / absorbed.sum(-1, keepdim=True).clamp_min(1)
    den = (e + weight).sum(-1, keepdim=True)
    ((r(e) + r(weight)) @ r(rep(v)) / den).backward(d_out)
    return [x if x is None else x.grad for x in values]


def main():
    worst = {"inputs": 0.0, "operands": 0.0}
    for seed, (b, h, kv, d, n, budgets, mean) in enumerate(CASES):
        values, d_out = inputs(b, h, kv, d, n, mean, seed)
        score = naive.scores(values[0], values[1])
        absorbed_at = naive.absorbed_at(score, naive.select(score, budgets))
        same = lambda x: x
        exact = gradients(values, d_out, absorbed_at, same)
        rounded = [x if x is None or i == 5 else planes(x) for i, x in enumerate(values)]
        for what, got in (("inputs", gradients(rounded, planes(d_out), absorbed_at, same)),
                          ("operands", gradients(values, d_out, absorbed_at, Operand.apply))):
            errors = {}
            for name, x, ref in zip(NAMES, got, exact):
                if ref is not None and ref.norm() > 0:
                    errors[name] = ((x - ref).norm() / ref.norm()).item()
            worst[what] = max([worst[what], *(e for name, e in errors.items() if name != "dl")])
            print(f"{what:8s} D {d} tokens {n} budgets {budgets}:", " ".join(f"{k} {e:.1e}" for k, e in errors.items()), flush=True)
    print("largest of all but dl:", " ".join(f"{k} {e:.1e}" for k, e in worst.items()))


if __name__ == "__main__":
    sys.exit(main())
