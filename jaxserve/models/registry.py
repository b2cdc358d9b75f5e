# SPDX-License-Identifier: Apache-2.0
"""Maps architecture names to families, and a folder's config.json to a ModelSpec."""

import os
from collections.abc import Mapping
from dataclasses import fields, replace
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
from jaxserve.models.spec import MAX_LAYERS, ModelSpec
from jaxserve.models.weights import Rule
from jaxserve.quant.formats import FORMATS
from jaxserve.quant.formats.format import Format, Tensors
from jaxserve.quant.scheme import Quantized, Scheme


class Family(Protocol):
    """A module in families/. It may also define IGNORED: patterns of tensor names that are not part of the model, in
    which `{layers}` is the number of layers.
    """

    WEIGHTS: tuple[Rule, ...]

    @staticmethod
    def spec(config: hf.Config) -> ModelSpec: ...


# By the name in `architectures`: the `model_type` that must match, which also names transformers' config class.
FAMILIES: dict[str, tuple[str, Family]] = cast(
    "dict[str, tuple[str, Family]]",
    {
        "Cohere2ForCausalLM": ("cohere2", cohere),
        "CohereForCausalLM": ("cohere", cohere),
        "DeepseekV2ForCausalLM": ("deepseek_v2", deepseek),
        "DeepseekV3ForCausalLM": ("deepseek_v3", deepseek),
        "FalconForCausalLM": ("falcon", falcon),
        "Gemma2ForCausalLM": ("gemma2", gemma2),
        "Gemma3ForCausalLM": ("gemma3_text", gemma2),
        "Gemma3ForConditionalGeneration": ("gemma3", gemma2),
        "GemmaForCausalLM": ("gemma", gemma),
        "Glm4ForCausalLM": ("glm4", glm),
        "GlmForCausalLM": ("glm", glm),
        "GPT2LMHeadModel": ("gpt2", gpt2),
        "GPTNeoXForCausalLM": ("gpt_neox", gpt_neox),
        "GptOssForCausalLM": ("gpt_oss", gpt_oss),
        "GraniteForCausalLM": ("granite", granite),
        "LlamaForCausalLM": ("llama", llama),
        "MinistralForCausalLM": ("ministral", llama),
        "MistralForCausalLM": ("mistral", llama),
        "MixtralForCausalLM": ("mixtral", mixtral),
        "Olmo2ForCausalLM": ("olmo2", olmo2),
        "OPTForCausalLM": ("opt", opt),
        "Phi3ForCausalLM": ("phi3", phi3),
        "PhiForCausalLM": ("phi", phi),
        "Qwen2ForCausalLM": ("qwen2", qwen),
        "Qwen2MoeForCausalLM": ("qwen2_moe", qwen),
        "Qwen3ForCausalLM": ("qwen3", qwen),
        "Qwen3MoeForCausalLM": ("qwen3_moe", qwen),
        "SmolLM3ForCausalLM": ("smollm3", smollm3),
        "StableLmForCausalLM": ("stablelm", stablelm),
        "Starcoder2ForCausalLM": ("starcoder2", starcoder2),
    },
)


# Endings of architectures that have the layers of a language model, but not its head.
HEADLESS = ("ForSequenceClassification", "Model")


def generates(raw: Mapping[str, Any]) -> bool:
    """Whether the architecture has a language model's head."""
    return _architecture(raw) in FAMILIES


def _architecture(raw: Mapping[str, Any]) -> object:
    names = raw.get("architectures")
    return cast(list[object], names)[0] if isinstance(names, list) and names else None


def _with_head(name: str) -> str:
    """The architecture with the same layers and a language model's head."""
    ending = next((ending for ending in HEADLESS if name.endswith(ending)), "")
    return name.removesuffix(ending) + "ForCausalLM" if ending and name not in FAMILIES else name


def family_of(raw: Mapping[str, Any]) -> Family:
    name = _architecture(raw)
    if isinstance(name, str) and _with_head(name) in FAMILIES:
        kind, family = FAMILIES[_with_head(name)]
        if raw.get("model_type") != kind:
            found = one_line(repr(raw.get("model_type")))
            raise CheckpointError(f"config.json has model_type {found} for {name}", f"expected model_type {kind!r}")
        return family
    hint = f"supported: {', '.join(FAMILIES)}"
    if name is None:
        raise CheckpointError("config.json has no architectures", hint)
    problem = f"the architecture {one_line(repr(name))} is not supported"
    if raw.get("auto_map"):
        problem += ", and code from a checkpoint is never run"
    raise CheckpointError(problem, hint)


def read_config(folder: Path) -> tuple[ModelSpec, Family]:
    """Read a model folder's spec, and the family whose WEIGHTS map its tensors. Which weights are quantized is a guess
    until the headers of the files are read; see `quantization`."""
    raw = read_raw(folder)
    return spec_of(raw), family_of(raw)


# Where older tools put what is now the quantization_config of config.json, and the method if the file names none.
_OTHER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def read_raw(folder: Path) -> dict[str, Any]:
    """A folder's config.json, with the quantization_config that may be in a file beside it."""
    raw = hf.read_json(folder / "config.json")
    text = raw.get("text_config")
    if not raw.get("quantization_config") and isinstance(text, Mapping) and "quantization_config" in text:
        raw["quantization_config"] = cast(Mapping[str, Any], text)["quantization_config"]
    for name, method in _OTHER_FILES.items():
        if not raw.get("quantization_config") and (folder / name).is_file():
            raw["quantization_config"] = {"quant_method": method, **hf.read_json(folder / name)}
    return raw


def spec_of(raw: Mapping[str, Any]) -> ModelSpec:
    family = family_of(raw)
    config = as_config(raw)
    try:
        spec = family.spec(config)
        if not generates(raw):
            spec = spec.without_head()
        if raw.get("quantization_config"):
            spec = replace(spec, quantized=_quantized(_format(raw, NoTensors()), family, len(spec.layers), NoTensors()))
        return spec
    except CheckpointError:
        raise
    except (AttributeError, TypeError, ValueError, KeyError, ZeroDivisionError, OverflowError) as error:
        problem = f"config.json does not describe a {one_line(str(raw.get('model_type')))} model: {error}"
        raise CheckpointError(problem, "check the file") from None


def method_of(folder: Path) -> str | None:
    """The method that a folder's config says its weights are quantized by."""
    given = read_raw(folder).get("quantization_config")
    return str(cast(Mapping[str, Any], given).get("quant_method")) if isinstance(given, Mapping) else None


class NoTensors(dict[str, Any]):
    """The tensors of a checkpoint whose files are not at hand."""

    def small(self, name: str) -> Any:
        raise KeyError(name)

    def where(self, name: str) -> str:
        return name


def quantization(folder: Path, spec: ModelSpec, family: Family, tensors: Tensors) -> tuple[Format | None, ModelSpec]:
    """The format of a folder with these tensors, and the spec with the schemes of its weights; None if no weight is
    quantized."""
    raw = read_raw(folder)
    if not raw.get("quantization_config"):
        return None, spec
    chosen = _format(raw, tensors)
    schemes = _quantized(chosen, family, len(spec.layers), tensors)
    return chosen if schemes else None, replace(spec, quantized=schemes)


def _format(raw: Mapping[str, Any], tensors: Tensors) -> Format:
    given = raw["quantization_config"]
    settings: Mapping[str, Any] = cast(Any, given if isinstance(given, Mapping) else {})
    found = FORMATS.get(str(settings.get("quant_method")))
    if found is None:
        problem = f"the checkpoint is quantized ({one_line(repr(raw['quantization_config']))}), which is not supported"
        supported = ", ".join(FORMATS)
        raise CheckpointError(problem, f"name the unquantized checkpoint, or one quantized by {supported}")
    return found(settings, tensors)


def _quantized(chosen: Format, family: Family, layers: int, tensors: Tensors) -> tuple[Quantized, ...]:
    """The schemes of the model's weights, as few entries as there are different ones."""
    found: dict[str, list[Scheme | None]] = {}
    known: dict[str, list[bool]] = {}
    for rule in family.WEIGHTS:
        if not rule.is_weight:
            continue
        module = rule.source.removesuffix(".weight").replace("{expert}", "0")
        numbers = range(layers) if "{layer}" in rule.path else range(1)
        modules = [module.replace("{layer}", str(i)) for i in numbers]
        schemes = [chosen.scheme(each) for each in modules]
        stored = [_is_stored(*each, rule, chosen, tensors) for each in zip(modules, schemes, strict=True)]
        # Several rules may name one tensor: the first that the checkpoint has applies.
        before, seen = found.setdefault(rule.path, schemes), known.setdefault(rule.path, stored)
        for i in numbers:
            if stored[i] and not seen[i]:
                before[i], seen[i] = schemes[i], True
    entries: dict[str, Scheme | None] = {}
    for path, each in found.items():
        alike = len({*each}) == 1
        entries |= zip([path] if alike else _numbered(path, layers), each, strict=False)
    return tuple(Quantized(path=path, scheme=scheme) for path, scheme in entries.items() if scheme)


def _is_stored(module: str, scheme: Scheme | None, rule: Rule, chosen: Format, tensors: Tensors) -> bool:
    suffix = rule.source[len(rule.source.removesuffix(".weight")) :]
    return module + (chosen.source(module, scheme.components[0]).suffix if scheme else suffix) in tensors


def _numbered(path: str, layers: int) -> list[str]:
    return [path.replace("{layer}", str(i)) for i in range(layers)]


# Fields to drop: code is never run, quantization is read here, and language models have no labels (num_labels could
# make a huge list).
UNREAD = ("auto_map", "quantization_config", "num_labels", "id2label", "label2id")


def _check_raw(part: Mapping[str, Any]) -> None:
    """Check what transformers relies on: it makes lists of as many items as there are layers."""
    if "per_layer_config" in part:
        raise CheckpointError("config.json sets per_layer_config, which is not supported", "remove it")
    if part.get("is_causal") is False:
        problem = "config.json has is_causal = false: attention to later tokens is not supported"
        raise CheckpointError(problem, "use a model with causal attention")
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        count = part.get(name, 1)
        if not isinstance(count, int) or not 0 < count <= MAX_LAYERS:
            problem = f"config.json has {name} = {one_line(repr(count))}, expected 1 to {MAX_LAYERS}"
            raise CheckpointError(problem, "check the file")


def as_config(raw: Mapping[str, Any]) -> hf.Config:
    """The config as transformers reads it, without fields that could name code or a backend."""
    for part in (raw, raw.get("text_config")):
        if isinstance(part, Mapping):
            _check_raw(cast(Mapping[str, Any], part))
    # transformers' warnings (torch is missing, the config is old) do not apply to us.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    reader: Any = CONFIG_MAPPING[raw["model_type"]]
    declared = {field.name for field in fields(reader)}
    plain = {
        key: value
        for key, value in raw.items()
        if key not in UNREAD and (not key.startswith("_") or key in declared)  # OPT declares one
    }
    try:
        return hf.Config(reader.from_dict(plain))
    except Exception as error:  # transformers' own checks raise many kinds
        raise CheckpointError(
            f"transformers rejects config.json: {one_line(str(error) or type(error).__name__)}", "check the file"
        ) from None
