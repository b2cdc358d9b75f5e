# SPDX-License-Identifier: Apache-2.0
"""From a model folder's config.json to a ModelSpec, by the architecture's name."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, cast

from jaxserve.errors import CheckpointError, one_line
from jaxserve.models import hf
from jaxserve.models.families import (
    cohere,
    deepseek,
    falcon,
    gemma,
    gemma2,
    glm,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    llama,
    mixtral,
    olmo2,
    opt,
    phi,
    phi3,
    qwen,
    smollm3,
    stablelm,
    starcoder2,
)
from jaxserve.models.spec import ModelSpec
from jaxserve.models.weights import Rule


class Family(Protocol):
    """A page of families/."""

    WEIGHTS: tuple[Rule, ...]

    @staticmethod
    def spec(config: hf.Config) -> ModelSpec: ...


# By the name in `architectures`; config.json's `model_type` chooses the class that reads the config.
FAMILIES: dict[str, Family] = cast(
    "dict[str, Family]",
    {
        "Cohere2ForCausalLM": cohere,
        "CohereForCausalLM": cohere,
        "DeepseekV2ForCausalLM": deepseek,
        "DeepseekV3ForCausalLM": deepseek,
        "FalconForCausalLM": falcon,
        "Gemma2ForCausalLM": gemma2,
        "Gemma3ForCausalLM": gemma2,
        "Gemma3ForConditionalGeneration": gemma2,
        "GemmaForCausalLM": gemma,
        "Glm4ForCausalLM": glm,
        "GlmForCausalLM": glm,
        "GPT2LMHeadModel": gpt2,
        "GPTNeoXForCausalLM": gpt_neox,
        "GptOssForCausalLM": gpt_oss,
        "GraniteForCausalLM": granite,
        "LlamaForCausalLM": llama,
        "MinistralForCausalLM": llama,
        "MistralForCausalLM": llama,
        "MixtralForCausalLM": mixtral,
        "Olmo2ForCausalLM": olmo2,
        "OPTForCausalLM": opt,
        "Phi3ForCausalLM": phi3,
        "PhiForCausalLM": phi,
        "Qwen2ForCausalLM": qwen,
        "Qwen2MoeForCausalLM": qwen,
        "Qwen3ForCausalLM": qwen,
        "Qwen3MoeForCausalLM": qwen,
        "SmolLM3ForCausalLM": smollm3,
        "StableLmForCausalLM": stablelm,
        "Starcoder2ForCausalLM": starcoder2,
    },
)


def family_of(raw: Mapping[str, Any]) -> Family:
    names = raw.get("architectures")
    name = cast(list[object], names)[0] if isinstance(names, list) and names else None
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    hint = f"supported: {', '.join(FAMILIES)}"
    if name is None:
        raise CheckpointError("config.json names no architecture", hint)
    problem = f"the architecture {one_line(repr(name))} is not supported"
    if raw.get("auto_map"):
        problem += ", and code that comes with a checkpoint is never run"
    raise CheckpointError(problem, hint)


def read_config(folder: Path) -> tuple[ModelSpec, Family]:
    """The spec of a model folder, and the family whose WEIGHTS name its tensors."""
    raw = hf.read_json(folder / "config.json")
    return spec_of(raw), family_of(raw)


def spec_of(raw: Mapping[str, Any]) -> ModelSpec:
    family = family_of(raw)
    config = as_config(raw)
    try:
        return family.spec(config)
    except CheckpointError:
        raise
    except (AttributeError, TypeError, ValueError, KeyError, ZeroDivisionError, OverflowError) as error:
        problem = f"config.json does not describe a {one_line(str(raw.get('model_type')))} model: {error}"
        raise CheckpointError(problem, "check the file") from None


def as_config(raw: Mapping[str, Any]) -> hf.Config:
    """The config as transformers understands it, with nothing in it that could name code or a backend."""
    if raw.get("quantization_config"):
        problem = f"the checkpoint is quantized ({one_line(repr(raw['quantization_config']))}), which is not supported"
        raise CheckpointError(problem, "name the unquantized checkpoint")
    for part in (raw, raw.get("text_config")):
        if isinstance(part, Mapping) and "per_layer_config" in part:
            raise CheckpointError("config.json sets per_layer_config, which is not supported", "leave it out")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CheckpointError(f"config.json has the unknown model_type {one_line(repr(kind))}", "check the file")
    reader: Any = CONFIG_MAPPING[kind]
    declared = {field.name for field in fields(reader)}
    plain = {
        key: value
        for key, value in raw.items()
        if key != "auto_map" and (not key.startswith("_") or key in declared)  # OPT has a field of that kind
    }
    try:
        return hf.Config(reader.from_dict(plain))
    except Exception as error:  # transformers' own checks raise many kinds
        raise CheckpointError(f"transformers refuses config.json: {one_line(str(error))}", "check the file") from None
