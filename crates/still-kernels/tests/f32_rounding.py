"""f32_rounding.py: how far from float64 the f32 kernels must be, because a value is two planes of bf16 in their products.

The definition in float64 twice: as it is, and with operands of products rounded as the kernels round them. `inputs`: q, k, v, the
maps and the output's gradient alone, once. `operands`: what each product reads, on both ways.

Then what else tells a kernel from float64: sums of 9,216 keys that tensor cores round toward zero, running or a tile apart; and
codes of bf16 rows that lie halfway between two (`long_sums`, `code_ties`). Needs no GPU.
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


def mma_sums(sums, a, b):
    """sums + a b as tensor cores add it up: 16 columns and two planes at a time, rounded toward zero."""
    parts = lambda x: (x.bfloat16().double(), (x - x.bfloat16().double()).bfloat16().double())
    (a_high, a_low), (b_high, b_low) = parts(a), parts(b)
    for k in range(0, a.shape[1], 16):
        for x, y in ((a_low, b_high), (a_high, b_low), (a_high, b_high)):
            exact = sums + x[:, k : k + 16] @ y[k : k + 16]
            nearest = exact.float()
            toward = torch.nextafter(nearest, torch.zeros_like(nearest))
            sums = torch.where(nearest.double().abs() > exact.abs(), toward, nearest).double()
    return sums


def long_sums(n=9216, d=64, tile=64):
    """A late tile of queries that sees `n` keys exactly: its output from weights by tensor cores."""
    g = torch.Generator().manual_seed(0)
    r = lambda rows, sc: (torch.randn(rows, d, generator=g) * sc).double()
    q, k, v = r(tile, 1.5), r(n, 1.5), r(n, 1.0)
    weights = lambda s: (s.masked_fill(torch.arange(n) > torch.arange(n - tile, n)[:, None], -torch.inf) / d**0.5).softmax(-1)
    ref, none = weights(q @ k.T) @ v, torch.zeros(tile, d).double()
    p = weights(torch.cat([mma_sums(torch.zeros(tile, tile).double(), q, k[i : i + tile].T) for i in range(0, n, tile)], 1))
    sums = {"planes alone": planes(p) @ planes(v), "running": none, "apart": none}
    for i in range(0, n, tile):
        a, b = p[:, i : i + tile], v[i : i + tile]
        sums["running"] = mma_sums(sums["running"], a, b)
        sums["apart"] = (sums["apart"] + mma_sums(none, a, b)).float().double()
    return {name: ((x - ref).norm() / ref.norm()).item() for name, x in sums.items()}


def code_ties(seed, b=3, h=4, kv=1, d=64, n=1264, budget=11, cap=100):
    """The output's distance in one of check.py's cases, of values halfway between two 4-bit codes that go to the even one, from the
    format's; and of its rows in bf16."""
    g = torch.Generator().manual_seed(seed)
    r = lambda *s, sc=1.0: (torch.randn(*s, generator=g) * sc).bfloat16().double()
    q, k, v = r(b, h, n, d, sc=1.5), r(b, kv, n, d, sc=1.5), r(b, kv, n, d)
    w_q, w_k = r(h, d, d, sc=d**-0.5), r(kv, d, d, sc=d**-0.5)
    score = naive.scores(q, k)
    at = naive.absorbed_at(score, naive.select(score, [budget]), cap)
    rows = [naive.kept_rows(x, "int4", x is k) for x in (k, v)]
    low, high = v.unflatten(-1, (-1, 32)).aminmax(dim=-1, keepdim=True)
    offset, scale = low.half().double(), ((high - low) / 15).half().double()
    even = (((v.unflatten(-1, (-1, 32)) - offset) / scale).round().clamp(0, 15) * scale + offset).flatten(-2)
    out = lambda kept: naive.attention(q, k, v, w_q, w_k, at, torch.full((h,), 2.0).double(), kept).out
    ref = out(rows)
    worst = lambda x: max(((x[i] - ref[i]).norm() / ref[i].norm()).item() for i in range(b))
    return {"codes to even": worst(out([rows[0], even])), "rows in bf16": worst(out([x.bfloat16().double() for x in rows]))}


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
    show = lambda errors: " ".join(f"{k} {e:.1e};" for k, e in errors.items())
    print("largest of all but dl:", show(worst))
    print("sums of 9,216 keys:", show(long_sums()))
    for seed in range(3):
        print("int4 rows of bf16:", show(code_ties(seed)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
