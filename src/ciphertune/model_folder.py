"""Where a base model lies, decided in one place and without torch: the package's own, a folder, or an id of the hub."""

from __future__ import annotations

from pathlib import Path

from ciphertune.errors import ModelError

# At least one of these is in every folder that AutoTokenizer can read.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "tekken.json")
_EMBEDDED = Path(__file__).resolve().parent / "assets" / "base"


def resolve(name: str) -> str:
    """Where the model `name` is: the folder of the embedded model, an existing folder, or the hub id unchanged.

    Raises ModelError when the name is empty, or is a path at which there is no model folder.
    """
    if not name:
        raise ModelError("model.name is empty: give a folder, a hub id, or 'embedded'")
    folder = _EMBEDDED if name == "embedded" else Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.name={name!r} has no config.json: give the folder of a transformers model")
        return str(folder)
    if name == "embedded":
        raise ModelError(f"the embedded model is missing from this installation ({folder}): install the package anew")
    if folder.exists():
        raise ModelError(f"model.name={name!r} is a file: give the folder that holds the model")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelError(
            f"model.name={name!r} does not exist on this machine: copy the model there, or give a hub id or 'embedded'"
        )
    return name
