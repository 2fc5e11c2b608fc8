#!/usr/bin/env python3
"""Float64 oracle of the STILL hybrid attention operator, token by token, straight from the equations in docs/method.md.

Slow on purpose: no chunk parallelism, no closed forms, nothing shared with a fast kernel.
`python3 reference.py OUT_DIR` (needs numpy and safetensors) regenerates every golden case.
"""
import json, sys
from pathlib import Path
import numpy as np

EPS = 1e-8  # the epsilon of the Self-Saliency Score


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def np_map(x, w, u=None):
    """x [N,D]; w [D,F] maps a row vector x to x @ w; u [D] Householder vector or None -> [N,2F]."""
    y = x
    if u is not None:
        n = u / np.linalg.norm(u)
        y = x - 2.0 * (x @ n)[:, None] * n[None, :]
    f = y @ w
    f = f / np.maximum(np.linalg.norm(f, axis=-1, keepdims=True), 1e-12)
    f = f * np.linalg.norm(x, axis=-1, keepdims=True)
    return np.concatenate([softmax(f), softmax(-f)], axis=-1)


def self_saliency(q, k, chunk):
    """q, k [N,D] of one query head -> score [N], by the definition (two distributions, then their KL)."""
    n, d = q.shape
    out = np.zeros(n)
    for t in range(n):
        lo = max(0, t - chunk + 1)
        s = k[lo : t + 1] @ q[t] / np.sqrt(d)
        a = softmax(s)
        b = np.zeros_like(a)
        if len(a) > 1:
            b[:-1] = softmax(s[:-1])
        out[t] = np.sum(a * np.log((a + EPS) / (b + EPS)))
    return out


def still_attention(q, k, v, phi_q, phi_k, chunk, budgets, gate=None, cap=None, mean_scale=None, granularity="kv_head"):
    """q [H,N,D]; k, v [K,N,D]; phi_q [H,N,F]; phi_k [K,N,F] (query_head granularity: [H,N,F]).

    budgets: salient tokens kept of each retired chunk, one per selection head. cap: at most that many in all,
    the least salient demoted to the linear state. mean_scale: [H] for the length-normalised linear branch.
    Returns out [H,N,D], score [S,N] (S selection heads), visible [S,chunks,N] (which tokens were salient while the
    queries of each chunk were answered: feed it to a kernel to compare outputs free of ties), state S [S,F,D], z [S,F], counts [S].
    """
    H, N, D = q.shape
    K = k.shape[0]
    G = H // K
    heads = K if granularity == "kv_head" else H
    rep = 1 if granularity == "query_head" else G          # query heads that share one selection head
    kv = (lambda s: s) if granularity == "kv_head" else (lambda s: s // G)
    per_q = np.stack([self_saliency(q[h], k[h // G], chunk) for h in range(H)])
    score = per_q if granularity == "query_head" else per_q.reshape(K, G, N).mean(1)
    out = np.zeros((H, N, D))
    F = phi_k.shape[-1]
    S, Z, cnt = np.zeros((heads, F, D)), np.zeros((heads, F)), np.zeros(heads)
    visible = np.zeros((heads, (N + chunk - 1) // chunk, N), dtype=bool)
    kept = [[] for _ in range(heads)]
    for s in range(heads):
        for t in range(N):
            c = t // chunk
            if t % chunk == 0 and c >= 2:                   # chunk c-2 retires on arrival of token c*C, never before
                lo = (c - 2) * chunk
                idx = list(range(lo, lo + chunk))
                order = sorted(idx, key=lambda j: (-score[s, j], j))
                new, rest = order[: budgets[s]], order[budgets[s] :]
                pool = kept[s] + new
                if cap is not None and len(pool) > cap:
                    pool = sorted(pool, key=lambda j: (-score[s, j], j))
                    pool, rest = pool[:cap], rest + pool[cap:]
                kept[s] = sorted(pool)
                for j in rest:
                    S[s] += np.outer(phi_k[s, j], v[kv(s), j]); Z[s] += phi_k[s, j]; cnt[s] += 1
            visible[s, c, kept[s]] = True
            keys = kept[s] + list(range(max(0, (c - 1) * chunk), t + 1))
            for h in range(s * rep, (s + 1) * rep):
                logit = k[kv(s)][keys] @ q[h, t] / np.sqrt(D)
                e = np.exp(logit - logit.max())
                scale = 1.0 if mean_scale is None else mean_scale[h] / max(cnt[s], 1.0)
                lin = scale * (phi_q[h, t] @ S[s])
                if gate is not None:
                    lin = lin * gate[h, t]
                out[h, t] = (e @ v[kv(s)][keys] + lin) / (e.sum() + scale * (phi_q[h, t] @ Z[s]))
    return out, score, visible, S, Z, cnt


CASES = {
    # name: (query heads, kv heads, head dim, feature dim, chunk, tokens, budgets per selection head, options)
    "tiny_odd_length": (2, 1, 8, 8, 4, 21, [1], {}),
    "one_chunk": (2, 2, 8, 8, 8, 7, [1, 1], {}),
    "gqa_ragged_budgets": (4, 2, 16, 16, 8, 53, [2, 8], {"householder": True}),
    "zero_budget_is_window_plus_linear": (2, 2, 16, 16, 8, 41, [0, 0], {}),
    "full_budget_is_softmax": (2, 1, 16, 16, 8, 45, [8], {}),
    "gate": (4, 2, 16, 8, 8, 50, [1, 1], {"gate": True, "householder": True}),
    "mean_normalised": (4, 2, 16, 16, 8, 50, [1, 1], {"mean": True}),
    "capped_with_demotion": (4, 2, 16, 16, 8, 90, [3, 3], {"cap": 7}),
    "query_head_routing": (4, 2, 16, 16, 8, 50, [1, 1, 1, 1], {"granularity": "query_head", "gate": True, "householder": True}),
    "one_token": (2, 1, 8, 8, 4, 1, [1], {}),
    "exactly_one_chunk": (2, 1, 8, 8, 4, 4, [1], {"mean": True}),
    "exactly_two_chunks": (2, 1, 8, 8, 4, 8, [1], {"mean": True}),
    "two_chunks_and_one": (2, 1, 8, 8, 4, 9, [1], {"mean": True}),
    "exactly_five_chunks": (4, 2, 8, 8, 4, 20, [1, 2], {}),
    "full_head_under_a_cap": (4, 2, 16, 16, 8, 75, [8, 2], {"cap": 11, "mean": True}),
    "smollm2_head_shape": (9, 3, 64, 64, 64, 333, [4, 4, 64], {}),
}


def main(out_dir):
    from safetensors.numpy import save_file
    out_dir = Path(out_dir); out_dir.mkdir(parents=True, exist_ok=True)
    for n, (name, (H, K, D, F, C, N, budgets, opt)) in enumerate(CASES.items()):
        rng = np.random.default_rng(1000 + n)
        gran = opt.get("granularity", "kv_head")
        S = K if gran == "kv_head" else H
        f32 = lambda *s, sc=1.0: (rng.normal(size=s) * sc).astype(np.float32)
        q, k, v = f32(H, N, D, sc=1.5), f32(K, N, D, sc=1.5), f32(K, N, D)
        k += (0.8 * np.repeat(q.reshape(K, H // K, N, D).mean(1), 1, 0)) * (rng.random((K, N, 1)) < 0.2)  # some tokens look at themselves
        k = k.astype(np.float32)
        wq, wk = f32(H, D, F, sc=D**-0.5), f32(S, D, F, sc=D**-0.5)
        t = {"q": q, "k": k, "v": v, "w_q": wq, "w_k": wk}
        uq = uk = None
        if opt.get("householder"):
            uq, uk = f32(H, D), f32(S, D); t |= {"u_q": uq, "u_k": uk}
        gate = None
        if opt.get("gate"):
            gate = (1 / (1 + np.exp(-rng.normal(size=(H, N, D))))).astype(np.float32); t["gate"] = gate
        mean = None
        if opt.get("mean"):
            mean = np.exp(rng.normal(size=H)).astype(np.float32) * 8; t["mean_scale"] = mean
        d = lambda x: None if x is None else x.astype(np.float64)
        G = H // K
        ks = (lambda s: k[s]) if gran == "kv_head" else (lambda s: k[s // G])
        phi_q = np.stack([np_map(d(q[h]), d(wq[h]), None if uq is None else d(uq[h])) for h in range(H)])
        phi_k = np.stack([np_map(d(ks(s)), d(wk[s]), None if uk is None else d(uk[s])) for s in range(S)])
        o, sc, vis, St, Z, cnt = still_attention(d(q), d(k), d(v), phi_q, phi_k, C, budgets, d(gate), opt.get("cap"), d(mean), gran)
        if N < 300: t |= {"phi_q": phi_q, "phi_k": phi_k}
        t |= {"out": o, "score": sc, "visible": vis.astype(np.uint8), "state_s": St, "state_z": Z, "state_count": cnt}
        meta = {"chunk": str(C), "budgets": json.dumps(budgets), "cap": json.dumps(opt.get("cap")), "granularity": gran}
        save_file({a: np.ascontiguousarray(b) for a, b in t.items()}, out_dir / f"{name}.safetensors", metadata=meta)
        print(f"{name:36s} out {o.shape} rms {np.sqrt((o**2).mean()):.4f} visible at the end {vis[:, -1].sum(1).tolist()}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".")
