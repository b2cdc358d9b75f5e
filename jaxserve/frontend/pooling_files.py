# SPDX-License-Identifier: Apache-2.0
"""Reads what a model's folder says about embeddings, classes and scores: see pooling.py, which applies it.

config.json         labels of a classification head, shorter embeddings
modules.json        sentence-transformers' modules; each of their folders has a config.json, and a Dense its weights
the checkpoint      the classification head, or rows of the language model's head
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from convert.files.pooled import HEAD, head_folder, is_converted
from convert.files.safetensors import TensorInfo, read_checkpoint
from jaxserve.config import ConfigError
from jaxserve.errors import CheckpointError, one_line
from jaxserve.frontend.pooling import Activation, Classifier, DenseLayer, Pooling
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types.request import Pool

MAX_JSON = 10_000_000  # bytes
MAX_VALUES = 2**28  # of one weight
# sentence-transformers' pooling modes, by their names without `_token` and `_tokens`.
POOLS: dict[str, Pool] = {"lasttoken": "last", "cls": "first", "mean": "mean", "weightedmean": "weighted_mean"}
CLASSIFICATION = "ForSequenceClassification"  # what the names of such architectures end with
# Of the files of converted parameters.
ZARR_DTYPES = {"<f4": "F32", "bfloat16": "BF16", "<f2": "F16"}
# Of torch's classes, by the last part of their names.
ACTIVATIONS: dict[str, Activation] = {
    "identity": "identity",
    "sigmoid": "sigmoid",
    "softmax": "softmax",
    "tanh": "tanh",
    "relu": "relu",
    "silu": "silu",
}


def pooling_of(folder: str | None, tokenizer: Tokenizer | None, words: Sequence[str] = ()) -> Pooling:
    """The pooling of an engine's model. `words`: of its head, the tokens that a score is made of."""
    if not folder:
        if words:
            problem = "classifier_from_token is set, and the model has no folder to read its head from"
            raise ConfigError(problem, "load the model by its name, without params")
        return Pooling()
    if len(words) not in (0, 2):
        raise ConfigError(f"classifier_from_token has {len(words)} tokens", "name two, such as no yes")
    tokens: list[int] = []
    for word in words:
        ids = [] if tokenizer is None else tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            problem = f"classifier_from_token has {word!r}, which is {len(ids)} tokens of this model"
            raise ConfigError(problem, "name two that are one token each: /tokenize shows the tokens of a text")
        tokens += ids
    return load(Path(folder), tokens=tokens)


def load(folder: Path, *, tokens: Sequence[int] = ()) -> Pooling:
    """What the folder's files ask for. `tokens`: the score is the probability of the second against the first, by the
    rows that they have in the language model's head, instead of a classification head."""
    config = _object(folder / "config.json")
    classifier = None
    if tokens:
        classifier = _by_tokens(folder, config, tokens)
    elif _is_classifier(config):
        classifier = _classifier(folder, config)
    modules = _listed(folder / "modules.json")
    pooling = _by_modules(folder, modules) if modules else Pooling()
    return replace(pooling, classifier=classifier, dimensions=_dimensions(config))


def _by_modules(folder: Path, modules: Sequence[Mapping[str, Any]]) -> Pooling:
    """sentence-transformers' modules, which run one after another."""
    dense: list[DenseLayer] = []
    pool: Pool = "last"
    normalizes, unsupported = False, None
    for module in modules:
        kind, place = str(module.get("type")).rsplit(".", 1)[-1], str(module.get("path") or "")
        if kind in ("Normalize", "Dense") and unsupported is None and normalizes:
            unsupported = f"modules.json has a {kind} module after normalization"
        match kind:
            case "Transformer":
                pass
            case "Pooling":
                found = _pooled(_object(_inside(folder, place) / "config.json"))
                if found in POOLS.values():
                    pool = cast("Pool", found)
                else:
                    unsupported = unsupported or found
            case "Dense":
                dense.append(_dense(_inside(folder, place)))
            case "Normalize":
                normalizes = True
            case _:
                unsupported = unsupported or f"modules.json has a module {one_line(kind)}"
    return Pooling(pool, tuple(dense), normalizes, unsupported=unsupported)


def _pooled(config: Mapping[str, Any]) -> Pool | str:
    """The kind of pooling, or what is not supported of it."""
    given: Any = config.get("pooling_mode")
    modes = [name.removeprefix("pooling_mode_") for name, value in config.items() if value is True and "mode" in name]
    if isinstance(given, str | list):
        modes = [given] if isinstance(given, str) else list(map(str, cast("list[object]", given)))
    elif config and not modes:
        modes = ["mean"]  # sentence-transformers' default
    names = [re.sub("_tokens?$", "", mode) for mode in modes]
    if len(names) == 1 and names[0] in POOLS:
        return POOLS[names[0]]
    shown = one_line(" and ".join(modes) or "not set")
    return f"its pooling mode is {shown}, and only {', '.join(POOLS)} are supported"


def _dense(folder: Path) -> DenseLayer:
    config, tensors = _object(folder / "config.json"), read_checkpoint(folder)
    weight = _matrix(tensors, "linear.weight", folder)
    bias = _values(tensors["linear.bias"]) if "linear.bias" in tensors else None
    name = str(config.get("activation_function", "identity")).rsplit(".", 1)[-1]
    return DenseLayer(weight, bias, _activation(name, folder))


def _is_classifier(config: Mapping[str, Any]) -> bool:
    names: Any = config.get("architectures")
    return isinstance(names, list) and str(next(iter(cast("list[object]", names)), "")).endswith(CLASSIFICATION)


def _classifier(folder: Path, config: Mapping[str, Any]) -> Classifier:
    weight = _matrix(read_checkpoint(head_folder(folder)), HEAD, folder)
    count = len(weight)
    names: Any = config.get("id2label")
    given: Mapping[str, object] = cast("Any", names) if isinstance(names, dict) else {}
    labels = tuple(str(given.get(str(i), f"LABEL_{i}")) for i in range(count))
    return Classifier(DenseLayer(weight, None, _of_classes(config, count, folder)), labels)


def _of_classes(config: Mapping[str, Any], count: int, folder: Path) -> Activation:
    """What makes probabilities of the last layer's outputs."""
    own = config.get("sentence_transformers")
    stated = config.get("sbert_ce_default_activation_function") or (
        cast("Mapping[str, object]", own).get("activation_fn") if isinstance(own, dict) else None
    )
    if stated:
        return _activation(str(stated).rsplit(".", 1)[-1], folder)
    match config.get("problem_type"):
        case "regression":
            return "identity"
        case "multi_label_classification":
            return "sigmoid"
        case "single_label_classification" if count > 1:
            return "softmax"
        case _:
            return "softmax" if count > 1 else "sigmoid"


def _by_tokens(folder: Path, config: Mapping[str, Any], tokens: Sequence[int]) -> Classifier:
    """Two classes as one score: a softmax of two logits is a sigmoid of their difference."""
    heads = ("lm_head.weight", "model.embed_tokens.weight", "embed_tokens.weight")
    if is_converted(folder):
        tensors, heads = _converted(folder, ("head", "embed.weight")), ("head", "embed.weight")
    else:
        tensors = read_checkpoint(folder)
        heads = heads[1:] if config.get("tie_word_embeddings") else heads
    name = next((name for name in heads if name in tensors), None)
    if name is None:
        raise CheckpointError(f"{folder} has no {heads[0]}", "choose a model with a language model's head")
    rows = _rows(tensors[name], tokens)
    return Classifier(DenseLayer((rows[1] - rows[0])[None], None, "sigmoid"), ("LABEL_0",))


def _dimensions(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    sizes = config.get("matryoshka_dimensions")
    if isinstance(sizes, list):
        return tuple(size for size in cast("list[object]", sizes) if isinstance(size, int))
    return None if config.get("is_matryoshka") is True else ()


def _activation(name: str, folder: Path) -> Activation:
    if name.lower() not in ACTIVATIONS:
        problem = f"{folder} asks for the activation {one_line(name)}"
        raise CheckpointError(problem, f"supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name.lower()]


# --- files ----------------------------------------------------------------------------------------------------------


def _inside(folder: Path, place: str) -> Path:
    if not re.fullmatch(r"[\w.-]*", place) or place in ("..",):
        raise CheckpointError(f"modules.json of {folder} has the path {one_line(place)}", "name a folder beside it")
    return folder / place


def _object(file: Path) -> dict[str, Any]:
    found = _json(file)
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _listed(file: Path) -> list[Mapping[str, Any]]:
    found = _json(file)
    each = cast("list[object]", found) if isinstance(found, list) else []
    return [cast("Mapping[str, Any]", module) for module in each if isinstance(module, dict)]


def _json(file: Path) -> object:
    """The file's content; None if there is no such file."""
    if not file.is_file():
        return None
    if file.stat().st_size > MAX_JSON:
        raise CheckpointError(f"{file} is larger than {MAX_JSON:,} bytes", "check the file")
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} is not valid JSON", "download it again") from None


def _converted(folder: Path, names: Sequence[str]) -> dict[str, TensorInfo]:
    """Those of these parameters that a converted model has. Each is one file of plain values."""
    found: dict[str, TensorInfo] = {}
    for name in names:
        place = folder / "params" / name
        array = _object(place / ".zarray")
        file = place / "0.0"
        dtype = ZARR_DTYPES.get(str(array.get("dtype")))
        if dtype is not None and file.is_file():
            found[name] = TensorInfo(dtype, tuple(array["shape"]), 0, file.stat().st_size, file)
    return found


def _matrix(tensors: Mapping[str, TensorInfo], name: str, folder: Path) -> np.ndarray:
    if name not in tensors:
        raise CheckpointError(f"{folder} has no tensor {name}", "download it again, or save it as safetensors")
    values = _values(tensors[name])
    if values.ndim != 2 or 0 in values.shape or not np.isfinite(values).all():
        problem = f"{folder} has the tensor {name} of shape {list(values.shape)}, expected a finite matrix"
        raise CheckpointError(problem, "check the file")
    return values


def _values(info: TensorInfo) -> np.ndarray:
    return _read(info, info.start, info.stop).reshape(info.shape)


def _rows(info: TensorInfo, rows: Sequence[int]) -> np.ndarray:
    if len(info.shape) != 2 or not all(0 <= row < info.shape[0] for row in rows):
        raise CheckpointError(f"{info.file} has no rows {list(rows)} of its head", "name tokens of this model")
    size = (info.stop - info.start) // info.shape[0]
    return np.stack([_read(info, info.start + row * size, info.start + (row + 1) * size) for row in rows])


def _read(info: TensorInfo, start: int, stop: int) -> np.ndarray:
    """The values in these bytes of the file, in float32."""
    if info.dtype not in _DECODE or stop - start > 8 * MAX_VALUES:
        raise CheckpointError(f"{info.file} has a tensor of dtype {info.dtype}", f"use {', '.join(_DECODE)}")
    with info.file.open("rb") as file:
        file.seek(start)
        return _DECODE[info.dtype](file.read(stop - start))


def _bfloat16(data: bytes) -> np.ndarray:
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


def _as_float32(dtype: str) -> Callable[[bytes], np.ndarray]:
    return lambda data: np.frombuffer(data, dtype).astype(np.float32)


_DECODE: dict[str, Callable[[bytes], np.ndarray]] = {
    "F32": _as_float32("<f4"),
    "BF16": _bfloat16,
    "F16": _as_float32("<f2"),
    "F64": _as_float32("<f8"),
}
