# SPDX-License-Identifier: Apache-2.0
"""What can be known to be wrong before anything heavy is imported: port, model folder, tokenizer, certificates.

Of a model on the hub nothing is known here but whether its name is one.
"""

import re
from pathlib import Path

from jaxserve.config import ConfigError, EngineConfig
from jaxserve.errors import CheckpointError, one_line
from jaxserve.server import listening
from jaxserve.server.config import ServerConfig

# As the tokenizer's loader has them, which is not imported for it.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)


def check(engine: EngineConfig, server: ServerConfig) -> None:
    listening.tls(server)
    server.template()
    # Free now: between this and the server's own try another process may take it.
    for opened in listening.bind(server):
        opened.close()
    check_model(engine)


def check_model(engine: EngineConfig) -> None:
    """Of a folder: that it has a config of a known architecture, weights with sound headers, and a tokenizer."""
    from convert import hub

    folder = Path(engine.model).expanduser()
    if not (folder.exists() or _HUB_ID.fullmatch(engine.model)) or engine.model.startswith((".", "~")):
        hub.fetch(engine.model)  # which says what is wrong with a path
    if folder.exists():
        hub.fetch(engine.model, revision=engine.revision)  # touches no network: a folder goes before the hub
        check_weights(folder)
    check_tokenizer(engine, folder)


def check_weights(folder: Path) -> None:
    from convert import safetensors
    from jaxserve.models import hf, registry

    if (folder / "spec.json").exists():  # converted, and checked by its reader
        return
    registry.family_of(hf.read_json(folder / "config.json"))
    safetensors.read_checkpoint(folder)


def check_tokenizer(engine: EngineConfig, model: Path) -> None:
    if engine.skip_tokenizer_init:
        return
    folder = model if engine.tokenizer is None else Path(engine.tokenizer).expanduser()
    if not folder.is_dir():
        if engine.tokenizer is not None and not _HUB_ID.fullmatch(engine.tokenizer):
            raise CheckpointError(f"there is no folder {one_line(engine.tokenizer)}", "check --tokenizer")
        return
    if not any((folder / name).is_file() for name in VOCABULARIES):
        problem = f"{one_line(str(folder))} has no tokenizer: none of {', '.join(VOCABULARIES)}"
        raise ConfigError(problem, "give --tokenizer, or --skip-tokenizer-init and send prompts as token ids")
