"""A student as a model of transformers: the base model's own layers, with STILL's hybrid attention in them.

The operator is in `hybrid_attention.py`. A batch is read with each row's real tokens first, so that a row is a sequence of its
own from its first real token on, wherever its padding lies.
"""

import functools
import math

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_still import StillConfig
from .hybrid_attention import HybridOperator, LinearOperator, Projection, Reading, SlidingOperator, StillCache

CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls the cache; newer versions have the shorter word."""
LEARNED = ("feature_map_q", "feature_map_k", "log_lambda", "window_factor", "g_proj")
"""What a student learns stays float32 when the model is loaded in another dtype."""


MLP_TOKENS = 2048
"""Tokens whose MLP a CPU computes at a time where no gradient is wanted."""


def rotated(x, cos, sin):
    """RoPE of `x` [B, heads, N, D] by `cos`, `sin` [B, N, R]: of the first R channels."""
    half = cos.shape[-1] // 2
    cos, sin = cos[:, None].split(half, -1), sin[:, None].split(half, -1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    # A row of a long prompt is too much for a cache: as few passes over it as there can be.
    rows = [
        torch.addcmul(first * cos[0], second, sin[0], value=-1),
        torch.addcmul(second * cos[1], first, sin[1]),
    ]
    return torch.cat([*rows, rest] if rest.shape[-1] else rows, -1)


class LongRope(nn.Module):
    """Phi-3's rotation with one set of factors for every length, so that a sequence may be read in parts.

    transformers changes from the short factors to the long ones within a sequence; here the declared context decides.
    """

    def __init__(self, base, given):
        super().__init__()
        of = lambda name, default: given.get(name) or getattr(base, name, None) or default
        context = base.max_position_embeddings
        original = given.get("original_max_position_embeddings") or context
        declared = given.get("declared_length") or context
        channels = int(base.hidden_size // base.num_attention_heads * of("partial_rotary_factor", 1.0))
        factors = given["long_factor"] if declared > original else given["short_factor"]
        theta = of("rope_theta", 10000.0)
        self.frequencies = [theta ** (-2 * i / channels) / factor for i, factor in enumerate(factors)]
        ratio = given.get("factor") or context / original
        usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        self.scale = given.get("attention_factor") or usual

    def forward(self, x, position_ids):
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            frequencies = torch.tensor(self.frequencies, device=x.device, dtype=dtype)
            angles = position_ids[..., None].to(dtype) * frequencies
            angles = torch.cat([angles, angles], -1)
            return (angles.cos() * self.scale).to(x.dtype), (angles.sin() * self.scale).to(x.dtype)


def with_projections(operator):
    """A layer's attention: the projections and norms of the base's, and `operator` between them."""

    class Attention(operator):
        def __init__(self, base, layer, *args, gate=None):
            super().__init__(*args)
            self.layer_idx = layer
            self.attention_head_dim = base.head_dim
            # A Gemma 3 layer asks which of two rotations is its own (transformers 4).
            self.is_sliding = getattr(base, "is_sliding", False)
            for name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"):
                if hasattr(base, name):
                    setattr(self, name, getattr(base, name))
            if gate is not None:
                self.g_proj = Projection(*gate, bias=False)

        def project(self, x):
            """Queries, keys and values [B, heads, N, D]."""
            heads = lambda x: x.unflatten(-1, (-1, self.attention_head_dim))
            if hasattr(self, "qkv_proj"):
                qkv, queries = heads(self.qkv_proj(x)), self.o_proj.in_features // self.attention_head_dim
                kv = (qkv.shape[2] - queries) // 2
                q, k, v = qkv.split([queries, kv, kv], 2)
            else:
                q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
            if hasattr(self, "q_norm"):
                q, k = self.q_norm(q), self.k_norm(k)
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

        def forward(self, hidden_states, position_embeddings=None, still=None, **_):
            if still is None:
                raise ValueError("call the student itself (StillForCausalLM), not the base model inside it")
            q, k, v = self.project(hidden_states)
            q, k = rotated(q, *position_embeddings), rotated(k, *position_embeddings)
            gate = None
            if hasattr(self, "g_proj"):
                gate = self.g_proj(hidden_states.to(self.g_proj.weight.dtype)).sigmoid()
                gate = gate.unflatten(-1, (-1, self.attention_head_dim)).transpose(1, 2)
            out = self.attend(still, self.layer_idx, q, k, v, gate)
            return self.o_proj(out.transpose(1, 2).flatten(2)), None

    return Attention


HybridAttention = with_projections(HybridOperator)
LinearAttention = with_projections(LinearOperator)
SlidingAttention = with_projections(SlidingOperator)


@functools.cache
def in_blocks(mlp):
    """An MLP's class that computes long sequences in blocks of tokens: what lies between its matrices is then memory that is at hand,
    where that of a long prompt is asked of the system anew in every layer."""

    class Blocks(mlp):
        def forward(self, x):
            if torch.is_grad_enabled() or x.device.type != "cpu" or x.shape[1] <= MLP_TOKENS:
                return super().forward(x)
            return torch.cat([super(Blocks, self).forward(tokens) for tokens in x.split(MLP_TOKENS, 1)], 1)

    Blocks.__name__ = Blocks.__qualname__ = mlp.__name__
    return Blocks


def student_attention(config, base, layer):
    """The attention of a student's layer in place of its base's."""
    attention, sizes = config.attention, config.base
    if not attention["budgets"][layer]:
        return SlidingAttention(base, layer, base.sliding_window, base.scaling)
    heads = sizes.num_attention_heads
    gate = (sizes.hidden_size, heads * base.head_dim) if attention["gate"] else None
    kind = LinearAttention if attention["mode"] == "linear_only" else HybridAttention
    return kind(base, layer, attention, layer, heads, sizes.num_key_value_heads, base.head_dim, gate=gate)


class StillForCausalLM(PreTrainedModel, GenerationMixin):
    """A student. Its tensors have the base's names, and what it has learned lies under `self_attn` of each layer."""

    config_class = StillConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.end_as_the_base_does()
        base = AutoModelForCausalLM.from_config(config.base, attn_implementation="eager", dtype=torch.get_default_dtype())
        self.model, self.lm_head = base.model, base.lm_head
        self._no_split_modules = base._no_split_modules
        rope = config.base_config.get("rope_parameters") or config.base_config.get("rope_scaling") or {}
        if "long_factor" in rope:
            self.model.rotary_emb = LongRope(config.base, {**config.base_config, **rope})
        for module in self.modules():
            if type(module) is nn.Linear:
                module.__class__ = Projection
        for layer, module in enumerate(self.model.layers):
            module.self_attn = student_attention(config, module.self_attn, layer)
            module.mlp.__class__ = in_blocks(type(module.mlp))
        learned = {word for word in LEARNED for name, _ in self.named_parameters() if word in name}
        self._keep_in_fp32_modules_strict = sorted(learned)
        self.post_init()

    def end_as_the_base_does(self):
        """Takes the tokens that begin and end a text from the base's configuration, unless generation_config.json has them."""
        for token in ("bos_token_id", "eos_token_id"):
            if getattr(self.generation_config, token) is None:
                setattr(self.generation_config, token, self.config.base_config.get(token))

    def adjust_generation_fn(self, *args, **kwargs):
        # transformers 5 makes the generation configuration anew once the weights are read.
        super().adjust_generation_fn(*args, **kwargs)
        self.end_as_the_base_does()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=getattr(self.config.base, "initializer_range", 0.02))

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        logits_to_keep=0,
        cache_position=None,
        **kwargs,
    ):
        """As of any causal language model. `attention_mask` [B, tokens read before and now] may pad on either side."""
        if output_attentions:
            raise ValueError("a student's attention has no matrix of weights to give back")
        given = input_ids if inputs_embeds is None else inputs_embeds
        (batch, columns), device = given.shape[:2], given.device
        cache = cache if cache is not None else past_key_values
        training = torch.is_grad_enabled() and self.training
        if use_cache is None:
            use_cache = cache is not None or not training
        if not use_cache:
            cache = None
        elif not isinstance(cache, StillCache):
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError("a student goes on from a StillCache, not from keys and values of another model")
            cache = StillCache()
        read = (cache.tokens if cache is not None else None) or [0] * batch
        if len(read) != batch:
            raise ValueError(f"a batch of {batch} rows with a cache of {len(read)}")

        real = real_tokens(attention_mask, batch, columns, device)
        lengths = [columns] * batch if real is None else real.sum(1).tolist()
        inputs = dict(input_ids=input_ids) if inputs_embeds is None else dict(inputs_embeds=inputs_embeds)
        if real is not None:
            # Real tokens first: each row is then a sequence of its own from its first real token on.
            first = (~real).long().sort(stable=True, dim=1).indices[:, : max(lengths)]
            inputs = {name: taken_columns(x, first) for name, x in inputs.items()}
        positions = torch.tensor(read, device=device)[:, None] + torch.arange(max(lengths), device=device)
        check_positions(position_ids, positions, real, columns)
        reading = Reading(read, lengths, device, cache)
        output = self.model(
            **inputs,
            position_ids=positions,
            # A mask of four dimensions is passed on as it is, and no layer looks at it.
            attention_mask=torch.zeros(batch, 1, 1, 1, device=device),
            use_cache=False,
            output_hidden_states=bool(output_hidden_states),
            return_dict=True,
            still=reading,
        )
        if cache is not None:
            cache.tokens = [r + n for r, n in zip(read, lengths)]
            cache.columns += columns
        back = (lambda x: x) if real is None else (lambda x: taken_columns(x, (real.cumsum(1) - 1).clamp(min=0)))
        hidden = back(output.last_hidden_state)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.lm_head(hidden if isinstance(keep, int) else hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        states = output.hidden_states and tuple(back(x) for x in output.hidden_states)
        fields = {CACHE_FIELD: cache, "loss": loss, "logits": logits, "hidden_states": states}
        result = CausalLMOutputWithPast(**fields)
        return result.to_tuple() if return_dict is False else result

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, cache=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        cache = cache if cache is not None else past_key_values
        read = cache.get_seq_length() if cache is not None else 0
        inputs = {"attention_mask": attention_mask, CACHE_FIELD: cache, "use_cache": kwargs.get("use_cache", True)}
        if kwargs.get("logits_to_keep") is not None:
            inputs["logits_to_keep"] = kwargs["logits_to_keep"]
        if inputs_embeds is not None and read == 0:
            return {**inputs, "inputs_embeds": inputs_embeds}
        new = (attention_mask.shape[1] if attention_mask is not None else input_ids.shape[1]) - read
        return {**inputs, "input_ids": input_ids[:, -new:].contiguous()}


def real_tokens(mask, batch, columns, device):
    """[B, N]: which of the call's tokens are none of padding; `None` if all are."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < columns:
        raise ValueError(
            f"attention_mask has the shape {tuple(mask.shape)}, expected [{batch}, {columns}] or more columns\n"
            "hint: a student pads by a mask of two dimensions; it has no packed documents and no masks of its own choice"
        )
    real = mask[:, mask.shape[1] - columns :].to(device).bool()
    if real.all():
        return None
    if not real.any():
        raise ValueError("attention_mask leaves no token of this call")
    return real


def taken_columns(x, index):
    """`x` [B, N] or [B, N, D] by `index` [B, M]."""
    return x.gather(1, index if x.dim() == 2 else index[..., None].expand(*index.shape, x.shape[-1]))


def check_positions(given, own, real, columns):
    """An error if positions were given that are not those of rows that go on from their first real token."""
    if given is None:
        return
    given = given[..., -columns:].expand(own.shape[0], -1)
    if real is None:
        same = bool((given == own).all())
    else:
        spread = taken_columns(own, (real.cumsum(1) - 1).clamp(min=0))
        same = bool((given == spread)[real].all())
    if not same:
        raise ValueError(
            "position_ids are not those of whole rows\n"
            "hint: leave them out. Packed documents, which restart them, would share one state: put one document in a row"
        )
