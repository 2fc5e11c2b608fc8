"""The kernels as functions of torch tensors, through the C interface of src/cuda/still.h."""
import ctypes as c

import torch

CHUNK = 64
NO_CAP = 2**31 - 1
CODINGS = {"plain": 0, "int8": 1, "int4": 2}
NEVER = -1  # UINT32_MAX, in the int32 of torch


class Shape(c.Structure):
    _fields_ = [(n, c.c_int32) for n in ("batch", "heads", "kv_heads", "tokens", "head_dim", "dtype", "flags")]


class Rows(c.Structure):
    _fields_ = [("data", c.c_void_p), ("batch", c.c_int64), ("head", c.c_int64), ("token", c.c_int64)]


class Router(c.Structure):
    _fields_ = [("kind", c.c_int32), ("layer", c.c_int32), ("seed", c.c_uint64)]


class Routing(c.Structure):
    _fields_ = (
        [(n, c.c_void_p) for n in ("budgets", "selected", "salient", "retired")]
        + [("stored", c.c_int32), ("rounded", c.c_int32), ("cap", c.c_int32)]
        + [(n, c.c_void_p) for n in ("absorbed_at", "visible", "order")]
    )


class Forward(c.Structure):
    _fields_ = (
        [(n, Rows) for n in ("q", "k", "v", "out")]
        + [(n, c.c_void_p) for n in ("w_q", "log_scale")]
        + [("routing", Routing)]
        + [(n, c.c_void_p) for n in ("s", "z", "denominator", "maximum", "arg_max")]
        + [("first_chunk", c.c_int32), ("gate", Rows), ("gate_from", c.c_void_p), ("gate_until", c.c_void_p), ("linear", Rows)]
    )


class Backward(c.Structure):
    _fields_ = (
        [(n, Rows) for n in ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v")]
        + [(n, c.c_void_p) for n in ("w_q", "w_k", "log_scale")]
        + [("routing", Routing)]
        + [(n, c.c_void_p) for n in ("phi", "s", "z", "denominator", "maximum", "arg_max", "d_w_q", "d_w_k", "d_log_scale",
                                     "host_budgets")]
        + [(n, Rows) for n in ("linear", "d_linear", "d_gate")]
        + [("scratch", c.c_void_p)]
    )


class Decode(c.Structure):
    _fields_ = (
        [(n, Rows) for n in ("q", "k", "v", "out")]
        + [(n, c.c_void_p) for n in ("w_q", "w_k", "log_scale", "budgets")]
        + [("cap", c.c_int32)]
        + [(n, c.c_void_p) for n in ("positions", "ring_k", "ring_v", "ring_score", "store")]
        + [("coding", c.c_int32)]
        + [(n, c.c_void_p) for n in ("admitted", "s", "z", "partial", "arrived")]
        + [("splits", c.c_int32), ("gate", Rows), ("router", Router), ("cos", c.c_void_p), ("sin", c.c_void_p), ("rotary", c.c_int32),
            ("states", c.c_void_p)]
    )


class Past(c.Structure):
    _fields_ = (
        [(n, c.c_void_p) for n in ("retired", "ring", "tokens")]
        + [("stored", c.c_int32)]
        + [(n, c.c_void_p) for n in ("stored_score", "stored_token", "stored_place", "stored_k", "stored_v", "s", "z")]
    )


STEPS = ("linear", "queries", "window", "salient", "states", "absorbed", "maps")


def ptr(t):
    return None if t is None else c.c_void_p(t.data_ptr())


def rows(t):
    assert t.stride(-1) == 1
    return Rows(t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


class Still:
    def __init__(self, path):
        self.lib = c.CDLL(path)
        if hasattr(self.lib, "still_backward_bytes"):
            self.lib.still_backward_bytes.restype = c.c_int64
        self.lib.still_decode_floats.restype = c.c_int64

    def call(self, name, *args):
        stream = c.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = getattr(self.lib, name)(*args, stream)
        if code != 0:
            raise RuntimeError(f"{name}: CUDA error {code}")


class Layer:
    """Buffers of one attention call; NaN-poisoned so that what no kernel wrote shows."""

    def __init__(self, lib, q, k, v, w_q, w_k, budgets, log_scale=None, stats=False, cap=None):
        b, h, n, d = q.shape
        kv = k.shape[1]
        self.lib, self.q, self.k, self.v, self.w_q, self.w_k = lib, q, k, v, w_q, w_k
        self.shape = Shape(b, h, kv, n, d, 0 if q.dtype == torch.float32 else 1)
        self.chunks = (n + CHUNK - 1) // CHUNK
        retired = max(self.chunks - 2, 0)
        self.segments = lib.lib.still_segments(c.byref(self.shape))
        new = lambda *s, dtype=q.dtype: torch.full(s, float("nan"), dtype=dtype, device=q.device)
        f32 = torch.float32
        self.score = new(b, kv, n, dtype=f32)
        self.selected = torch.full((b, kv, self.chunks), -1, dtype=torch.int64, device=q.device)
        self.salient = torch.full((b, kv, n), -(2**30), dtype=torch.int32, device=q.device)
        self.phi = new(b, kv, n, 2 * d)
        self.totals = new(self.segments * b * kv * 2 * d * (d + 1), dtype=f32)
        self.s, self.z = new(b, kv, retired, 2 * d, d), new(b, kv, retired, 2 * d, dtype=f32)
        self.s_last, self.z_last = None, None  # set by who decodes on
        self.out = new(b, h, n, d)
        self.denominator = new(b, h, n, dtype=f32)
        self.maximum = new(b, h, n, dtype=f32) if stats else None
        self.arg_max = torch.full((b, h, n), -1, dtype=torch.int32, device=q.device) if stats else None
        budgets = capped_budgets(budgets, cap)
        self.budgets = torch.tensor(budgets, dtype=torch.int32, device=q.device)
        self.log_scale = log_scale
        self.retired = retired
        # A cap that no head reaches is none.
        self.cap = cap if cap is not None and max(budgets) * retired > cap else NO_CAP
        self.absorbed_at, self.visible, self.order = None, None, None
        if self.cap != NO_CAP:
            wrong = lambda *s: torch.full(s, -(2**30), dtype=torch.int32, device=q.device)
            self.absorbed_at, self.visible = wrong(b, kv, n), wrong(b, kv, self.chunks, self.cap)
            self.order = wrong(b, kv, retired, CHUNK)

    def routing(self):
        return Routing(ptr(self.budgets), ptr(self.selected), ptr(self.salient), None, 0, 0, self.cap, ptr(self.absorbed_at),
                       ptr(self.visible), ptr(self.order))

    def saliency(self):
        self.lib.call("still_saliency", c.byref(self.shape), rows(self.q), rows(self.k), ptr(self.score))

    def select(self):
        self.lib.call("still_select", c.byref(self.shape), ptr(self.score), ptr(self.budgets), ptr(self.selected), ptr(self.salient), None)
        if self.cap != NO_CAP:
            self.lib.call("still_demote", c.byref(self.shape), ptr(self.score), ptr(self.budgets), ptr(self.selected), ptr(self.salient),
                          c.c_int32(self.cap), ptr(self.absorbed_at), ptr(self.visible), ptr(self.order), None)

    def map_keys(self):
        self.lib.call("still_map_keys", c.byref(self.shape), rows(self.k), ptr(self.w_k), c.byref(self.routing()), ptr(self.phi))

    def states(self):
        self.lib.call("still_states", c.byref(self.shape), ptr(self.phi), rows(self.v), c.byref(self.routing()), ptr(self.totals), ptr(self.s), ptr(self.z),
                      ptr(self.s_last), ptr(self.z_last), None)

    def attend(self, name="still_forward"):
        args = Forward(rows(self.q), rows(self.k), rows(self.v), rows(self.out), ptr(self.w_q), ptr(self.log_scale),
                       self.routing(), ptr(self.s), ptr(self.z), ptr(self.denominator), ptr(self.maximum), ptr(self.arg_max), 0)
        self.lib.call(name, c.byref(self.shape), c.byref(args))

    def linear(self):
        self.attend("still_linear_forward")

    def exact(self):
        self.attend("still_exact_forward")

    def route(self):
        self.saliency()
        self.select()

    def forward(self):
        self.route()
        self.map_keys()
        self.states()
        self.attend()
        return self.out

    def prepare_backward(self, d_out):
        nan = lambda t, dtype=None: torch.full_like(t, float("nan"), dtype=dtype or t.dtype)
        f32 = torch.float32
        self.d_out = d_out
        self.d_q, self.d_k, self.d_v = nan(self.q), nan(self.k), nan(self.v)
        self.d_w_q, self.d_w_k = nan(self.w_q, f32), nan(self.w_k, f32)
        self.d_log_scale = torch.full((self.q.shape[1],), float("nan"), dtype=f32, device=self.q.device)
        self.host_budgets = self.budgets.cpu()
        size = self.lib.lib.still_backward_bytes(c.byref(self.shape), ptr(self.host_budgets))
        self.scratch = torch.full((size,), 255, dtype=torch.uint8, device=self.q.device)

    def backward(self, step=None):
        learns = self.log_scale is not None
        views = (self.q, self.k, self.v, self.out, self.d_out, self.d_q, self.d_k, self.d_v)
        pointers = (self.phi, self.s, self.z, self.denominator, self.maximum, self.arg_max, self.d_w_q, self.d_w_k,
                    self.d_log_scale if learns else None, self.host_budgets)
        weights = (self.w_q, self.w_k, self.log_scale)
        args = Backward(*map(rows, views), *map(ptr, weights), self.routing(), *map(ptr, pointers), Rows(), rows(self.d_out), Rows(),
                        ptr(self.scratch))
        if step is None:
            self.lib.call("still_backward", c.byref(self.shape), c.byref(args))
        else:
            self.lib.call("still_backward_step", c.byref(self.shape), c.byref(args), c.c_int32(step))

    def selected_tokens(self):
        """[B, K, C * 64] bool."""
        bits = (self.selected[..., None] >> torch.arange(CHUNK, device=self.selected.device)) & 1
        return bits.bool().flatten(2)

    def absorbed(self):
        """[B, K, N] int64: the chunk that first finds a token in the state, `C` if none does."""
        n = self.q.shape[2]
        if self.cap != NO_CAP:
            at = self.absorbed_at.long()
            return torch.where(at == NEVER, self.chunks, at)
        own = torch.arange(n, device=self.q.device) // CHUNK + 2
        return torch.where(self.selected_tokens()[..., :n], self.chunks, own.clamp_max(self.chunks))


def capped_budgets(budgets, cap):
    """More than the cap would be demoted at once."""
    return budgets if cap is None else [min(budget, cap) for budget in budgets]


class Decoder:
    """The recurrent state of one layer for `batch` sequences."""

    def __init__(self, lib, batch, kv, d, dtype, w_q, w_k, budgets, log_scale, capacity, splits=16, device="cuda", cap=None, coding="plain"):
        h = w_q.shape[0]
        self.lib, self.w_q, self.w_k, self.log_scale, self.splits = lib, w_q, w_k, log_scale, splits
        self.shape = Shape(batch, h, kv, 1, d, 0 if dtype == torch.float32 else 1)
        new = lambda *s, dtype=dtype: torch.full(s, float("nan"), dtype=dtype, device=device)
        f32 = torch.float32
        budgets = capped_budgets(budgets, cap)
        self.cap = NO_CAP if cap is None else cap
        entries = [min(budget * (capacity // CHUNK + 1), self.cap) for budget in budgets]
        self.store_entries = max(sum(entries), 1)
        self.store_offset = torch.tensor([sum(entries[:i]) for i in range(kv)], dtype=torch.int64, device=device)
        self.budgets = torch.tensor(budgets, dtype=torch.int32, device=device)
        self.positions = torch.zeros(batch, dtype=torch.int32, device=device)
        self.ring_k, self.ring_v = new(batch, kv, 128, d), new(batch, kv, 128, d)
        self.ring_score = new(batch, kv, 128, dtype=f32)
        self.coding = CODINGS[coding]
        if coding == "plain":
            self.store_k, self.store_v = new(batch, self.store_entries, d), new(batch, self.store_entries, d)
        else:  # codes of all rows, then their scales
            groups = (d + 31) // 32
            row = d + 4 if coding == "int8" else groups * (16 + 4)
            codes = lambda: torch.full((batch * self.store_entries * row,), 255, dtype=torch.uint8, device=device)
            self.store_k, self.store_v = codes(), codes()
        self.store_score, self.store_token, self.admitted = None, None, None
        if cap is not None:
            self.store_score = new(batch, self.store_entries, dtype=f32)
            self.store_token = torch.full((batch, self.store_entries), -1, dtype=torch.int32, device=device)
            self.admitted = torch.full((batch, kv), -1, dtype=torch.int64, device=device)
        at = lambda x: 0 if x is None else x.data_ptr()
        store = (self.store_k, self.store_v, self.store_score, self.store_token, self.store_offset)
        self.store = torch.tensor([*map(at, store), self.store_entries], dtype=torch.int64, device=device)
        self.s = torch.zeros(batch, kv, 2 * d, d, device=device)
        self.z = torch.zeros(batch, kv, 2 * d, device=device)
        self.partial = new(lib.lib.still_decode_floats(c.byref(self.shape), c.c_int32(splits)), dtype=f32)
        self.arrived = torch.zeros(batch, kv, dtype=torch.int32, device=device)
        self.out = new(batch, h, 1, d)

    def args(self, q, k, v):
        weights = (self.w_q, self.w_k, self.log_scale, self.budgets)
        state = (self.positions, self.ring_k, self.ring_v, self.ring_score, self.store)
        return Decode(rows(q), rows(k), rows(v), rows(self.out), *map(ptr, weights), self.cap, *map(ptr, state), self.coding, ptr(self.admitted),
                      ptr(self.s), ptr(self.z), ptr(self.partial), ptr(self.arrived), self.splits)

    def fill(self, layer):
        """From a `Layer` whose forward pass ran with s_last and z_last set to this decoder's."""
        args = self.args(layer.q, layer.k, layer.v)
        self.lib.call("still_decode_fill", c.byref(layer.shape), rows(layer.k), rows(layer.v), ptr(layer.score),
                      c.byref(layer.routing()), c.byref(args))

    def step(self, q, k, v):
        """Rows [batch, heads, 1, D] of the tokens at `positions`."""
        args = self.args(q, k, v)
        self.lib.call("still_decode", c.byref(self.shape), c.byref(args))
        return self.out

    def read_onto(self, q, k, v, lengths):
        """Reads the first `lengths` of the rows [batch, heads, T, D], padded, onto what each sequence has: outputs of those rows."""
        (b, h, _, d), kv, device, dtype = q.shape, k.shape[1], q.device, q.dtype
        start = self.positions.tolist()
        retired = [max((p + CHUNK - 1) // CHUNK - 2, 0) for p in start]
        ring = [p - CHUNK * r for p, r in zip(start, retired)]
        ends = [r + n for r, n in zip(ring, lengths)]
        n, budgets = max(ends), self.budgets.tolist()
        chunks = (n + CHUNK - 1) // CHUNK
        slots = max(chunks - 2, 0)
        stored = max(min(budget * r, self.cap) for budget in budgets for r in retired)
        longest = max(p + length for p, length in zip(start, lengths))
        reached = max(budgets) * max((longest + CHUNK - 1) // CHUNK - 2, 0) > self.cap
        shape = Shape(b, h, kv, n, d, self.shape.dtype)
        new = lambda *s, dtype=dtype: torch.full(s, float("nan"), dtype=dtype, device=device)
        wrong = lambda *s: torch.full(s, -(2**30), dtype=torch.int32, device=device)
        ints = lambda x: torch.tensor(x, dtype=torch.int32, device=device)
        f32 = torch.float32
        counts = [ints(x) for x in (retired, ring, ends)]
        ranks = (new(b, kv, stored, dtype=f32), wrong(b, kv, stored), wrong(b, kv, stored)) if reached else (None, None, None)
        copies = self.s.clone(), self.z.clone()
        codes = (self.store_k.clone(), self.store_v.clone()) if self.coding and reached else (None, None)
        past = Past(*map(ptr, counts), stored, *map(ptr, ranks), *map(ptr, codes), *map(ptr, copies))
        state = self.args(q, k, v)
        rounded, first = (n + stored, 0) if self.coding else (0, stored)
        all_q, all_k, all_v = new(b, h, n, d), *(new(b, kv, rounded + n + first, d) for _ in range(2))
        q_rows, k_rows, v_rows = rows(all_q), rows(all_k[:, :, first:]), rows(all_v[:, :, first:])
        score, selected = new(b, kv, n, dtype=f32), torch.full((b, kv, chunks), -1, dtype=torch.int64, device=device)
        salient = wrong(b, kv, stored + n)
        visible, order = (wrong(b, kv, chunks, self.cap), wrong(b, kv, slots, CHUNK)) if reached else (None, None)
        cap = self.cap if reached else NO_CAP
        routing = Routing(ptr(self.budgets), ptr(selected), ptr(salient), ptr(counts[0]), stored, rounded, cap, None, ptr(visible), ptr(order))
        phi, segments = new(b, kv, n, 2 * d), self.lib.lib.still_segments(c.byref(shape))
        totals = new(segments * b * kv * 2 * d * (d + 1), dtype=f32)
        s, z = new(b, kv, slots + 1, 2 * d, d), new(b, kv, slots + 1, 2 * d, dtype=f32)
        out, denominator = new(b, h, n, d), new(b, h, n, dtype=f32)
        shape, past, state, routing = c.byref(shape), c.byref(past), c.byref(state), c.byref(routing)
        self.lib.call("still_past_rows", shape, past, state, q_rows, k_rows, v_rows, c.c_int32(rounded))
        self.lib.call("still_saliency", shape, q_rows, k_rows, ptr(score))
        self.lib.call("still_past_select", shape, past, state, ptr(score), ptr(selected), ptr(salient))
        if reached:
            self.lib.call("still_demote", shape, ptr(score), ptr(self.budgets), ptr(selected), ptr(salient), c.c_int32(self.cap), None,
                          ptr(visible), ptr(order), past)
        self.lib.call("still_map_keys", shape, k_rows, ptr(self.w_k), routing, ptr(phi))
        self.lib.call("still_states", shape, ptr(phi), v_rows, routing, ptr(totals), ptr(s), ptr(z), ptr(self.s), ptr(self.z), past)
        args = Forward(q_rows, k_rows, v_rows, rows(out), ptr(self.w_q), ptr(self.log_scale), routing._obj, ptr(s), ptr(z),
                       ptr(denominator), None, None, min(ring) // CHUNK)
        self.lib.call("still_forward", shape, c.byref(args))
        self.lib.call("still_past_fill", shape, past, state, k_rows, v_rows, ptr(score), routing)
        self.positions += ints(lengths)
        return [out[i, :, ring[i] : ends[i]] for i in range(b)]
