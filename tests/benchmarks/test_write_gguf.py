# SPDX-License-Identifier: Apache-2.0
"""The file that llama.cpp reads: its weights, shape and words, by a writer that only notes what it is given."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks import offline, words
from benchmarks.peers import commands, servers
from jaxserve import demo


class Writer:
    """In place of gguf's."""

    last: "Writer"

    def __init__(self, path: Path, architecture: str) -> None:
        self.written: dict[str, Any] = {"architecture": architecture}
        Writer.last = self

    def add_tensor(self, name: str, values: np.ndarray) -> None:
        self.written[name] = np.array(values)

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self.written.update({name.removeprefix("add_"): values[0] if values else None})


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is written for a folder."""
    gguf: Any = ModuleType("gguf")
    gguf.GGUFWriter, gguf.LlamaFileType = Writer, SimpleNamespace(ALL_F32=0)
    monkeypatch.setitem(sys.modules, "gguf", gguf)
    monkeypatch.delitem(sys.modules, "benchmarks.peers.write_gguf", raising=False)
    module = importlib.import_module("benchmarks.peers.write_gguf")

    def write(folder: Path) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["write_gguf.py", str(folder), "file"])
        module.main()
        return Writer.last.written

    yield write
    sys.modules.pop("benchmarks.peers.write_gguf", None)


def test_a_model_of_words(tmp_path: Path, written: Any) -> None:
    shape = offline.TINY
    folder = offline.make_checkpoint(tmp_path / "model", shape, seed=0)
    words.write_tokenizer(folder, shape.vocab)
    found, theirs = written(folder), load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(found["token_embd.weight"], theirs["model.embed_tokens.weight"])
    np.testing.assert_array_equal(found["blk.1.ffn_up.weight"], theirs["model.layers.1.mlp.up_proj.weight"])
    assert "output.weight" not in found and sum(name.endswith(".weight") for name in found) == len(theirs)
    # What Hugging Face rotates together lies half a head apart, for llama.cpp side by side.
    size = shape.hidden // shape.heads
    for name, key in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
        heads = theirs[f"model.layers.0.self_attn.{key}.weight"].reshape(shape.heads, size, -1)
        ours = found[f"blk.0.{name}.weight"].reshape(shape.heads, size, -1)
        for pair in range(size // 2):
            np.testing.assert_array_equal(ours[:, 2 * pair], heads[:, pair])
            np.testing.assert_array_equal(ours[:, 2 * pair + 1], heads[:, pair + size // 2])
    assert (found["head_count"], found["key_length"], found["block_count"]) == (shape.heads, size, shape.layers)
    assert found["tokenizer_model"] == "t5" and found["token_list"][:4] == ["<unk>", "<s>", "</s>", "\u2581the"]
    assert len(found["token_list"]) == shape.vocab and found["token_types"][:4] == [3, 3, 3, 1]
    assert (found["unk_token_id"], found["bos_token_id"], found["eos_token_id"]) == (0, 1, 2)


def test_the_demo(written: Any) -> None:
    found = written(demo.FOLDER)
    config = json.loads((demo.FOLDER / "config.json").read_text())
    assert found["key_length"] == config["head_dim"] != config["hidden_size"] // config["num_attention_heads"]
    assert found["tokenizer_model"] == "gpt2" and len(found["token_list"]) == config["vocab_size"]
    assert all(merge.count(" ") == 1 for merge in found["token_merges"])
    assert found["blk.0.attn_k.weight"].shape == (config["num_key_value_heads"] * config["head_dim"], 192)
    weights = [values for name, values in found.items() if name.endswith(".weight")]
    assert all(values.dtype == np.float32 for values in weights)
    # bfloat16 in the checkpoint: nothing but zeros in the lower half of each number.
    assert all(not (values.view(np.uint32) & 0xFFFF).any() and np.abs(values).max() > 0 for values in weights)


def test_unknown_content_is_an_error(tmp_path: Path, written: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(SystemExit, match="a GPT2LMHeadModel; supported is LlamaForCausalLM"):
        written(tmp_path)


@pytest.mark.parametrize("config", [{"rope_theta": 1e5}, {"rope_parameters": {"rope_theta": 1e5}}])
def test_both_places_of_the_rotation_s_base_are_read(config: dict[str, Any], tmp_path: Path, written: Any) -> None:
    shape = offline.TINY
    folder = offline.make_checkpoint(tmp_path / "model", shape, seed=0)
    words.write_tokenizer(folder, shape.vocab)
    whole = json.loads((folder / "config.json").read_text())
    whole = {name: value for name, value in whole.items() if not name.startswith("rope_")}
    (folder / "config.json").write_text(json.dumps(whole | config))
    assert written(folder)["rope_freq_base"] == 1e5


@pytest.mark.parametrize(("name", "cache"), [("llamacpp:f32", "f32"), ("llamacpp:q8_0", None), ("llamacpp", None)])
def test_the_server_of_it(name: str, cache: str | None, tmp_path: Path) -> None:
    made = commands.start_command(name, tmp_path, 81, longest=512, venv=tmp_path, place=tmp_path)
    write, *quantize = made.prepare
    assert write.command[-2:] == [str(tmp_path), str(write.makes)]
    assert [step.command[1] for step in quantize] == [str(write.makes)] * (cache is None)
    last = made.prepare[-1].makes
    assert str(last) in made.command and str(commands.ROWS * 512) in made.command
    if quantize:
        assert quantize[0].command[2:] == [str(last), "Q8_0" if name.endswith("q8_0") else "F16"]
    assert made.command.count("f32") == (2 if cache else 0), "the types of keys and values"


def test_a_model_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho no weights here\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(SystemExit, match="llamacpp could not be prepared: no weights here"):
        servers.ComparedServer("llamacpp", tmp_path, longest=64, venv=tmp_path, log=tmp_path / "log")
