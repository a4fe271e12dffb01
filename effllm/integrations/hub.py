"""Uploads a packed model with a card that says what it is: base model, licence, plan and the figures that exist."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, try_to_load_from_cache
from transformers import PreTrainedModel

from effllm.checkpoint import Checkpoint
from effllm.errors import EffllmError, UsageError
from effllm.measure.result import Result, describe_run
from effllm.report.model_folder import model_card
from effllm.resume import JOURNAL


def push_to_hub(
    model: str | Path | PreTrainedModel,
    repo_id: str,
    base_model: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    **upload: Any,
) -> CommitInfo:
    """Uploads a packed folder, or a live compressed model, to the Hugging Face Hub; makes the repository if need be.

    A folder keeps its `README.md`, with the figures that `compress` measured. One without, and a live model (of which no
    tokenizer is uploaded), get a card with what can be read off the weight files: bytes and bits per weight.

    Args:
        model: a finished folder, or a model that `effllm.compress` or `from_pretrained` gave.
        repo_id: `owner/name`.
        base_model: hub id of the original, for the card; known where the model was loaded by its hub id.
        private: whether a new repository is private; the owner's default where it is not given.
        token: a token of the hub; the stored one where it is not given.
        upload: passed on to `HfApi.upload_folder` (`revision`, `commit_message`, `create_pr`, ...).

    Raises:
        UsageError: the model is not packed by effllm.
        EffllmError: the folder is unfinished, damaged or incomplete, or the hub refuses the upload.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(model, PreTrainedModel):
            if getattr(model, "quantization_method", None) != "effllm":
                raise UsageError(f"this {type(model).__name__} is not packed; call effllm.compress(model) first")
            folder, origin = Path(scratch), _origin(model)
            model.save_pretrained(folder)
        else:
            folder = origin = Path(model)
        write_card(folder, repo_id, base_model, origin)
        api = HfApi(token=token)
        settings = {"commit_message": "Upload packed model"} | upload
        try:
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(repo_id=made.repo_id, folder_path=folder, **settings)
        except Exception as error:  # those of whichever HTTP library huggingface_hub is built on
            raise EffllmError(f"cannot upload to {repo_id!r}: {' '.join(str(error).split())}") from error


def write_card(folder: Path, repo_id: str, base_model: str | None, origin: Path | None) -> None:
    """Writes `README.md` of a packed folder that has none; `origin` is the folder whose card states the licence.

    Raises:
        UsageError: the folder is not packed by effllm.
        EffllmError: it is unfinished, damaged or incomplete.
    """
    if (folder / JOURNAL).exists():
        raise EffllmError(f"{folder} is unfinished; give its compress command again, then push")
    checkpoint = Checkpoint.open(folder)
    if checkpoint.quantization.get("quant_method") != "effllm":
        raise UsageError(f"{folder} is not packed by effllm; compress it first")
    if not (folder / "README.md").exists():
        facts = describe_run(folder, model=repo_id, base_model=base_model, seconds=0.0)
        result = Result.model_validate({**facts, "command": "compress"})
        card = model_card(result.base_model, origin, result, repo_id)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _origin(model: PreTrainedModel) -> Path | None:
    """The folder that `model` was loaded from, if it is at hand."""
    path = str(model.config.name_or_path or "")
    if path and Path(path).is_dir():
        return Path(path)
    card = try_to_load_from_cache(path, "README.md") if path.count("/") == 1 else None
    return Path(card).parent if isinstance(card, str) else None
