# SPDX-License-Identifier: Apache-2.0
"""GGUF files as model folders: by path and by folder, from every command, and when something is wrong."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert import load
from convert.files import hub
from convert.gguf import folder as folders
from convert.gguf.folder import WEIGHTS
from convert.plan import DECODED
from jaxserve import cli
from jaxserve.cli import preflight
from jaxserve.config import EngineConfig
from jaxserve.errors import CheckpointError
from jaxserve.frontend.prepare import tokenizer_of
from jaxserve.llm import LLM
from jaxserve.models import param_layout, registry
from jaxserve.types.sampling_params import SamplingParams
from tests.convert.gguf import tokens
from tests.convert.gguf.crafted import blob, tensor
from tests.convert.gguf.test_models import PAIRS, write
from tests.golden import as_gguf
from tests.golden import load as golden
from tests.golden.load import TOKENIZERS
from tests.quant import unpackers
from tests.tiny_llm import OPTIONS

CASE = "llama-gqa-tied"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    place = tmp_path / "models"
    place.mkdir()

    def tokenizer(writer: gguf.GGUFWriter) -> None:
        pairs = tokens.pairs_of(TOKENIZERS / "byte-level")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(pairs["tokenizer.ggml.tokens"])
        writer.add_token_types(pairs["tokenizer.ggml.token_type"])
        writer.add_token_merges(pairs["tokenizer.ggml.merges"])
        writer.add_bos_token_id(pairs["tokenizer.ggml.bos_token_id"])
        writer.add_eos_token_id(pairs["tokenizer.ggml.eos_token_id"])

    return write(CASE, place / "model.gguf", tokenizer=tokenizer)


def test_a_file_and_its_folder_are_one_model(file: Path, cache: Path) -> None:
    folder = hub.fetch(str(file))
    assert folder == hub.fetch(str(file.parent)) == folders.resolved(file) == folders.resolved(file.parent)
    assert folder.parent == cache and (folder / WEIGHTS).resolve() == file.resolve()
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS}
    assert {each.name for each in folder.iterdir()} == names
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [421, 424]
    assert folders.resolved(folder) == folder  # a model folder like any other


def test_it_is_made_once_for_each_file(file: Path, cache: Path) -> None:
    folder = hub.fetch(str(file))
    times = {each: each.lstat().st_mtime_ns for each in folder.iterdir()}
    assert hub.fetch(str(file)) == folder
    assert {each: each.lstat().st_mtime_ns for each in folder.iterdir()} == times
    other = str(shutil.copy(file, file.with_name("other.gguf")))
    assert hub.fetch(other) != folder and len(list(cache.iterdir())) == 2
    file.unlink()
    os.utime(other, ns=(1, 1))
    changed = hub.fetch(other)
    assert changed != folder and not folder.exists()  # with the next one, those of files that are gone are removed


def test_names_that_are_no_model(file: Path, tmp_path: Path) -> None:
    def refused(name: Path | str, *parts: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            hub.fetch(str(name))
        assert all(part in str(caught.value) for part in parts), caught.value

    refused("absent.gguf", "file 'absent.gguf' does not exist")
    shutil.copy(file, file.with_name("b.gguf"))
    refused(file.parent, "has several GGUF files: b.gguf, model.gguf", "name one of them")
    refused(tmp_path, "has no config.json", "a .gguf file")
    (tmp_path / "x.txt").write_text("")
    refused(tmp_path / "x.txt", "is a file, not a model folder", "a .gguf file")
    with pytest.raises(CheckpointError, match="has no revisions"):
        hub.fetch(str(file), revision="main")


def test_a_cache_that_cannot_be_written(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"cannot write .*; set XDG_CACHE_HOME"):
        hub.fetch(str(file))


def test_checks_before_a_start(file: Path) -> None:
    preflight.check_model(EngineConfig(model=str(file)))
    preflight.check_model(EngineConfig(model=str(file.parent), num_blocks=8))
    broken = file.with_name("broken.gguf")
    broken.write_bytes(file.read_bytes()[:-4000])
    with pytest.raises(CheckpointError, match=r"broken.gguf: tensor .* is truncated"):
        preflight.check_model(EngineConfig(model=str(broken)))


def test_a_tokenizer_that_cannot_be_built(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    embedding = tensor("token_embd.weight", [8, 16], 0, 0)
    pairs = PAIRS | tokens.pairs_of(TOKENIZERS / "byte-level", pre="new-one")
    file.write_bytes(blob(pairs, [embedding], bytes(512)))
    with pytest.raises(CheckpointError, match=r"unknown pre-tokenizer 'new-one'.*--tokenizer"):
        preflight.check_model(EngineConfig(model=str(file)))
    preflight.check_model(EngineConfig(model=str(file), tokenizer=str(TOKENIZERS / "byte-level")))
    preflight.check_model(EngineConfig(model=str(file), skip_tokenizer_init=True))


@pytest.mark.parametrize("of", [lambda file: file, lambda file: file.parent], ids=["file", "folder"])
def test_the_tokenizer_is_that_of_the_file(file: Path, of: Callable[[Path], Path]) -> None:
    found = tokenizer_of(EngineConfig(model=str(of(file))), loads_model=True)
    assert found is not None and found.encode("The model")[:1] == [420]


def test_commands(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(file)]) == 0
    assert "blk.0.attn_q.weight" in capsys.readouterr().out
    assert cli.main(["check", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["architecture"] == "LlamaForCausalLM" and said["stored_dtype"] == "float32"
    assert cli.main(["convert", str(file), str(tmp_path / "made")]) == 0
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {
        each.name for each in (tmp_path / "made").iterdir()
    }
    wanted, found = (load.load_model(each, dtype="float32")[1] for each in (file, tmp_path / "made"))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), wanted, found))


def test_greedy_text_is_that_of_transformers(file: Path) -> None:
    want = golden.read(CASE)
    options = {name: value for name, value in OPTIONS.items() if name != "spec"}
    llm = LLM(str(file), dtype="float32", skip_tokenizer_init=True, generation_config="vllm", **options)
    params = SamplingParams(temperature=0, max_tokens=len(want.greedy), ignore_eos=True)
    [output] = llm.generate([list(want.greedy_prompt)], params)
    assert tuple(output.outputs[0].token_ids) == want.greedy


def test_weights_are_quantized_while_they_are_decoded(file: Path, tmp_path: Path) -> None:
    def loaded(folder: Path) -> list[jax.Array]:
        plan = load.open_model(folder).in_dtype("float32").quantized("int8")
        return jax.tree.leaves(load.read(plan))

    pairs = zip(loaded(folders.of(file)), loaded(golden.write_checkpoint(CASE, tmp_path / "plain")), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


def test_a_quantized_checkpoint_is_made_of_it(file: Path, tmp_path: Path) -> None:
    sources = {"gguf": file, "plain": golden.write_checkpoint(CASE, tmp_path / "source")}
    for name, source in sources.items():
        assert cli.main(["convert", str(source), str(tmp_path / name), "--quantize", "int4", "--dtype", "float32"]) == 0
    found, wanted = (unpackers.plain(tmp_path / name) for name in sources)
    assert found.keys() == wanted.keys() and len(found) > 15
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_large_tensors_are_decoded_in_parts(tmp_path: Path) -> None:
    config = {**registry.as_config(golden.config(CASE))._hf.to_dict(), "vocab_size": 3 * DECODED // 64}
    want = golden.read(CASE)
    tensors = {name: want.tensor(name) for name in want.tensors}
    name = "model.embed_tokens.weight"
    tensors[name] = np.random.default_rng(0).normal(size=(config["vocab_size"], 64)).astype(np.float32)
    file = as_gguf.write(
        tmp_path / "a.gguf", config, tensors, chooses=lambda name, values: "Q8_0" if "embd" in name else "F32"
    )
    plan = load.open_model(folders.of(file))
    into = np.empty_like(tensors[name])
    copies = list(plan.copies(("embed", "weight"), into, into.shape))
    assert len(copies) == 3 and sum(copy.info.stop - copy.info.start for copy in copies) == into.size // 32 * 34
    found = load.read(plan.in_dtype(jnp.float32))["embed"]["weight"]
    assert np.abs(found[: len(into)] - tensors[name]).max() < 0.05
    assert param_layout.count(plan.spec) == sum(values.size for values in tensors.values())


SAMPLE = blob(
    PAIRS | tokens.pairs_of(TOKENIZERS / "byte-level"), [tensor("token_embd.weight", [8, 16], 0, 0)], bytes(512)
)
AT = st.integers(0, len(SAMPLE) - 513) | st.integers(0, 700)


@given(st.lists(st.tuples(AT, st.integers(0, 255)), min_size=1, max_size=4))
def test_any_header_gives_a_folder_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(SAMPLE)
    for at, value in changes:
        data[at] = value
    place = tmp_path_factory.mktemp("mutated")
    (place / "a.gguf").write_bytes(data)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(place))
        try:
            load.open_model(folders.of(place / "a.gguf"))
        except CheckpointError as error:
            assert str(error).isprintable()
    shutil.rmtree(place)
