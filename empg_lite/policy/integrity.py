"""Is this really the model it says it is? Asked before anything is trained on it.

The libraries below are forgiving: a checkpoint that lacks a tensor is filled with random numbers and a
printed note, a folder without tokenizer files gives a tokenizer that encodes any text to nothing, and a
custom vocabulary is split by the wrong pre-tokenizer. Each of those trains happily, on noise.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

from empg_lite.core.bundled import BUNDLED, model_path
from empg_lite.core.errors import MissingInput, ModelUnusable

SUPPORTED = ("qwen2",)
_PROBES = (
    "What is 17 + 25?\nStep 1: 17 + 25 = 42. #### 42",
    "Zoë paid €3.50 — half of 7½ · \\boxed{\\frac{1}{2}}",
)
_MAX_HEADER = 100 << 20
_FETCH_AGAIN = "fetch the model again (`hf download NAME --force-download`)"
#: Seconds that the hub may take to say which commit a model is at; then the cache alone is asked.
PATIENCE = 8


def resolve_model(name: str, revision: str | None, *, weights: bool = True) -> tuple[Path, str | None]:
    """The folder a model lies in, fetched from the hub once where it is not local.

    Args:
        weights: False fetches configuration and tokenizer only.

    Returns:
        The folder, and the commit it is at (None for a local folder).

    Raises:
        MissingInput: not a folder, and not to be had from the hub (or only in part, offline).
    """
    if name in BUNDLED:
        return model_path(name), None
    if Path(name).is_dir():
        return Path(name), None
    from httpx import HTTPError
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["*.json", "merges.txt", "*.jinja"] + (["*.safetensors"] if weights else [])
    todo = f"check the name; fetch it where there is a network, `hf download {name}`; or name a local folder"
    try:
        try:  # snapshot_download itself waits without end for a network that takes and never answers
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
    """Read ``config.json`` and refuse architectures this package has no tests for.

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
    if model_type not in SUPPORTED:
        raise ModelUnusable(
            f"model type {model_type!r} is not supported",
            str(path),
            "tested: Qwen2.5 base and Instruct (qwen2)",
        )
    if config.get("auto_map"):
        raise ModelUnusable(
            "the model needs code of its own from its repository (auto_map), which never runs here",
            str(path),
            "use a model without",
        )
    return config


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a safetensors file, from its first bytes."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER, os.path.getsize(path)):
                raise ValueError(f"header of {length} bytes")
            header = json.loads(file.read(length))
        end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        if 8 + length + end != os.path.getsize(path):
            raise ValueError(f"{os.path.getsize(path)} bytes, header says {8 + length + end}")
        return {k: tuple(v["shape"]) for k, v in header.items() if k != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise ModelUnusable(f"damaged safetensors file ({error})", str(path), _FETCH_AGAIN) from error


def fingerprint(folder: Path) -> str:
    """SHA-256 over each weights file's size, header, and 64 KB at each of 16 places.

    Reading all of a 7B model would take half a minute.
    """
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = min(int.from_bytes(file.read(8), "little"), _MAX_HEADER)
            found.update(f"{path.name} {size}".encode() + file.read(length))
            for place in range(16):
                file.seek(size * place // 16)
                found.update(file.read(1 << 16))
    return found.hexdigest()


def check_weights(folder: Path) -> None:
    """Every tensor of the architecture is in the files with its shape.

    Raises:
        MissingInput: no safetensors files, or not all that the index names.
        ModelUnusable: naming a tensor that is missing or has another shape.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise MissingInput("no *.safetensors weights (pickle files are not read)", str(folder))
    for shard in _shards(folder):
        if not (folder / shard).is_file():
            raise MissingInput(f"the weights' file {shard} is not there", str(folder), _FETCH_AGAIN)
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        found |= _header(file)
    quantised = any(name.endswith(".weight.absmax") for name in found)
    for name, shape in _expected_shapes(folder).items():
        if name not in found:
            raise ModelUnusable(f"weights lack the tensor {name}", str(folder), _FETCH_AGAIN)
        if not quantised and found[name] != shape:
            what = f"tensor {name} has shape {found[name]}, config.json says {shape}"
            raise ModelUnusable(what, str(folder))


def _shards(folder: Path) -> list[str]:
    """The files that the index of a model in several files names; none where there is no index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        return sorted({str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelUnusable(f"the index cannot be read ({error})", str(index), _FETCH_AGAIN) from error


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
    """The tokenizer splits as its file says, gives the text back, and fits the model's vocabulary.

    Raises:
        ModelUnusable: naming what differs.
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
                f"tokenizer does not give {text[:16]!r} back",
                where,
                "its files are missing or do not belong together",
            )
        if reference is not None and reference.encode(text, add_special_tokens=False).ids != ids:
            raise ModelUnusable("tokenizer splits differently from its tokenizer.json", where)
