"""A model in training: what was put into it, what of it learns, and how it is saved."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Callable, Union

import numpy as np
import torch
from torch import Tensor, nn

from .. import _still
from .._errors import InputError
from .._transformers.modeling_still import LongRope
from ._attention import NAME, Shared, place, refuse_all_but_whole_rows
from ._files import Source
from ._low_rank import LowRank
from ._parallel import Processes
from ._stages import AttentionTransfer, LowRankFinetuning

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""Dtypes that base weights are saved in, as `still` calls them."""
JOINT = {"q": "qkv_proj", "k": "qkv_proj", "v": "qkv_proj"}
"""Projections that some families (Phi-3) hold as one matrix."""


class _Always:
    updates = True


class Student:
    """A model of transformers with hybrid attention in its layers. `still.torch.linearize` makes it."""

    model: nn.Module
    """The model, changed in place. Its forward pass is the student's."""
    recipe: dict[str, Any]
    """The resolved recipe."""
    section: dict[str, Any]
    """The attention, as transformers' `config.json` of the student has it under `still`."""

    def __init__(self, model: nn.Module, recipe: str, source: Source) -> None:
        self.model, self.recipe, self.source = model, json.loads(recipe), source
        self.config = _base_config(model)
        self.recipe_text = recipe
        section, learned = _still.begin_student(self.config, recipe)
        self.shared = Shared()
        self.section = _absent_filled(json.loads(section))
        layers = _layers(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.hybrid_layers: list[int] = [n for n, budgets in enumerate(self.section["budgets"]) if budgets]
        self.hybrids: list[nn.Module] = []
        for n in self.hybrid_layers:
            self._put_into(layers[n].self_attn)
        self._put_values(learned)
        _rotate_as_still(model)
        model.model.register_forward_pre_hook(refuse_all_but_whole_rows, with_kwargs=True)
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise InputError(
                f"{type(model).__name__} does not take its attention from transformers' AttentionInterface",
                "use a newer version of transformers",
            )

    def _put_into(self, attention: nn.Module) -> None:
        config = self.model.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        sizes = (config.hidden_size, heads, kv_heads, attention.head_dim)
        hybrid = place(attention, self.section, sizes, self.shared)
        hybrid.to(attention.o_proj.weight.device, torch.float32)
        self.hybrids.append(hybrid)
        lora = self.recipe["finetune"]["lora"]
        width = {"q": heads * attention.head_dim, "k": kv_heads * attention.head_dim}
        width["v"], width["o"], width["g"] = width["k"], config.hidden_size, width["q"]
        rows: dict[str, dict[str, Any]] = {}
        for target in lora["targets"]:
            name, start = f"{target}_proj", 0
            if not hasattr(attention, name) and target in JOINT:
                name, start = JOINT[target], {"q": 0, "k": width["q"], "v": width["q"] + width["k"]}[target]
            rows.setdefault(name, {})[target] = (start, start + width[target])
        for name, updates in rows.items():
            owner, switch = (hybrid, _Always()) if name == "g_proj" else (attention, self.shared)
            base = getattr(owner, name)
            scale, dropout = lora["alpha"] / lora["rank"], self.recipe["finetune"]["dropout"]
            setattr(owner, name, LowRank(base, updates, lora["rank"], scale, dropout, switch))

    @torch.no_grad()
    def _put_values(self, values: Mapping[str, np.ndarray[Any, Any]]) -> None:
        own = self.learned()
        if set(own) != set(values):
            raise InputError(
                f"the model has no place for {sorted(set(values) ^ set(own))[:3]}",
                "this is a bug in still; please report it with the model's configuration",
            )
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(values[name]))

    def learned(self) -> dict[str, nn.Parameter]:
        """Everything that a student learns, low-rank updates among it, by its name in a checkpoint."""
        named = {}
        for name, parameter in self.model.named_parameters():
            if ".hybrid." in name or ".lora_A." in name or ".lora_B." in name:
                named[_stored(name)] = parameter
        return named

    def trainable(self, stage: str) -> dict[str, nn.Parameter]:
        """What a stage trains: "transfer" feature maps, scales and gate; "finetune" low-rank updates and, if the recipe says so,
        the former too."""
        attention = stage == "transfer" or (self.recipe["finetune"]["train_attention"] and self.section["branches"]["linear"])
        wanted = lambda name: (stage == "finetune") if ".lora_" in name else attention
        return {name: parameter for name, parameter in self.learned().items() if wanted(name)}

    def transfer(self) -> AttentionTransfer:
        """Stage 1 as a module: token ids in, the loss out."""
        return AttentionTransfer(self)

    def finetune(self) -> LowRankFinetuning:
        """Stage 2 as a module. It recomputes layers in the backward pass if the recipe says so."""
        if self.recipe["finetune"]["recompute"] is not False:
            older = self.model.gradient_checkpointing_enable
            getattr(self.model, "activation_checkpointing_enable", older)({"use_reentrant": False})
            self.model.train()
        return LowRankFinetuning(self)

    def teacher(self) -> AbstractContextManager[None]:
        """Within this context the model is its teacher."""
        return self.shared.as_teacher()

    def shard(self, mesh: Any = None, **options: Any) -> Student:
        """Shards the frozen weights over processes (FSDP2: `fully_shard` of each layer and of the model).

        What is learned stays whole on each process: it is small, and `train` adds up its gradients. `options` are those of
        `torch.distributed.fsdp.fully_shard`.
        """
        from torch.distributed import is_initialized
        from torch.distributed.fsdp import fully_shard

        if not is_initialized():
            raise InputError("torch.distributed is not initialized", "call init_process_group, in a process of torchrun")
        ignored = set(self.learned().values())
        device = "cpu" if mesh is not None and mesh.device_type == "cpu" or not torch.cuda.is_available() else "cuda"
        for parameter in ignored:
            parameter.data = parameter.data.to(device)
        for layer in _layers(self.model):
            fully_shard(layer, mesh=mesh, ignored_params=ignored, **options)
        fully_shard(self.model, mesh=mesh, ignored_params=ignored, **options)
        return self

    def train(
        self,
        data: Any,
        *,
        run_dir: Union[str, os.PathLike[str], None] = None,
        resume: bool = False,
        progress: Callable[[dict[str, Any]], object] | None = None,
    ) -> Student:
        """Both stages over text files, as `still linearize` trains: the same windows in the same order, the recipe's steps, rates
        and optimizer. Every process of torch.distributed, if it is initialized, takes its share of the windows of a step.

        `run_dir` receives metrics, evaluations and checkpoints; with `resume` the run in it goes on. `progress` is called with a
        dict, whose "event" is "stage", "step", "evaluation" or "checkpoint", on the first process. The result is the last student
        or, with `evaluation.keep_best`, the one of the lowest held-out loss.
        """
        from ._trainer import Run

        Run(self, data, run_dir, resume, progress).train()
        return self

    @torch.no_grad()
    def save(self, path: Union[str, os.PathLike[str]], *, overwrite: bool = False) -> None:
        """Saves the student, low-rank updates merged, as a folder that `still` and transformers open. All processes call it, the
        first one writes."""
        path = Path(path)
        if os.path.lexists(path) and not overwrite:
            raise InputError(f"{path} exists already", "choose another path, or pass overwrite=True")
        processes = Processes()
        dtype = _layers(self.model)[0].self_attn.o_proj.weight.dtype
        if dtype not in DTYPES:
            raise InputError(f"weights are {dtype}", "load the model in float32, bfloat16 or float16")
        tensors = self._tensors(dtype, keep=processes.rank == 0)
        processes.first_does(lambda: self._write(path, tensors, DTYPES[dtype], overwrite))

    def _tensors(self, dtype: torch.dtype, keep: bool) -> dict[str, Tensor]:
        """All tensors of the student on the host, by their names in a checkpoint."""
        merged = {id(m.base.weight): m for m in self.model.modules() if isinstance(m, LowRank)}
        tensors = {}
        for name, parameter in self.model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                continue
            # All processes take part in gathering what is sharded.
            value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.data
            if not keep:
                continue
            updates = merged.get(id(parameter))
            value = value if updates is None else updates.merged(value)
            value = value.to("cpu", torch.float32 if ".hybrid." in name else dtype)
            tensors[_stored(name)] = value.contiguous()
        return tensors

    def _write(self, path: Path, tensors: dict[str, Tensor], dtype: str, overwrite: bool) -> None:
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            weights = staging / "model.safetensors"
            save_file(tensors, weights, metadata={"format": "pt", "blake3": "0" * 64})
            directory, generation = self.source.tokenizer_directory(), self.source.generation_config()
            _still.finish_student(staging, self.config, self.recipe_text, directory, generation, dtype)
            staging.chmod(0o755)
            if overwrite and path.exists():
                shutil.rmtree(path)
            staging.rename(path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _stored(name: str) -> str:
    """A parameter's name in a checkpoint."""
    for part in (".lora_A.", ".lora_B."):
        if part in name:
            # …q_proj.lora_A.q.weight, of a matrix that may be joint.
            before, after = name.split(part)
            owner = before.replace(".hybrid", "").rpartition(".")[0]
            return f"{owner}.{after.split('.')[0]}_proj{part}weight"
    return name.replace(".hybrid.", ".").replace("_proj.base.", "_proj.")


def _layers(model: nn.Module) -> Any:
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not hasattr(model, "set_attn_implementation") or layers is None or not hasattr(model, "lm_head"):
        raise InputError(
            f"{type(model).__name__} is no causal language model of transformers with model.layers and lm_head",
            "load it by AutoModelForCausalLM.from_pretrained",
        )
    return layers


def _base_config(model: nn.Module) -> str:
    _layers(model)
    if model.config.model_type == "still" or any(hasattr(x, "hybrid") for x in model.modules()):
        raise InputError("the model is a student already", "load the base model that it came from")
    return json.dumps(json.loads(model.config.to_json_string(use_diff=False)))


def _absent_filled(section: dict[str, Any]) -> dict[str, Any]:
    """As `StillConfig.attention`: router and feature map as (name, options)."""
    from .._transformers.configuration_still import ATTENTION

    section = {**ATTENTION, **section}
    for key in ("router", "feature_map"):
        value = section[key]
        section[key] = (value, {}) if isinstance(value, str) else next(iter(value.items()))
    section.pop("rows", None)
    return section


def _rotate_as_still(model: nn.Module) -> None:
    """Phi-3's long contexts: transformers changes the rotation within a sequence, `still` does not."""
    config = model.config.to_dict()
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "long_factor" in rope:
        model.model.rotary_emb = LongRope(model.config, {**config, **rope})
