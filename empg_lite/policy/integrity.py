"""Checks that a model folder is complete and consistent, before anything is trained on it.

The libraries are forgiving: a missing tensor is filled with random numbers and a printed note, under NF4 a
wrong shape passes silently, a folder without tokenizer files gives a tokenizer that encodes any text to
nothing, and a custom vocabulary is split by the wrong pre-tokenizer. All of those would train on noise.
Loading reports of transformers (``output_loading_info``) do not replace the checks: they miss shapes under
NF4, and Unsloth has none.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from empg_lite.core.bundled import BUNDLED, PACKAGED, model_path, unpacked_model
from empg_lite.core.errors import MissingInput, ModelUnusable
from empg_lite.policy.families import FAMILIES, unsupported

_PROBES = (
    "What is 17 + 25?\nStep 1: 17 + 25 = 42. #### 42",
    "Zoë paid €3.50 — half of 7½ · \\boxed{\\frac{1}{2}}",
)
_MAX_HEADER = 100 << 20
_FETCH_AGAIN = "download the model again (`hf download NAME --force-download`)"
#: Seconds to wait for the hub's answer about a model's commit; after that only the cache is used.
PATIENCE = 8


def resolve_model(name: str, revision: str | None, *, weights: bool = True) -> tuple[Path, str | None]:
    """The folder of a model, downloaded from the hub once if it is not local.

    A packaged model is local once ``run/unpack.py`` has unpacked it.

    Args:
        weights: False fetches configuration and tokenizer only.

    Returns:
        The folder and its commit (None for a local folder).

    Raises:
        MissingInput: not a folder, and not available from the hub (or incomplete, offline).
    """
    if name in BUNDLED:
        return model_path(name), None
    todo = f"check the name; with a network run `hf download {name}`; or give a local folder"
    if (packaged := PACKAGED.get(name)) is not None:
        if not revision and (unpacked := unpacked_model(name)) is not None:
            return unpacked, None
        name, todo = packaged.hub, packaged.todo
    if Path(name).is_dir():
        return Path(name), None
    from httpx import HTTPError
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["*.json", "merges.txt", "*.jinja"] + (["*.safetensors"] if weights else [])
    try:
        try:  # snapshot_download has no timeout of its own for a network that never answers
            revision, cached = HfApi().model_info(name, revision=revision, timeout=PATIENCE).sha, False
        except (ConnectionError, HTTPError):
            cached = True
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=cached)
        )
    except HFValidationError as error:
        raise MissingInput(f"no model folder or hub name {name!r}", "model.name", todo) from error
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        raise MissingInput(f"model {name!r} cannot be fetched", "model.name", todo) from error
    return folder, folder.name


def check_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` and reject untested architectures.

    Raises:
        MissingInput: there is none.
        ModelUnusable: unreadable, or another architecture.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise MissingInput(
            "no config.json: not a model folder", str(folder), "give a folder with model files"
        )
    try:
        config = json.loads(path.read_text("utf-8"))
        model_type = config.get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelUnusable(f"config.json is not JSON ({error})", str(path)) from error
    tested = "tested: " + ", ".join(f"{family.models} ({name})" for name, family in FAMILIES.items())
    if model_type not in FAMILIES:
        raise ModelUnusable(f"model type {model_type!r} is not supported", str(path), tested)
    if config.get("auto_map"):
        raise ModelUnusable(
            "the model needs remote code (auto_map), which is never run",
            str(path),
            "use a model without remote code",
        )
    if (beyond := unsupported(config)) is not None:
        raise ModelUnusable(f"{model_type} with {beyond} is not supported", str(path), tested)
    return config


def fingerprint(folder: Path) -> str:
    """SHA-256 over each weight file's size, header, and 64 KB at each of 16 offsets.

    Reading all of a 7B model would take half a minute.
    """
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = min(int.from_bytes(file.read(8), "little"), _MAX_HEADER)
            found.update(f"{path.name} {size}".encode() + file.read(length))
            for part in range(16):
                file.seek(size * part // 16)
                found.update(file.read(1 << 16))
    return found.hexdigest()


def check_weights(folder: Path) -> None:
    """Check that the files hold every tensor of the architecture with its shape.

    Raises:
        MissingInput: no safetensors files, or not all that the index names.
        ModelUnusable: names a tensor that is missing or has another shape.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise MissingInput("no *.safetensors weights (pickle files are not read)", str(folder))
    for shard in _shards(folder):
        if not (folder / shard).is_file():
            raise MissingInput(f"weight file {shard} is missing", str(folder), _FETCH_AGAIN)
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        found |= _shapes(file)
    quantized = any(name.endswith(".weight.absmax") for name in found)
    for name, shape in _expected_shapes(folder).items():
        if name not in found:
            raise ModelUnusable(f"tensor {name} is missing from the weights", str(folder), _FETCH_AGAIN)
        if not quantized and found[name] != shape:
            what = f"tensor {name} has shape {found[name]}, config.json says {shape}"
            raise ModelUnusable(what, str(folder))


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor shapes by name, from a safetensors header, which the library checks against the file size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ModelUnusable(f"damaged safetensors file ({error})", str(path), _FETCH_AGAIN) from error


def _shards(folder: Path) -> list[str]:
    """The files that the index of a sharded model names; none without an index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        return sorted({str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelUnusable(f"index cannot be read ({error})", str(index), _FETCH_AGAIN) from error


def _expected_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def check_tokenizer(tokenizer: Any, folder: Path, vocab_size: int) -> None:
    """Check that the tokenizer splits as its file says, round-trips text, and fits the model's vocabulary.

    Raises:
        ModelUnusable: names the difference.
    """
    where = str(folder)
    if len(tokenizer) > vocab_size:
        raise ModelUnusable(f"tokenizer has {len(tokenizer)} tokens, the model only {vocab_size}", where)
    file = folder / "tokenizer.json"
    reference = None
    if file.is_file():
        from tokenizers import Tokenizer

        reference = Tokenizer.from_file(str(file))
    for text in _PROBES:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.decode(ids) != text:
            raise ModelUnusable(
                f"tokenizer does not round-trip {text[:16]!r}",
                where,
                "its files are missing or do not belong together",
            )
        if reference is not None and reference.encode(text, add_special_tokens=False).ids != ids:
            raise ModelUnusable("tokenizer splits text differently from its tokenizer.json", where)
