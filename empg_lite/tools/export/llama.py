"""llama.cpp, by whichever of its two Python packages is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from empg_lite.core.errors import CheckFailed

#: A prompt and a completion, as tokens.
Row = tuple[Sequence[int], Sequence[int]]
#: llama-cpp-python computes the positions of a row together, but pip compiles it; the other comes compiled.
PACKAGES = ("llama_cpp", "xllamacpp")


def installed_package() -> str | None:
    """The one to use, if there is one."""
    return next((name for name in PACKAGES if importlib.util.find_spec(name) is not None), None)


def llama_choices(file: Path, rows: Sequence[Row], on_done: Callable[[int], None]) -> Tensor:
    """llama.cpp's most likely token at each position of the completions, ``(n,)``.

    Args:
        on_done: is told of every position.

    Raises:
        CheckFailed: it cannot load the file.
    """
    ask = _ask_library if installed_package() == "llama_cpp" else _ask_server
    chosen = []
    for token in ask(file, rows, max(len(p) + len(c) for p, c in rows) + 8):
        chosen.append(token)
        on_done(1)
    return torch.tensor(chosen)


def _ask_library(file: Path, rows: Sequence[Row], room: int) -> Iterator[int]:
    from llama_cpp import Llama

    size = {"n_ctx": room, "n_batch": room}
    try:
        model = Llama(str(file), **size, logits_all=True, n_gpu_layers=0, verbose=False)
    except ValueError as error:
        raise _cannot_load(file, error) from error
    for prompt, completion in rows:
        model.reset()
        model.eval([*prompt, *completion])
        start = len(prompt) - 1
        yield from model.scores[start : start + len(completion)].argmax(-1).tolist()
    model.close()


def _ask_server(file: Path, rows: Sequence[Row], room: int) -> Iterator[int]:
    """One token at a time: llama.cpp's server tells what follows a text, and keeps what it has computed."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = str(file), room, 1, 0
    settings.warmup, settings.verbosity = False, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    try:
        server = xllamacpp.Server(settings)
    except RuntimeError as error:
        raise _cannot_load(file, error) from error
    for prompt, completion in rows:
        for known in range(len(completion)):
            asked = {
                "prompt": [*prompt, *completion[:known]],
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": 1,
            }
            said = server.handle_completions(asked)
            said = json.loads(said) if isinstance(said, str) else said
            yield said["choices"][0]["logprobs"]["content"][0]["id"]


def _cannot_load(file: Path, error: Exception) -> CheckFailed:
    return CheckFailed(f"llama.cpp cannot load it ({error}); nothing was written", file.name)
