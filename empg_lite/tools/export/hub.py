"""The adapter on the Hugging Face hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.core.bundled import is_folder
from empg_lite.core.errors import MissingInput
from empg_lite.policy.card import NAME_IT
from empg_lite.tools.export import adapter

if TYPE_CHECKING:
    from empg_lite.core.view import View
    from empg_lite.rewards import Grader
    from empg_lite.run.target import Target


def export(
    target: Target,
    out: Path,
    grader: Grader,
    view: View | None = None,
    *,
    repo: str,
    public: bool = False,
    api: Any = None,
) -> dict[str, Any]:
    """Export the adapter with its card and upload it. Nothing else is sent.

    Args:
        out: not used; the files are staged in a temporary folder.
        repo: ``owner/name``; created if it does not exist.
        public: for a repository that is created.
        api: the client; None: ``huggingface_hub.HfApi()`` with the token of ``hf auth login``.

    Returns:
        ``export`` (the repository's address), ``private``, and the figures of ``Agreement``.

    Raises:
        MissingInput: the hub cannot be reached, or refuses.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = api or HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        result = adapter.export(target, folder, grader, view)
        try:
            address = api.create_repo(repo, private=not public, exist_ok=True)
            api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message="Adapter trained with empg-lite"
            )
        except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, HTTPError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise MissingInput(
                f"upload to the hub failed ({reason})",
                repo,
                "check the name, the network and `hf auth login`",
            ) from error
    base = target.recipe.model.name
    if view and is_folder(base):
        view.warn(f"the card names no base model, because {base} is a local folder. {NAME_IT}")
    return {**result, "export": str(address), "private": not public}
