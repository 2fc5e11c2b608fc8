"""STILL's hybrid attention in plain PyTorch.

One layer, one selection head. Tokens are cut into chunks of C. A query of chunk c attends exactly to the salient tokens of
retired chunks, to chunk c-1, and to chunk c up to itself. When chunk c >= 2 starts, chunk c-2 retires: its most salient
tokens stay exact, the others are absorbed into the linear state (S, z, n):

    S += phi(k) v^T    z += phi(k)    n += 1

           sum_j w e^(s_tj - m) v_j + lambda gamma_t * (phi(q_t)^T S)
    o_t = ------------------------------------------------------------     s_tj = scale q_t.k_j,  m = max_j s_tj
           sum_j w e^(s_tj - m)     + lambda (phi(q_t)^T z)

    lambda = 1 (linear_norm "sum") or exp(l_h) / max(n, 1) ("mean"); gamma: optional gate; w = sigmoid(w_h) or 1.

Whole sequences, chunks of them and single tokens run through the same code: `read` takes a segment, which is at most what is
left of a row's chunk. Rows of a batch may be at different places of their chunks. States and scores are float32 (float64 in a
float64 model); rows of K and V keep the model's dtype.

Where the package `still-llm` is installed, its kernels compute whole sequences on the CPU, and on CUDA what they can if it was
built with them: `KERNELS`. On CPUs with AMX they also multiply many float32 rows: `Projection`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache

try:
    from still.torch import has_kernels, has_linear, linear
    from still.torch import hybrid_attention_with_state as KERNELS
except ImportError as error:
    KERNELS = None
    if error.name != "still":
        logging.getLogger(__name__).warning(
            f"this student's code found an older package still-llm ({error}): everything is computed in PyTorch alone, more slowly\n"
            "hint: pip install --upgrade still-llm, or export the student anew with the version that is installed"
        )

SALIENCY_EPSILON = 1e-8
MIN_DENOMINATOR = 1e-30
EMPTY = -1
"""Position of a place that holds no token."""
BRANCHES = {"window": True, "salient": True, "linear": True}
"""The parts of the operator. A student that was made for an ablation has some switched off."""


# --- Batches -------------------------------------------------------------------------------------------------------------


@dataclass
class Segment:
    """Some tokens of each row: `length` [B] of them, the first at `position` [B] of the row, `offset` [B] tokens into the call."""

    position: torch.Tensor
    length: torch.Tensor
    offset: torch.Tensor
    width: int
    first: int | None
    """`offset`, where it is the same in every row."""
    begins: torch.Tensor
    """[B]: whether it begins a chunk."""
    some_begin: bool
    retired: int
    """Chunks that have retired in the row furthest on."""

    def cut(self, x):
        """The segment's tokens of `x` [B, heads, N, D]; rows that have fewer go on with any."""
        if self.first is not None:
            return x[:, :, self.first : self.first + self.width]
        index = (self.offset[:, None] + torch.arange(self.width, device=x.device)).clamp(max=x.shape[2] - 1)
        return take(x, index[:, None].expand(-1, x.shape[1], -1))

    @property
    def positions(self):
        """[B, L]; beyond a row's length they say nothing."""
        return self.position[:, None] + torch.arange(self.width, device=self.position.device)

    @property
    def valid(self):
        """[B, L]: which places hold a token."""
        return torch.arange(self.width, device=self.position.device) < self.length[:, None]


class Reading:
    """One call of the model: how many tokens each row has read before and reads now, and the states that it goes on from."""

    def __init__(self, read, lengths, device, cache=None):
        self.read, self.lengths, self.device, self.cache = read, lengths, device, cache
        self.plans = {}

    def state(self, layer, make):
        """The state of a layer, made anew if there is none."""
        if self.cache is None:
            return make()
        if layer not in self.cache.layers:
            self.cache.layers[layer] = make()
        return self.cache.layers[layer]

    def segments(self, chunk):
        """The call cut at every row's chunks, and the index [B, N] of each row's tokens in the segments one after the other."""
        if chunk not in self.plans:
            self.plans[chunk] = self.plan(chunk)
        return self.plans[chunk]

    def plan(self, chunk):
        tensor = lambda x: torch.tensor(x, device=self.device)
        done, segments, places, column = [0] * len(self.read), [], [[] for _ in self.read], 0
        while any(d < n for d, n in zip(done, self.lengths)):
            at = [r + d for r, d in zip(self.read, done)]
            length = [min(chunk - a % chunk, n - d) for a, n, d in zip(at, self.lengths, done)]
            begins = [a % chunk == 0 and n > 0 for a, n in zip(at, length)]
            chunks = [a // chunk if n > 0 else max(a - 1, 0) // chunk for a, n in zip(at, length)]
            width = max(length)
            first = done[0] if len(set(done)) == 1 else None
            retired = max(max(chunks) - 1, 0)
            offset = tensor(done)
            segments.append(Segment(tensor(at), tensor(length), offset, width, first, tensor(begins), any(begins), retired))
            for row, n in enumerate(length):
                places[row] += range(column, column + n)
                done[row] += n
            column += width
        longest = max(self.lengths)
        index = [row + [0] * (longest - len(row)) for row in places]
        trivial = all(row == list(range(column)) for row in index)
        return segments, None if trivial else tensor(index)


def take(x, index):
    """Rows of `x` [B, heads, N] or [B, heads, N, D] by `index` [B, heads, M]."""
    return x.gather(2, index if x.dim() == 3 else index[..., None].expand(*index.shape, x.shape[-1]))


def wide(x):
    """In float32, or float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Projection(nn.Linear):
    """A linear layer that leaves many rows to the kernels of `still` where those are faster and no gradient is wanted."""

    def forward(self, x):
        if KERNELS is None or torch.is_grad_enabled() or not has_linear(x, self.weight):
            return super().forward(x)
        out = linear(x, self.weight)
        return out if self.bias is None else out.add_(self.bias)


# --- Feature maps --------------------------------------------------------------------------------------------------------


class FeatureMap(nn.Module):
    """phi(x) = [softmax(u); softmax(-u)], by head. np_map: u = |x| f(x) / |f(x)|; softmax: u = f(x).

    f(x) = H(x) W, with the optional Householder reflection H(x) = x - 2 (x.u) u.
    """

    def __init__(self, kind, heads, head_dim, features, householder):
        super().__init__()
        if kind not in ("np_map", "softmax"):
            raise ValueError(f"this code has no feature map {kind!r}: it has np_map and softmax")
        self.norm_preserving = kind == "np_map"
        self.mlp = nn.Module()
        self.mlp.linears = nn.ModuleList(nn.Linear(head_dim, features, bias=False) for _ in range(heads))
        if householder:
            self.hh = nn.Module()
            self.hh.u = nn.Parameter(torch.randn(heads, head_dim))

    def matrices(self):
        """W of each head, [heads, D, F]."""
        return torch.stack([linear.weight for linear in self.mlp.linears]).transpose(1, 2)

    def forward(self, x, heads=slice(None)):
        """[B, heads, N, D] to [B, heads, N, 2F]: of all heads, or of those that are listed."""
        x = wide(x)
        w = torch.stack([linear.weight for linear in self.mlp.linears])[heads].to(x.dtype)
        y = x
        if hasattr(self, "hh"):
            u = nn.functional.normalize(self.hh.u[heads].to(x.dtype), dim=-1, eps=0.0)[:, None]
            y = x - 2 * (x * u).sum(-1, keepdim=True) * u
        f = torch.einsum("bhnd,hfd->bhnf", y, w)
        if self.norm_preserving:
            f = f * x.norm(dim=-1, keepdim=True) / f.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return torch.cat([f.softmax(-1), (-f).softmax(-1)], -1)


# --- Routing -------------------------------------------------------------------------------------------------------------


def self_saliency(logits, own, seen_before):
    """sum_j a_j ln((a_j + eps) / (b_j + eps)) in closed form, [..., L].

    `logits` [..., L, W] of the rolling window, `own` [..., L] the token's with itself, `seen_before` [..., L, W] which of the
    window are other tokens.
    """
    others = logits.masked_fill(~seen_before, -torch.inf).logsumexp(-1)
    total = torch.logaddexp(others, own)
    p, r = (own - total).exp(), (others - total).exp()
    return torch.xlogy(r, r) + p * torch.log1p(p / SALIENCY_EPSILON)


def random_score(seed, layer, head, position):
    """A number in [0, 1) for each head and position: SplitMix64 over (seed, layer, head, position)."""
    signed = lambda x: (x & (2**64 - 1)) - (2**64 if x & 2**63 else 0)
    shifted = lambda z, bits: (z >> bits) & (2 ** (64 - bits) - 1)

    def split_mix(z):
        z = z + signed(0x9E3779B97F4A7C15)
        z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
        z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
        return z ^ shifted(z, 31)

    state = torch.full_like(position, signed(seed))
    for word in (torch.full_like(position, layer), head.expand_as(position), position):
        state = split_mix(state ^ (word * signed(0x9E3779B97F4A7C15)))
    return shifted(state, 11).double() / 2**53


def best_first(score):
    """Indices from the highest score to the lowest; ties go to the earlier, NaN comes last."""
    lowest = torch.finfo(score.dtype).min
    return score.nan_to_num(nan=lowest, neginf=-torch.inf).sort(dim=-1, descending=True, stable=True).indices


def among_best(score, count):
    """Which places are the first `count` in `best_first`."""
    order = best_first(score)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :count], True)


# --- The state of a layer ------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Exact tokens of some heads: `k`, `v` [B, heads, M, D], `score` and `position` [B, heads, M]."""

    k: torch.Tensor
    v: torch.Tensor
    score: torch.Tensor
    position: torch.Tensor

    def take(self, index):
        return Rows(*(take(x, index) for x in (self.k, self.v, self.score, self.position)))

    def then(self, other):
        pairs = zip((self.k, self.v, self.score, self.position), (other.k, other.v, other.score, other.position))
        return Rows(*(torch.cat(pair, 2) for pair in pairs))


class State:
    """What a layer keeps of the tokens that it has read: tensors whose first dimension is the batch, by name."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def __getattr__(self, name):
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(name) from None

    def map(self, change):
        """Puts `change` of each tensor in its place."""
        of_rows = lambda rows: Rows(*(change(x) for x in (rows.k, rows.v, rows.score, rows.position)))
        one = lambda x: [of_rows(rows) for rows in x] if isinstance(x, list) else change(x)
        self.tensors = {name: one(x) for name, x in self.tensors.items()}


class StillCache(Cache):
    """The states of a student's layers, in place of a cache of all keys and values. It cannot forget single tokens."""

    is_compileable = False
    is_croppable = False
    is_sliding = ()
    is_linear = ()

    def __init__(self):
        super().__init__(layers=[])
        self.reset()

    def reset(self):
        self.layers = {}
        self.columns = 0
        """Tokens of the batch that were read, padding among them."""
        self.tokens = None
        """Tokens of each row that were read."""

    def __len__(self):
        return len(self.layers)

    @property
    def is_initialized(self):
        return self.tokens is not None

    def get_seq_length(self, *args, **kwargs):
        return self.columns

    def get_max_length(self, *args, **kwargs):
        return -1

    get_max_cache_shape = get_max_length

    def update(self, *args, **kwargs):
        raise NotImplementedError("a student's layers keep a state of their own, not all keys and values")

    def crop(self, *args, **kwargs):
        raise NotImplementedError(
            "a student's state cannot forget its last tokens\nhint: copy.deepcopy the cache before you read them, or read anew"
        )

    def nbytes(self):
        """Bytes of everything that it keeps."""
        sizes = []
        for state in self.layers.values():
            state.map(lambda x: sizes.append(x.nbytes) or x)
        return sum(sizes)

    def reorder_cache(self, beam_idx):
        for state in self.layers.values():
            state.map(lambda x: x.index_select(0, beam_idx.to(x.device)))
        self.tokens = self.tokens and [self.tokens[i] for i in beam_idx.tolist()]

    def batch_select_indices(self, indices):
        indices = torch.arange(len(self.tokens))[indices.cpu()] if self.tokens else indices
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats):
        self.reorder_cache(torch.arange(len(self.tokens or ())).repeat_interleave(repeats))


# --- The operator --------------------------------------------------------------------------------------------------------


class Operator(nn.Module):
    """Attention of which each segment goes on from a state."""

    def new_state(self, k):
        raise NotImplementedError

    def read(self, state, segment, q, k, v, gate):
        """The segment's output [B, H, L, D]; the state has the segment afterwards."""
        raise NotImplementedError

    def attend(self, reading, layer, q, k, v, gate=None):
        """`q` [B, H, N, D], `k` and `v` [B, K, N, D] after RoPE, `gate` [B, H, N, D]: the output [B, H, N, D]."""
        with torch.autocast(q.device.type, enabled=False):
            state = reading.state(layer, lambda: self.new_state(k))
            segments, index = reading.segments(self.segment_length)
            cut = lambda segment, x: None if x is None else segment.cut(x)
            outs = [self.read(state, segment, *(cut(segment, x) for x in (q, k, v, gate))) for segment in segments]
            out = torch.cat(outs, 2)
            out = out if index is None else take(out, index[:, None].expand(-1, out.shape[1], -1))
            return out.to(q.dtype)


class HybridOperator(Operator):
    """STILL's attention, LoLCATs' and their ablations."""

    def __init__(self, attention, layer, num_heads, num_kv_heads, head_dim):
        super().__init__()
        self.layer = layer
        self.chunk = self.segment_length = attention["chunk"]
        self.router, self.router_options = attention["router"]
        self.repeat = num_heads // num_kv_heads if attention["selection_head"] == "query_head" else 1
        self.heads = num_kv_heads * self.repeat
        self.group = num_heads // self.heads
        self.head_dim = head_dim
        self.cap = attention["cap"]
        self.scale = attention["logit_scale"] or head_dim**-0.5
        self.branches = {**BRANCHES, **attention["branches"]}
        self.features = attention["feature_dim"]
        budgets = attention["budgets"][layer]
        if len(budgets) != self.heads:
            raise ValueError(f"layer {layer}: {len(budgets)} budgets for {self.heads} selection heads")
        if self.router == "none":
            budgets = [0] * self.heads
        # Heads of one budget hold equally many tokens: they are computed together.
        self.groups = [(budget, [h for h, b in enumerate(budgets) if b == budget]) for budget in sorted(set(budgets))]
        kind, options = attention["feature_map"]
        make = lambda heads: FeatureMap(kind, heads, head_dim, self.features, options.get("householder", False))
        self.feature_map_q, self.feature_map_k = make(num_heads), make(self.heads)
        # As in config.json, for the kernels; of other layers they need to know nothing.
        named = lambda name, options: {name: options} if options else name
        section = {
            **{key: x for key, x in attention.items() if x is not None},
            "router": named(*attention["router"]),
            "feature_map": named(*attention["feature_map"]),
            "budgets": [*([[]] * layer), list(attention["budgets"][layer])],
            "branches": self.branches,
        }
        self.section = json.dumps(section)
        if attention["linear_norm"] == "mean":
            self.log_lambda = nn.Parameter(torch.full((num_heads,), 8.0).log())
        if attention["window_factor"]:
            self.window_factor = nn.Parameter(torch.full((num_heads,), -2.197))

    def by_head(self, x):
        """[H] to [S, G], wide."""
        return wide(x).view(self.heads, self.group)

    def new_state(self, k):
        batch, dtype = k.shape[0], torch.promote_types(k.dtype, torch.float32)
        rows = lambda heads, n: k.new_zeros(batch, heads, n, self.head_dim)
        zeros = lambda *shape: k.new_zeros(batch, *shape, dtype=dtype)
        window = 2 * self.chunk
        salient = [Rows(rows(len(h), 0), rows(len(h), 0), zeros(len(h), 0), zeros(len(h), 0).long()) for _, h in self.groups]
        return State(
            window_k=rows(self.heads, window),
            window_v=rows(self.heads, window),
            window_score=zeros(self.heads, window),
            salient=salient,
            s=zeros(self.heads, 2 * self.features, self.head_dim),
            z=zeros(self.heads, 2 * self.features),
            count=zeros(self.heads),
        )

    def attend(self, reading, layer, q, k, v, gate=None):
        if not self.kernels_know(reading, q):
            return super().attend(reading, layer, q, k, v, gate)
        maps = (self.feature_map_q, self.feature_map_k)
        # Under autocast values are as narrow as their product, rotated queries and keys are not.
        k, v = k.to(q.dtype), v.to(q.dtype)
        with torch.autocast(q.device.type, enabled=False):
            others = {
                "gate": None if gate is None else gate.to(q.dtype),
                **{f"feature_map_{name}": map.matrices() for name, map in zip("qk", maps)},
                **{f"householder_{name}": map.hh.u for name, map in zip("qk", maps) if hasattr(map, "hh")},
                **{name: getattr(self, name) for name in ("log_lambda", "window_factor") if hasattr(self, name)},
                "config": self.section,
                "layer": self.layer,
            }
            if q.device.type != "cpu" and not has_kernels(q, k, v, **others):
                return super().attend(reading, layer, q, k, v, gate)
            (out, absorbed_at, scores), sums = KERNELS(q, k, v, **others)
            if reading.cache is not None:
                # No gradient flows through what the kernels have summed.
                sums = None if torch.is_grad_enabled() else sums
                reading.cache.layers[layer] = self.state_after(k, v, absorbed_at, scores, sums)
        return out

    def kernels_know(self, reading, q):
        """Whether the kernels of `still` know calls like this: whole sequences of one length, and a state that their routing tells."""
        if KERNELS is None or q.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            return False
        whole = not any(reading.read) and all(n == q.shape[2] for n in reading.lengths) and q.shape[2] > 0
        # A sum that goes on, and scores in float64, are not among what the kernels give back.
        known = reading.cache is None or (self.router != "received_attention" and q.dtype != torch.float64)
        return whole and known

    def state_after(self, k, v, absorbed_at, scores, sums=None):
        """The state of sequences that were read whole, from the chunk at which each token was absorbed and the scores; `sums`, if they
        are there, are its `s` and `z`."""
        if self.repeat > 1:
            k, v = k.repeat_interleave(self.repeat, 1), v.repeat_interleave(self.repeat, 1)
        state, tokens, chunk = self.new_state(k), k.shape[2], (k.shape[2] - 1) // self.chunk
        begin = (chunk - 1) * self.chunk
        retired = max(begin, 0)
        slots = (max(-begin, 0), begin + 2 * self.chunk - tokens)
        rows = {"window_k": k, "window_v": v, "window_score": scores}
        for name, x in rows.items():
            pad = (0, 0, *slots) if x.dim() == 4 else slots
            state.tensors[name] = nn.functional.pad(x[:, :, retired:], pad).to(state.tensors[name].dtype)
        position = torch.arange(retired, device=k.device).expand(k.shape[0], self.heads, -1)
        score = scores[:, :, :retired].to(state.z.dtype)
        absorbed_at = absorbed_at[:, :, :retired]
        absorbed = (absorbed_at >= 0) & (absorbed_at <= chunk)
        if sums is not None and self.branches["linear"]:
            state.tensors.update(s=sums.s, z=sums.z, count=absorbed.sum(-1).to(state.count.dtype))
        for index, (budget, heads) in enumerate(self.groups):
            of = lambda x, heads=heads: x if len(heads) == self.heads else x[:, heads]
            gone = of(absorbed)
            if sums is None and self.branches["linear"] and not (budget == self.chunk and self.cap is None):
                past = Rows(*(of(x[:, :, :retired]) for x in (k, v)), of(score), of(position))
                self.absorb(state, heads, past, gone)
            count = budget * max(chunk - 1, 0)
            count = count if self.cap is None else min(count, self.cap)
            order = of(position).masked_fill(gone, torch.iinfo(torch.long).max).sort(-1).indices[..., :count]
            # Rows of these heads alone, wherever they lie.
            batch = torch.arange(k.shape[0], device=k.device)[:, None, None]
            kept = (batch, torch.tensor(heads, device=k.device)[None, :, None], order)
            salient = Rows(k[kept], v[kept], score[kept], position[kept].masked_fill(absorbed[kept], EMPTY))
            if self.router in ("first_tokens", "random"):
                salient.score = self.final_score(state, heads, salient)
            state.tensors["salient"][index] = salient
        return state

    def read(self, state, segment, q, k, v, gate):
        k, v = k.repeat_interleave(self.repeat, 1), v.repeat_interleave(self.repeat, 1)
        if segment.some_begin:
            self.begin_chunk(state, segment)
        state.tensors["window_k"] = self.placed(state.window_k, k, segment)
        state.tensors["window_v"] = self.placed(state.window_v, v, segment)

        # Slots of the window hold chunk c-1, then chunk c up to the last token.
        at = (segment.position // self.chunk - 1)[:, None] * self.chunk + torch.arange(2 * self.chunk, device=k.device)
        filled = (at >= 0) & (at < (segment.position + segment.length)[:, None])
        now, at = segment.positions[:, None, None, :, None], at[:, None, None, None]
        visible = filled[:, None, None, None] & (at <= now)  # [B, 1, 1, L, 2C]
        grouped = wide(q).unflatten(1, (self.heads, self.group))  # [B, S, G, L, D]
        logits = self.scale * torch.einsum("bsgld,bswd->bsglw", grouped, wide(state.window_k))
        self.score(state, segment, logits.detach(), visible, now - at)
        if not self.branches["window"]:
            visible = visible & (at == now)
        logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)

        outs = []
        linear = self.branches["linear"] and segment.retired > 0
        phi = self.feature_map_q(q).unflatten(1, (self.heads, self.group)) if linear else None
        for (_, heads), salient in zip(self.groups, state.salient):
            of = lambda x, heads=heads: x if len(heads) == self.heads else x[:, heads]
            exact, values = of(logits), wide(of(state.window_v))
            if self.branches["salient"] and salient.k.shape[2] > 0:
                kept = self.scale * torch.einsum("bsgld,bsmd->bsglm", of(grouped), wide(salient.k))
                kept = kept.masked_fill((salient.position == EMPTY)[:, :, None, None], torch.finfo(kept.dtype).min)
                exact, values = torch.cat([kept, exact], -1), torch.cat([wide(salient.v), values], 2)
            terms = (exact - exact.max(-1, keepdim=True).values).exp()
            if hasattr(self, "window_factor"):
                terms = terms * self.by_head(self.window_factor).sigmoid()[heads][:, :, None, None]
            numerator = torch.einsum("bsglm,bsmd->bsgld", terms, values)
            denominator = terms.sum(-1, keepdim=True)
            if linear:
                scale = self.linear_scale(state, heads)
                term = scale * torch.einsum("bsglf,bsfd->bsgld", of(phi), of(state.s))
                if gate is not None:
                    term = term * wide(of(gate.unflatten(1, (self.heads, self.group))))
                numerator = numerator + term
                denominator = denominator + scale * torch.einsum("bsglf,bsf->bsgl", of(phi), of(state.z))[..., None]
            outs.append(numerator / denominator)
        order = [head for _, heads in self.groups for head in heads]
        out = torch.cat(outs, 1)
        if order != sorted(order):
            out = out[:, torch.tensor(order, device=out.device).argsort()]
        return out.flatten(1, 2)

    def linear_scale(self, state, heads):
        """lambda of some heads, [B, heads, G, 1, 1]."""
        if not hasattr(self, "log_lambda"):
            return 1.0
        scale = self.by_head(self.log_lambda).exp()[heads][None] / state.count[:, heads, None].clamp(min=1)
        return scale[..., None, None]

    def placed(self, window, rows, segment):
        """The window with the segment's rows in their slots."""
        slots = torch.arange(2 * self.chunk, device=rows.device) - self.chunk
        index = slots - (segment.position % self.chunk)[:, None]
        new = (index >= 0) & (index < segment.length[:, None])
        index = index.clamp(0, rows.shape[2] - 1)[:, None].expand(-1, rows.shape[1], -1)
        new = new[:, None] if rows.dim() == 3 else new[:, None, :, None]
        return torch.where(new, take(rows, index).to(window.dtype), window)

    @torch.no_grad()
    def score(self, state, segment, logits, visible, distance):
        """Keeps what the router needs of a segment: `logits` [B, S, G, L, 2C], `distance` from each slot to the query."""
        if self.router == "self_saliency":
            own = ((distance == 0) & visible).expand_as(logits)
            own = logits.masked_fill(~own, 0.0).sum(-1)
            before = visible & (distance > 0) & (distance < self.chunk)
            score = self_saliency(logits, own, before.expand_as(logits)).mean(2)
            state.tensors["window_score"] = self.placed(state.window_score, score, segment)
        elif self.router == "received_attention":
            local = logits.masked_fill(~visible, torch.finfo(logits.dtype).min).softmax(-1)
            later = visible & (distance > 0) & segment.valid[:, None, None, :, None]
            state.tensors["window_score"] = state.window_score + (local * later).sum(3).mean(2)

    def begin_chunk(self, state, segment):
        """Retires chunk c-2 in the rows that begin a chunk c >= 2, and moves the window on in all that begin one."""
        retires = segment.begins & (segment.position >= 2 * self.chunk)
        if segment.retired > 0:
            positions = (segment.position // self.chunk - 2)[:, None] * self.chunk
            positions = (positions + torch.arange(self.chunk, device=positions.device))[:, None]
            for index, (budget, heads) in enumerate(self.groups):
                self.retire(state, index, budget, heads, positions, retires, segment.retired)
        for name in ("window_k", "window_v", "window_score"):
            window = state.tensors[name]
            moved = torch.cat([window[:, :, self.chunk :], torch.zeros_like(window[:, :, : self.chunk])], 2)
            begins = segment.begins.view(-1, *[1] * (window.dim() - 1))
            state.tensors[name] = torch.where(begins, moved, window)

    def retire(self, state, index, budget, heads, positions, retires, retired):
        of = lambda x: (x if len(heads) == self.heads else x[:, heads])[:, :, : self.chunk]
        salient = state.salient[index]
        arriving = Rows(of(state.window_k), of(state.window_v), of(state.window_score), positions.expand(-1, len(heads), -1))
        arriving.score = self.final_score(state, heads, arriving)
        if self.router == "self_recall":
            salient.score = self.final_score(state, heads, salient)
        retires = retires[:, None, None]
        chosen = among_best(arriving.score, budget) & retires
        absorbed = ~chosen & retires
        gone = arriving
        if budget > 0:
            pool = salient.then(arriving)
            kept = torch.cat([salient.position != EMPTY, chosen], -1)
            most = budget * retired
            if self.cap is not None and most > self.cap:
                best = among_best(pool.score.masked_fill(~kept, -torch.inf), self.cap)
                demoted = kept & ~best
                kept = kept & best
                gone, most = pool, self.cap
                absorbed = demoted | torch.cat([torch.zeros_like(salient.position, dtype=torch.bool), absorbed], -1)
            # In order of position, empty places last.
            order = pool.position.masked_fill(~kept, torch.iinfo(torch.long).max).sort(-1).indices[..., :most]
            pool.position = pool.position.masked_fill(~kept, EMPTY)
            state.salient[index] = pool.take(order)
        if self.branches["linear"] and not (budget == self.chunk and self.cap is None):
            self.absorb(state, heads, gone, absorbed)

    def final_score(self, state, heads, rows):
        """The router's score of tokens when their chunk retires."""
        score, position = rows.score, rows.position
        if self.router == "received_attention":
            # The mean over the later tokens of two chunks.
            return score / (2 * self.chunk - 1 - position % self.chunk)
        if self.router == "self_recall":
            with torch.no_grad():
                phi = self.feature_map_k(rows.k, heads)
                recalled = torch.einsum("bsmf,bsfd->bsmd", phi, state.s[:, heads])
                total = torch.einsum("bsmf,bsf->bsm", phi, state.z[:, heads]).clamp(min=MIN_DENOMINATOR)
                return (recalled / total[..., None] - wide(rows.v)).square().sum(-1)
        if self.router == "first_tokens":
            return -position.to(score.dtype)
        if self.router == "random":
            head = torch.tensor(heads, device=position.device)[:, None]
            return random_score(self.router_options["seed"], self.layer, head, position).to(score.dtype)
        if self.router in ("self_saliency", "none"):
            return score
        raise ValueError(f"this code has no router {self.router!r}")

    def absorb(self, state, heads, rows, absorbed):
        """Adds the tokens of `absorbed` [B, heads, M] to the linear state."""
        phi = self.feature_map_k(rows.k, heads) * absorbed[..., None]
        add = dict(s=torch.einsum("bsmf,bsmd->bsfd", phi, wide(rows.v)), z=phi.sum(2), count=absorbed.sum(-1).to(phi.dtype))
        for name, value in add.items():
            index = torch.tensor(heads, device=value.device)
            state.tensors[name] = state.tensors[name].index_add(1, index, value)


class LinearOperator(Operator):
    """`linear_only` (Hedgehog): every token is absorbed as it comes, nothing is exact."""

    def __init__(self, attention, layer, num_heads, num_kv_heads, head_dim):
        super().__init__()
        self.segment_length = attention["chunk"]
        self.repeat = num_heads // num_kv_heads if attention["selection_head"] == "query_head" else 1
        self.heads = num_kv_heads * self.repeat
        self.group = num_heads // self.heads
        self.head_dim, self.features = head_dim, attention["feature_dim"]
        kind, options = attention["feature_map"]
        make = lambda heads: FeatureMap(kind, heads, head_dim, self.features, options.get("householder", False))
        self.feature_map_q, self.feature_map_k = make(num_heads), make(self.heads)

    def new_state(self, k):
        dtype = torch.promote_types(k.dtype, torch.float32)
        zeros = lambda *shape: k.new_zeros(k.shape[0], self.heads, *shape, dtype=dtype)
        return State(s=zeros(2 * self.features, self.head_dim), z=zeros(2 * self.features))

    def read(self, state, segment, q, k, v, gate):
        k, v = k.repeat_interleave(self.repeat, 1), wide(v.repeat_interleave(self.repeat, 1))
        phi_q = self.feature_map_q(q).unflatten(1, (self.heads, self.group))
        phi_k = self.feature_map_k(k) * segment.valid[:, None, :, None]
        within = torch.einsum("bsglf,bsmf->bsglm", phi_q, phi_k).tril()
        numerator = within @ v[:, :, None] + torch.einsum("bsglf,bsfd->bsgld", phi_q, state.s)
        denominator = within.sum(-1) + torch.einsum("bsglf,bsf->bsgl", phi_q, state.z)
        state.tensors["s"] = state.s + torch.einsum("bsmf,bsmd->bsfd", phi_k, v)
        state.tensors["z"] = state.z + phi_k.sum(2)
        return (numerator / denominator.clamp(min=MIN_DENOMINATOR)[..., None]).flatten(1, 2)


class SlidingOperator(Operator):
    """Softmax attention to the last `window` tokens: layers that a student keeps as its base has them."""

    segment_length = 64

    def __init__(self, window, scale):
        super().__init__()
        self.window, self.scale = window, scale

    def new_state(self, k):
        return State(k=k[:, :, :0], v=k[:, :, :0], position=torch.zeros_like(k[:, 0, :0, 0], dtype=torch.long))

    def read(self, state, segment, q, k, v, gate):
        now = segment.positions
        k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        at = torch.cat([state.position, now.masked_fill(~segment.valid, EMPTY)], 1)
        seen = (at != EMPTY)[:, None] & (at[:, None] <= now[..., None]) & (at[:, None] > now[..., None] - self.window)
        grouped = wide(q).unflatten(1, (k.shape[1], -1))
        logits = self.scale * torch.einsum("bsgld,bsmd->bsglm", grouped, wide(k))
        weights = logits.masked_fill(~seen[:, None, None], torch.finfo(logits.dtype).min).softmax(-1)
        order = at.sort(stable=True, dim=1).indices[:, -self.window :]
        index = order[:, None].expand(-1, k.shape[1], -1)
        state.tensors = dict(k=take(k, index), v=take(v, index), position=at.gather(1, order))
        return torch.einsum("bsglm,bsmd->bsgld", weights, wide(v)).flatten(1, 2)
