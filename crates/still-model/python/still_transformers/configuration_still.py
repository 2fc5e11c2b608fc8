"""The configuration of a student: a pretrained model whose softmax attention was replaced by STILL's hybrid attention.

`config.json` holds the configuration of the base model (`base_config`) and that of the attention (`still`). This file and
`modeling_still.py` lie beside it, so that transformers opens a student with `trust_remote_code=True`.
"""

from transformers import AutoConfig

try:
    from transformers import PreTrainedConfig

    OLD = False
except ImportError:  # transformers 4
    from transformers import PretrainedConfig as PreTrainedConfig

    OLD = True

FORMAT = 1
"""The newest form of a student that this file knows (`still_format`)."""

BASES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "gemma")
"""`model_type` of the base models that can have students."""

ATTENTION = {
    "mode": "hybrid",
    "chunk": None,
    "router": None,
    "selection_head": None,
    "budgets": None,
    "cap": None,
    "feature_map": None,
    "feature_dim": None,
    "linear_norm": None,
    "gate": False,
    "window_factor": False,
    "logit_scale": None,
    "branches": {"window": True, "salient": True, "linear": True},
}
"""Keys of the section `still`, and what an absent key means."""

UNUSED = ("rows", "key_exponents")
"""Keys of the section `still` that change how another program stores rows: here they keep the dtype of the model."""


class StillConfig(PreTrainedConfig):
    """The base model (`base_config`) and the attention (`still`) of a student."""

    model_type = "still"
    has_no_defaults_at_init = True

    def __init__(self, base_config=None, still=None, still_format=FORMAT, **kwargs):
        self.base_config = base_config
        self.still = still
        self.still_format = still_format
        self._base = None
        if base_config is not None:
            kwargs.setdefault("tie_word_embeddings", getattr(self.base, "tie_word_embeddings", False))
        super().__init__(**kwargs)
        if still_format is None or still_format > FORMAT:
            raise ValueError(
                f"a student of format {still_format}, made by a newer version of still: this code reads formats up to {FORMAT}.\n"
                "hint: export the student again with `still export --transformers`, or update the .py files beside config.json"
            )
        if base_config is not None:
            self.attention  # Refuses what it does not know.

    @property
    def base(self):
        """The base model's own configuration."""
        if self.__dict__.get("_base") is None:
            base = dict(self.base_config)
            if "rope_parameters" in base and OLD:
                raise ValueError(
                    "base_config has rope_parameters, which this version of transformers does not read\n"
                    "hint: export the student again with `still export --transformers`, or use transformers 5"
                )
            kind = base.pop("model_type", None)
            if kind not in BASES:
                raise ValueError(f"base_config.model_type is {kind!r}\nhint: supported base models: {', '.join(BASES)}")
            # A family's usual token may lie outside of this vocabulary.
            base.setdefault("pad_token_id", None)
            rope = base.get("rope_scaling") or {}
            if "long_factor" in rope:
                # `LongRope` reads the rest.
                known = {"type"} if OLD else {"rope_type", "original_max_position_embeddings", "attention_factor"}
                known |= {"short_factor", "long_factor"}
                base["rope_scaling"] = {key: x for key, x in {"type": "longrope", **rope}.items() if key in known}
            self.__dict__["_base"] = type(AutoConfig.for_model(kind)).from_dict(base)
        return self.__dict__["_base"]

    @property
    def attention(self):
        """The section `still`, absent keys filled in. `router` and `feature_map` are (name, options)."""
        unknown = set(self.still) - set(ATTENTION) - set(UNUSED)
        if unknown:
            raise ValueError(
                f'this code does not know {sorted(unknown)} of the section "still" in config.json\n'
                "hint: export the student again with `still export --transformers`, or update the .py files beside config.json"
            )
        section = {**ATTENTION, **self.still}
        for key in ("router", "feature_map"):
            value = section[key]
            section[key] = (value, {}) if isinstance(value, str) else next(iter(value.items()))
        if len(section["budgets"]) != self.base.num_hidden_layers:
            raise ValueError(
                f"budgets cover {len(section['budgets'])} layers, the base model has {self.base.num_hidden_layers}"
            )
        return section

    def get_text_config(self, *args, **kwargs):
        """The base's: what generation and the training libraries ask for sizes."""
        return self if self.base_config is None else self.base

    def to_dict(self):
        """Everything but the parsed configuration of the base."""
        base = self.__dict__.pop("_base", None)
        try:
            output = super().to_dict()
        finally:
            self.__dict__["_base"] = base
        output.pop("_base", None)
        if base is not None:
            # Embeddings may have been resized since.
            output["base_config"] = {**self.base_config, "vocab_size": base.vocab_size}
        return output


def _of_base(name):
    def get(self):
        if self.base_config is None:
            raise AttributeError(f"a configuration without a base has no {name}")
        return getattr(self.base, name)

    return property(get)


for _name in (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
):
    setattr(StillConfig, _name, _of_base(_name))
