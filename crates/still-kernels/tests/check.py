"""check.py LIBRARY [check|bench|all]: parity with naive.py and times beside PyTorch's attention."""
import sys

import torch
import torch.nn.functional as F

import naive
from still_cuda import CHUNK, STEPS, Decoder, Layer, Still, capped_budgets

DEV = "cuda"
LIMIT = {torch.bfloat16: 5e-3, torch.float32: 1e-5}
GRADIENT_LIMIT = {torch.bfloat16: 1e-2, torch.float32: 3e-5}
SCALE_GRADIENT_LIMIT = {torch.bfloat16: 1e-2, torch.float32: 2e-4}  # two numbers, each a sum over all tokens of either sign
NEAR_TIE = {torch.bfloat16: 1e-5, torch.float32: 1e-4}  # logits: the largest, and which key has it
# (batch, query heads, KV heads, D, tokens, budgets, mean)
CASES = [
    (1, 1, 1, 64, 1, [4], False), (1, 2, 1, 64, 64, [4], True), (1, 2, 1, 128, 65, [4], True),
    (2, 3, 3, 96, 128, [4, 0, 64], True), (1, 4, 1, 128, 129, [4], False), (2, 4, 4, 64, 333, [4, 0, 64, 7], True),
    (2, 9, 3, 64, 451, [4, 64, 0], True), (1, 8, 2, 128, 517, [4, 11], True), (1, 16, 2, 96, 640, [5, 0], True),
    (1, 8, 1, 128, 1000, [4], False), (1, 6, 2, 128, 777, [64, 3], True), (2, 8, 2, 128, 2111, [4, 9], True),
    (1, 4, 2, 80, 451, [4, 64], True), (2, 8, 1, 80, 1000, [9], False),
]

# The same with a cap: below a budget, reached and not, of full heads, beyond one step of the demoting block, with many tiles.
CAPPED = [
    ((1, 2, 2, 64, 257, [4, 0], True), 3), ((2, 4, 4, 64, 333, [4, 0, 64, 7], True), 9), ((1, 3, 1, 128, 700, [4], False), 10),
    ((1, 6, 2, 96, 777, [64, 3], True), 100), ((1, 8, 2, 128, 1000, [4, 11], True), 1), ((2, 8, 2, 128, 2111, [40, 9], True), 300),
    ((2, 4, 2, 80, 777, [64, 3], True), 100), ((1, 8, 1, 64, 1500, [5], True), 64), ((1, 2, 2, 96, 130, [4, 64], True), 2), ((1, 4, 2, 128, 450, [2, 4], True), 1000), ((1, 2, 1, 64, 9216, [64], True), 8500),
]


def inputs(b, h, kv, d, n, dtype, mean, seed):
    g = torch.Generator(DEV).manual_seed(seed)
    r = lambda *s, sc=1.0: (torch.randn(*s, generator=g, device=DEV) * sc).to(dtype)
    # q, k, v as a projection leaves them: [B, N, H, D] seen as [B, H, N, D]
    q, k, v = (r(b, n, x, d, sc=s).transpose(1, 2) for x, s in ((h, 1.5), (kv, 1.5), (kv, 1.0)))
    w_q, w_k = r(h, d, d, sc=d**-0.5), r(kv, d, d, sc=d**-0.5)
    log_scale = torch.randn(h, generator=g, device=DEV) * 0.5 + 2.0 if mean else None
    return q, k, v, w_q, w_k, log_scale


def relative(x, ref):
    assert x.shape == ref.shape, (x.shape, ref.shape)
    x = x.double()
    if not x.isfinite().all():
        return float("nan")
    return ((x - ref).norm() / ref.norm().clamp_min(1e-30)).item()


def lone_token_terms(d_out, v, other, d):
    """What a lone token's dq or dk is the difference of: its weight is 1, its logit's gradient d_out . v - d_out . out is nothing but
    rounding. Each of the two is about as large as its terms with random signs."""
    group = d_out.shape[1] // v.shape[1]
    rep = lambda x: x.repeat_interleave(group, 1) if x.shape[1] == v.shape[1] else x
    return ((d_out * rep(v)).norm(dim=-1) * rep(other).norm(dim=-1)).norm().item() / d**0.5


def check_case(lib, case, dtype, seed, backward, cap=None):
    b, h, kv, d, n, budgets, mean = case
    q, k, v, w_q, w_k, log_scale = inputs(b, h, kv, d, n, dtype, mean, seed)
    layer = Layer(lib, q, k, v, w_q, w_k, budgets, log_scale, stats=True, cap=cap)
    layer.forward()
    torch.cuda.synchronize()
    wide = [x if x is None else x.double().requires_grad_() for x in (q, k, v, w_q, w_k, log_scale)]
    problems, errors = [], {}
    with torch.no_grad():
        score = naive.scores(wide[0], wide[1])
    chosen = layer.selected_tokens()[..., :n]
    differ = (score - layer.score).abs().max().item()
    errors["score"] = differ
    if not differ <= 1e-4 * max(1.0, score.abs().max().item()):
        problems.append("score")
    whole = n // CHUNK
    for head, budget in enumerate(capped_budgets(budgets, cap)):  # nothing chosen may score less than something left out, beyond rounding
        sc, ch = (x[:, head, : whole * CHUNK].unflatten(-1, (whole, CHUNK)) for x in (score, chosen))
        if whole and not (ch.sum(-1) == budget).all():
            problems.append("budget")
        low = sc.masked_fill(~ch, torch.inf).amin(-1) if whole else torch.zeros(0)
        high = sc.masked_fill(ch, -torch.inf).amax(-1) if whole else torch.zeros(0)
        if whole and not (low >= high - 1e-4).all():
            problems.append("selection")
    # Demotion is exact: of the same scores it leaves the same tokens.
    absorbed_at = layer.absorbed()
    if not (absorbed_at == naive.absorbed_at(layer.score, chosen, cap)).all():
        problems.append("demotion")
    # Which key has the largest logit is discrete as well: compared first, then fed, since the maximum's gradient goes to that key.
    ref = naive.attention(*wide[:5], absorbed_at, wide[5], arg_max=layer.arg_max)
    with torch.no_grad():
        errors["out"] = relative(layer.out, ref.out)
        errors["max"] = (layer.maximum - ref.maximum).abs().max().item()
        # What goes with the kernel's own maximum: that its error is in `max` already.
        errors["den"] = relative(layer.denominator, ref.exact * (ref.maximum - layer.maximum).exp() + ref.denominator - ref.exact)
        errors["tie"], ties = ref.behind.max().item(), int((ref.behind > 0).sum())
    if not errors["out"] <= LIMIT[dtype]:
        problems.append("out")
    if not (max(errors["max"], errors["tie"]) <= NEAR_TIE[dtype] and errors["den"] <= LIMIT[dtype]):
        problems.append("stats")
    if backward:
        d_out = torch.randn(b, n, h, d, device=DEV, generator=torch.Generator(DEV).manual_seed(1000 + seed)).to(dtype).transpose(1, 2)
        layer.prepare_backward(d_out)
        layer.backward()
        torch.cuda.synchronize()
        ref.out.backward(d_out.double())
        got = [layer.d_q, layer.d_k, layer.d_v, layer.d_w_q, layer.d_w_k, layer.d_log_scale]
        for name, x, wanted in zip(("dq", "dk", "dv", "dwq", "dwk", "dl"), got, wide):
            if wanted is None:
                continue
            grad = wanted.grad
            if n == 1 and name in ("dq", "dk"):
                other = wide[1] if name == "dq" else wide[0]
                errors[name] = (x.double() - grad).norm().item() / lone_token_terms(d_out.double(), wide[2], other, d)
            else:
                errors[name] = x.double().norm().item() if grad.norm() == 0 else relative(x, grad)
            if not errors[name] <= (SCALE_GRADIENT_LIMIT if name == "dl" else GRADIENT_LIMIT)[dtype]:
                problems.append(name)
    name = str(dtype).removeprefix("torch.")
    print(f"{'FAIL' if problems else 'ok  '} {name:9s} {case} cap {cap}", " ".join(f"{a} {e:.1e}" for a, e in errors.items()), f"ties {ties}", *problems, flush=True)
    return not problems


def check(lib):
    backward = hasattr(lib.lib, "still_backward")
    good = [check_case(lib, case, dtype, i, backward) for i, case in enumerate(CASES) for dtype in (torch.float32, torch.bfloat16)]
    good += [check_case(lib, case, dtype, i, backward, cap) for i, (case, cap) in enumerate(CAPPED) for dtype in (torch.float32, torch.bfloat16)]
    good += [check_decode(lib, case, dtype, i, read, cap) for i, (case, read, cap) in enumerate(CAPPED_DECODE) for dtype in (torch.float32, torch.bfloat16)]
    good += [check_decode(lib, case, dtype, i, read) for i, (case, read) in enumerate(DECODE_CASES) for dtype in (torch.float32, torch.bfloat16)]
    good += [check_onto(lib, case, dtype, i, calls, cap) for i, (case, calls, cap) in enumerate(ONTO_CASES) for dtype in (torch.float32, torch.bfloat16)]
    good += [
        check_onto(lib, case, dtype, i, calls, cap, coding)
        for i, (case, calls, cap) in enumerate(ONTO_CASES) for coding in ("int8", "int4") for dtype in (torch.float32, torch.bfloat16)
    ]
    print(f"{sum(good)} of {len(good)} cases agree")
    return all(good)


def check_decode(lib, case, dtype, seed, read, cap=None):
    """Reads `read` tokens at once, then the rest one by one; batch rows run at the same positions."""
    b, h, kv, d, n, budgets, mean = case
    q, k, v, w_q, w_k, log_scale = inputs(b, h, kv, d, n, dtype, mean, seed)
    whole = Layer(lib, q, k, v, w_q, w_k, budgets, log_scale, cap=cap)
    whole.forward()
    decoder = Decoder(lib, b, kv, d, dtype, w_q, w_k, budgets, log_scale, n, splits=3, cap=cap)
    if read:
        prefix = Layer(lib, q[:, :, :read], k[:, :, :read], v[:, :, :read], w_q, w_k, budgets, log_scale, cap=cap)
        prefix.s_last, prefix.z_last = decoder.s, decoder.z
        prefix.forward()
        decoder.fill(prefix)
    outs = []
    for t in range(read, n):
        decoder.positions.fill_(t)
        outs.append(decoder.step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1]).clone())
    torch.cuda.synchronize()
    wide = [x if x is None else x.double() for x in (q, k, v, w_q, w_k, log_scale)]
    ref = naive.attention(*wide[:5], whole.absorbed(), wide[5]).out
    error = relative(torch.cat(outs, 2), ref[:, :, read:])
    last = min(n, 64)
    slots = torch.arange(n - last, n, device=DEV) % 128
    score = (decoder.ring_score[:, :, slots] - whole.score[:, :, n - last :]).abs().max().item()
    good = error <= LIMIT[dtype] and score <= 1e-3
    name = str(dtype).removeprefix("torch.")
    print(f"{'ok  ' if good else 'FAIL'} decode {name:9s} {case} cap {cap} from {read}: out {error:.1e} score {score:.1e}", flush=True)
    return good


def check_onto(lib, case, dtype, seed, calls, cap=None, coding="plain"):
    """Reads `calls`, each so many tokens of every sequence, onto what it has; then decodes what is left."""
    b, h, kv, d, n, budgets, mean = case
    q, k, v, w_q, w_k, log_scale = inputs(b, h, kv, d, n, dtype, mean, seed)
    whole = Layer(lib, q, k, v, w_q, w_k, budgets, log_scale, cap=cap)
    whole.forward()
    decoder = Decoder(lib, b, kv, d, dtype, w_q, w_k, budgets, log_scale, n, splits=3, cap=cap, coding=coding)
    outs, at = [[] for _ in range(b)], [0] * b
    for lengths in calls:
        longest = max(lengths)

        def padded(x):  # with what must not be looked at
            to = torch.full((b, x.shape[1], longest, d), float("nan"), dtype=dtype, device=DEV)
            for i, length in enumerate(lengths):
                to[i, :, :length] = x[i, :, at[i] : at[i] + length]
            return to

        for i, out in enumerate(decoder.read_onto(padded(q), padded(k), padded(v), lengths)):
            outs[i].append(out)
            at[i] += lengths[i]
    torch.cuda.synchronize()
    errors = {}
    for i in range(b):  # the state of a sequence that is read at once
        one = lambda x: x[i : i + 1, :, : at[i]]
        alone = Layer(lib, one(q), one(k), one(v), w_q, w_k, budgets, log_scale, cap=cap)
        alone.s_last, alone.z_last = torch.zeros_like(decoder.s[:1]), torch.zeros_like(decoder.z[:1])
        alone.forward()
        for name, got, expected in (("S", decoder.s, alone.s_last), ("z", decoder.z, alone.z_last)):
            if alone.retired and (coding == "plain" or cap is None):  # else what is demoted was kept as codes
                errors[name] = max(errors.get(name, 0.0), relative(got[i : i + 1], expected.double()))
    for _ in range(min(n - max(at), 70)):
        rows_of = lambda x: torch.stack([x[i, :, at[i] : at[i] + 1] for i in range(b)])
        out = decoder.step(rows_of(q), rows_of(k), rows_of(v))
        decoder.positions += 1
        for i in range(b):
            outs[i].append(out[i].clone())
            at[i] += 1
    torch.cuda.synchronize()
    wide = [x if x is None else x.double() for x in (q, k, v, w_q, w_k, log_scale)]
    kept = None if coding == "plain" else [naive.kept_rows(x, coding, x is wide[1]) for x in wide[1:3]]
    ref = naive.attention(*wide[:5], whole.absorbed(), wide[5], kept).out
    errors["out"] = max(relative(torch.cat(outs[i], 1), ref[i, :, : at[i]]) for i in range(b))
    good = all(error <= LIMIT[dtype] for error in errors.values())
    name = str(dtype).removeprefix("torch.")
    print(f"{'ok  ' if good else 'FAIL'} onto {name:9s} {coding} {case} cap {cap} {calls}:", " ".join(f"{a} {e:.1e}" for a, e in errors.items()), flush=True)
    return good


ONTO_CASES = [
    ((1, 4, 2, 64, 700, [4, 64], True), [[2], [3], [59], [2], [62], [2], [64], [3], [127], [129], [130]], None),
    ((1, 8, 2, 128, 640, [4, 0], True), [[200], [1], [65], [63], [128]], None),
    ((2, 6, 2, 96, 700, [3, 5], False), [[130, 1], [3, 200], [70, 0], [2, 64], [190, 1], [128, 128]], None),
    ((1, 3, 1, 128, 2500, [5], True), [[700], [1600]], None),
    ((1, 4, 2, 64, 700, [4, 64], True), [[2], [3], [59], [2], [62], [2], [64], [3], [127], [129], [130]], 9),
    ((1, 8, 2, 128, 900, [4, 40], True), [[200], [1], [65], [63], [500]], 70),
    ((2, 6, 2, 96, 700, [3, 5], False), [[130, 1], [3, 200], [70, 0], [2, 64], [190, 1], [128, 128]], 2),
    ((1, 2, 2, 64, 700, [64, 64], True), [[300], [320]], 150),
    ((2, 4, 2, 80, 700, [4, 64], True), [[130, 1], [3, 200], [70, 0], [2, 64], [190, 1], [128, 128]], None),
    ((2, 4, 2, 80, 700, [4, 64], True), [[130, 1], [3, 200], [70, 0], [2, 64], [190, 1], [128, 128]], 30),
    ((3, 4, 1, 64, 1500, [11], True), [[1, 700, 320], [900, 64, 2], [300, 300, 300]], 100),
    ((1, 4, 2, 128, 600, [4, 7], True), [[100], [400]], 0),
]
DECODE_CASES = [((1, 4, 2, 64, 300, [4, 64], True), 0), ((2, 8, 2, 128, 470, [4, 0], True), 257), ((1, 6, 2, 96, 330, [3, 5], False), 128),
                ((2, 8, 1, 128, 420, [64], True), 192), ((1, 16, 1, 128, 700, [16], False), 511), ((1, 3, 3, 64, 263, [0, 4, 9], True), 63),
                ((1, 4, 2, 80, 330, [4, 64], True), 128)]
CAPPED_DECODE = [((1, 4, 2, 64, 460, [4, 64], True), 0, 9), ((2, 8, 2, 128, 600, [4, 40], True), 257, 70), ((1, 6, 2, 96, 530, [3, 5], False), 128, 2),
                 ((1, 8, 1, 128, 620, [7], True), 512, 30), ((1, 2, 2, 64, 400, [64, 64], True), 63, 150),
                 ((2, 4, 2, 80, 530, [4, 9], True), 128, 5)]


def median_ms(f, repeat=15, warm=3, calls=1):
    for _ in range(warm):
        f()
    times = []
    for _ in range(repeat):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        for _ in range(calls):
            f()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) / calls)
    return sorted(times)[len(times) // 2]


def bench(lib, n, budget, h=32, kv=8, d=128, repeat=15, backward=True):
    q, k, v, w_q, w_k, log_scale = inputs(1, h, kv, d, n, torch.bfloat16, True, 7)
    layer = Layer(lib, q, k, v, w_q, w_k, [budget] * kv, log_scale, stats=False)
    layer.forward()
    parts = {f: median_ms(getattr(layer, f), repeat, calls=4) for f in ("saliency", "select", "map_keys", "states", "linear", "exact")}
    whole = median_ms(layer.forward, repeat)
    from torch.nn.attention import SDPBackend, sdpa_kernel
    qc, kc, vc = (x.contiguous() for x in (q, k, v))
    line = f"N {n} budget {budget}/64: forward {whole:.3f} ms ("
    line += ", ".join(f"{a} {t:.3f}" for a, t in parts.items()) + ")"
    kr, vr = (x.repeat_interleave(h // kv, 1) for x in (kc, vc))
    flash = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        name = backend.name.split("_")[0].lower()
        try:
            with sdpa_kernel(backend):
                flash[name] = median_ms(lambda: F.scaled_dot_product_attention(qc, kr, vr, is_causal=True), min(repeat, 5), 1)
                line += f"; {name} {flash[name]:.3f} ms (ours {whole / flash[name]:.2f}x)"
        except Exception as e:  # a peer that is not there is said, not hidden
            line += f"; {name}: {str(e)[:60]}"
    print(line, flush=True)
    if not (backward and hasattr(lib.lib, "still_backward")):
        return
    layer = Layer(lib, q, k, v, w_q, w_k, [budget] * kv, log_scale, stats=True)
    layer.forward()
    layer.prepare_backward(torch.randn_like(q))
    both = median_ms(lambda: (layer.forward(), layer.backward()), repeat)
    back = median_ms(layer.backward, repeat)
    steps = " ".join(f"{a} {median_ms(lambda: layer.backward(i), repeat, calls=4):.3f}" for i, a in enumerate(STEPS))
    line = f"N {n} budget {budget}/64: forward+backward {both:.3f} ms (backward {back:.3f}: {steps}), scratch {layer.scratch.numel() / 2**20:.0f} MiB"
    leaf = [x.detach().clone().requires_grad_() for x in (qc, kr, vr)]
    grad = torch.randn_like(qc)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        name = backend.name.split("_")[0].lower()
        try:
            with sdpa_kernel(backend):
                t = median_ms(lambda: F.scaled_dot_product_attention(*leaf, is_causal=True).backward(grad), min(repeat, 5), 1)
                line += f"; {name} {t:.3f} ms (ours {both / t:.2f}x)"
        except Exception as e:
            line += f"; {name}: {str(e)[:60]}"
    print(line, flush=True)


def bench_decode(lib, n, batch=1, budget=4, h=32, kv=8, d=128, layers=32):
    """One step of `layers` layers in a CUDA graph; states are random: only lengths decide the time."""
    _, _, _, w_q, w_k, log_scale = inputs(1, h, kv, d, 1, torch.bfloat16, True, 3)
    r = lambda *s: torch.randn(*s, device=DEV).to(torch.bfloat16)
    q, k, v = r(batch, h, 1, d), r(batch, kv, 1, d), r(batch, kv, 1, d)
    line = f"decode N {n} batch {batch} budget {budget}/64, {layers} layers:"
    maps = [(w_q.clone(), w_k.clone()) for _ in range(layers)]
    for splits in (8, 16, 32):
        stack = [Decoder(lib, batch, kv, d, torch.bfloat16, *maps[i], [budget] * kv, log_scale, n + 128, splits) for i in range(layers)]
        for x in stack:
            for y in (x.ring_k, x.ring_v, x.store_k, x.store_v, x.s, x.z, x.ring_score):
                y.normal_().abs_()
        times = {}
        for name, position in (("step", n + 5), ("retiring step", n)):
            for x in stack:
                x.positions.fill_(position)
            for x in stack[:2]:
                x.step(q, k, v)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for x in stack:
                    x.step(q, k, v)
            times[name] = median_ms(graph.replay, 15, 3)
        kept = (n // CHUNK - 1) * budget
        moved = layers * (batch * kv * (kept * 4 * d + 128 * 4 * d + 8 * d * d) + 2 * h * d * d)  # store, ring, state, maps
        line += f" {splits} splits {times['step']:.3f} ms ({moved / times['step'] / 1e6:.0f} GB/s; retiring {times['retiring step']:.3f});"
        del stack
    print(line, flush=True)


def main():
    lib = Still(sys.argv[1])
    what = sys.argv[2] if len(sys.argv) > 2 else "all"
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__)
    good = True
    if what in ("check", "all"):
        good = check(lib)
    if what in ("bench", "all"):
        bench(lib, 8192, 4)
        bench(lib, 32768, 4, repeat=7)
        bench(lib, 131072, 4, repeat=3, backward=False)
        bench_decode(lib, 8192)
        bench_decode(lib, 131072)
        bench_decode(lib, 32768, batch=16)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
