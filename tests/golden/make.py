# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""Records what transformers computes for every case. `make golden` runs it, in a venv with torch.

A file is rewritten only when what it says has changed, so that another processor's rounding leaves
no trace. With --check nothing is written and any difference is an error.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tests.golden import load, make_tokenizers, weights
from tests.golden.cases import CASES, Case

GREEDY = 32
MARGIN = 2e-3  # of the spread of the logits: how far ahead every greedy token must be
SAME = 2e-5  # of the spread: what float64 and other processors may differ by
SEEN = 1e-2  # of the spread: what a switch must change
DISTINCT = 6  # greedy tokens
SEEDS = 60


TOPK = torch.topk, torch.Tensor.topk


class Unfit(Exception):
    """The model of this seed proves too little; try another seed."""


@dataclass
class Record:
    content: dict[str, Any]
    logits: np.ndarray
    error: float
    margin: float
    seen: float
    spread: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="make only the cases whose name has one of these in it")
    parser.add_argument("--check", action="store_true", help="write nothing; report what differs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    chosen = [c for c in CASES if not options.names or any(name in c.name for name in options.names)]
    print(f"{'case':34}{'seed':>5}{'spread':>8}{'float64':>9}{'margin':>9}{'switch':>8}{'seconds':>9}")
    bad: list[str] = []
    for case in chosen:
        start = time.monotonic()
        try:
            new = record(case)
        except Exception as error:
            bad.append(case.name)
            print(f"{case.name:34} {type(error).__name__}: {error}"[:400], flush=True)
            continue
        seconds = time.monotonic() - start
        numbers = f"{new.content['seed']:5}{new.spread:8.2f}{new.error:9.1e}{new.margin:9.4f}{new.seen:8.2f}"
        reported = compare(case, new)
        if reported and not options.check:
            write(case, new)
        elif reported:
            bad.append(case.name)
        print(f"{case.name:34}{numbers}{seconds:9.1f}  {reported or 'same'}", flush=True)
    if not options.names or any(name in "tokenizers" for name in options.names):
        reported = make_tokenizers.compare()
        print("tokenizers ", reported or "same")
        if reported and not options.check:
            make_tokenizers.write()
        elif reported:
            bad.append("tokenizers")
    if not options.names:
        for path in sorted(load.DATA.glob("*.npz")):
            if path.stem not in {case.name for case in CASES}:
                print(f"{path.stem}: no such case")
                if options.check:
                    bad.append(path.stem)
                else:
                    path.unlink()
                    path.with_suffix(".json").unlink()
    if bad:
        print("failed:", *bad)
    return bool(bad)


def record(case: Case) -> Record:
    if len({c.name for c in CASES}) != len(CASES):
        raise SystemExit("two cases share a name")
    torch.topk, torch.Tensor.topk = (lowest_first, lowest_first) if case.lowest_first else TOPK
    config, tensors = skeleton(case)
    reasons: list[str] = []
    for seed in range(1, SEEDS + 1):
        try:
            return attempt(case, config, tensors, seed)
        except Unfit as reason:
            reasons.append(str(reason))
    raise RuntimeError("no seed of these will do: " + ", ".join(reasons[-8:]))


def skeleton(case: Case) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The config to record, and the names and shapes that the hub would have."""
    with tempfile.TemporaryDirectory() as name:
        saved = Path(name)
        model = AutoModelForCausalLM.from_config(configured(case.config), dtype=torch.float32)
        model.save_pretrained(saved)
        config = dict(case.config) if case.hub else json.loads((saved / "config.json").read_text())
        header = (saved / "model.safetensors").read_bytes()
    header = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    shapes = {renamed(case, key): entry["shape"] for key, entry in header.items() if key != "__metadata__"}
    more = {**case.extra, **case.unread}
    return config, {**shapes, **{key: list(shape) for key, shape in more.items()}}


def configured(content: Mapping[str, Any]) -> Any:
    """As transformers understands a config.json with this in it."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(dict(content)))
        return AutoConfig.from_pretrained(name)


def renamed(case: Case, name: str) -> str:
    for pattern, replacement in case.rename:
        name = re.sub(pattern, replacement, name)
    return name


def attempt(case: Case, config: dict[str, Any], tensors: dict[str, list[int]], seed: int) -> Record:
    values = {name: weights.tensor(seed, name, shape, case.rules) for name, shape in tensors.items()}
    vocab = int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    prompt = token_ids(seed, "prompt", case.prompt, vocab)
    start = token_ids(seed, "greedy prompt", case.greedy_prompt, vocab)

    model = loaded(case, config, values)
    greedy = continuation(model, start)
    if len(set(greedy)) < DISTINCT:
        raise Unfit(f"only {len(set(greedy))} distinct tokens")
    text = start + greedy
    if case.crossing:
        whole = np.stack([run(model, text[:end])[-1] for end in range(len(start), len(text))])
    else:
        whole = run(model, text)[len(start) - 1 : -1]
    if whole.argmax(-1).tolist() != greedy:
        raise RuntimeError("the continuation is another one without a cache")
    best = np.sort(whole, -1)
    margin = float((best[:, -1] - best[:, -2]).min() / whole.std())
    if margin < MARGIN:
        raise Unfit(f"margin {margin:.1e}")

    logits = run(model, prompt)
    spread = float(logits.std())
    if not np.isfinite(logits).all() or not 0.5 < spread < 50:
        raise Unfit(f"spread {spread:.2g}")
    # In float32 this is a matter of order alone, and it insists on float32.
    plain = {**config, "reorder_and_upcast_attn": False}
    exact = run(loaded(case, plain if "reorder_and_upcast_attn" in config else config, values).double(), prompt)
    error = float(np.abs(exact - logits).max() / spread)
    if error > SAME:
        raise Unfit(f"float64 differs by {error:.1e}")
    seen = float("inf")
    for other in case.against:
        change = np.abs(run(loaded(case, {**config, **other}, values), prompt) - logits).max() / spread
        seen = min(seen, float(change))
        if change < SEEN:
            raise RuntimeError(f"{dict(other)} changes the logits by {change:.1e} only")
    content = {
        "case": case.name,
        "seed": seed,
        "config": config,
        "tensors": tensors,
        "rules": asdict(case.rules),
        "prompt": prompt,
        "greedy_prompt": start,
        "greedy": greedy,
        "transformers": transformers.__version__,
    }
    return Record(content, logits.astype(np.float32), error, margin, seen, spread)


def lowest_first(x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """torch.topk with equal values in the order of their index."""
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)


def token_ids(seed: int, what: str, count: int, vocab: int) -> list[int]:
    return ((weights.uniform(seed, what, [count]) + 1) / 2 * vocab).astype(int).tolist()


def loaded(case: Case, config: Mapping[str, Any], values: Mapping[str, np.ndarray]) -> Any:
    """The checkpoint as transformers loads it, with every part in plain eager torch."""
    with tempfile.TemporaryDirectory() as folder:
        load.write_folder(folder, config, values, "float32", shards=1)
        model, reported = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    if reported["missing_keys"] or reported["mismatched_keys"]:
        raise RuntimeError(f"missing {reported['missing_keys']}, of another shape {reported['mismatched_keys']}")
    unexpected = set(reported["unexpected_keys"]) - set(case.unread)
    if unexpected:
        raise RuntimeError(f"not read: {sorted(unexpected)}")
    return model.eval()


def run(model: Any, ids: list[int]) -> np.ndarray:
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
    return logits[0].double().numpy()


def continuation(model: Any, start: list[int]) -> list[int]:
    # The model's own settings would end the text at its end token, and merge into those passed.
    model.generation_config = GenerationConfig(max_new_tokens=GREEDY, do_sample=False, use_cache=True, pad_token_id=0)
    ids = torch.tensor([start])
    out = model.generate(ids, attention_mask=torch.ones_like(ids))[0].tolist()
    if len(out) != len(start) + GREEDY:
        raise RuntimeError(f"{len(out) - len(start)} tokens instead of {GREEDY}")
    return out[len(start) :]


def compare(case: Case, new: Record) -> str:
    """What is not as recorded, or nothing."""
    file = load.DATA / f"{case.name}.json"
    if not file.exists() or not file.with_suffix(".npz").exists():
        return "new"
    old = json.loads(file.read_text())
    keys = [key for key in new.content if json.dumps(old.get(key)) != json.dumps(new.content[key])]
    keys = [key for key in keys if not isinstance(old.get(key), dict) or old[key] != new.content[key]]
    if keys:
        return "another " + ", ".join(keys)
    with np.load(file.with_suffix(".npz")) as arrays:
        logits = arrays["logits"]
    if logits.shape != new.logits.shape:
        return f"logits {list(logits.shape)} are now {list(new.logits.shape)}"
    error = np.abs(logits - new.logits).max() / new.spread
    return f"logits differ by {error:.1e} of their spread" if error > SAME else ""


def write(case: Case, new: Record) -> None:
    load.DATA.mkdir(exist_ok=True)
    (load.DATA / f"{case.name}.json").write_text(as_text(new.content))
    np.savez_compressed(load.DATA / f"{case.name}.npz", logits=new.logits)


def as_text(content: Mapping[str, Any]) -> str:
    """JSON with one line for each key, and one for each of those a dictionary under it has."""
    lines: list[str] = []
    for key in sorted(content):
        value = content[key]
        if isinstance(value, dict) and value:
            inner = [f"  {json.dumps(name)}: {json.dumps(value[name], sort_keys=True)}" for name in sorted(value)]
            lines.append(f" {json.dumps(key)}: {{\n" + ",\n".join(inner) + "\n }")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
