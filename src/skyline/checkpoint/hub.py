"""From what the user calls a model to a local folder: a path as it is, or a Hugging Face hub id, downloaded once.

A GGUF file becomes a folder of the same form, which refers to it.

Only configuration, tokenizer and safetensors files are fetched. Code of a repository is neither downloaded nor run, and
pickle files are refused, because loading one runs whatever it contains.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from skyline.checkpoint.errors import CheckpointError

CONFIG_PATTERNS = [
    "config.json",
    "hf_quant_config.json",  # ModelOpt's own
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
]
WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors.index.json"]
# Subfolders hold other formats and adapters; consolidated* is Mistral's second copy of the same weights.
IGNORE_PATTERNS = ["*/*", "consolidated*"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?")
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_ELSEWHERE = "or download it on another machine and pass the folder instead"


def resolve(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the absolute path of the folder that holds `model`, downloading it if necessary.

    `model` is a local folder, a hub id ("Qwen/Qwen3-0.6B"), or a hub id with a revision, which is a branch, tag or
    commit hash ("Qwen/Qwen3-0.6B@main"). Downloads show huggingface_hub's progress bars and use its cache (HF_HOME) and
    its token (HF_TOKEN); with HF_HUB_OFFLINE=1 only the cache is looked at. With `weights` False they
    are not downloaded, for questions that the configuration answers. Raises CheckpointError saying what to do.
    """
    folder = Path(os.path.expanduser(model))
    # os.path answers False where Path raises: names that are too long, or no names at all.
    if model and os.path.isdir(folder):
        if revision is not None:
            raise CheckpointError(f"{model} is a local folder and has no revisions; leave out {revision!r}")
        if weights:
            refuse_pickle(folder)
        return folder.resolve()
    if folder.suffix == ".gguf" and os.path.isfile(folder):
        from skyline.checkpoint.gguf import materialize  # needs numpy, which no other kind of model does here

        if revision is not None:
            raise CheckpointError(f"{model} is a local file and has no revisions; leave out {revision!r}")
        return materialize(folder)
    if os.path.isfile(folder):
        raise CheckpointError(
            f"{model} is a file; pass the folder that holds config.json and *.safetensors, or a .gguf file"
        )
    repository, _, pinned = model.partition("@")
    if not _HUB_ID.fullmatch(repository) or ".." in repository or (pinned == "" and "@" in model):
        raise CheckpointError(
            f"there is no folder {model!r}, and it is not a Hugging Face hub id (owner/name or owner/name@revision)"
        )
    if pinned and revision is not None and pinned != revision:
        raise CheckpointError(f"{model} names the revision {pinned!r}, but {revision!r} was asked for; give only one")
    snapshot = _download(repository, pinned or revision, CONFIG_PATTERNS + WEIGHT_PATTERNS * weights)
    if weights and not any(snapshot.glob("*.safetensors")):
        raise CheckpointError(
            f"{repository} holds no *.safetensors weights; convert it (transformers: "
            "save_pretrained) and pass the resulting folder, or choose another repository of this model"
        )
    return snapshot


def refuse_pickle(folder: Path) -> None:
    """Raise CheckpointError if the folder's weights are pickle files (*.bin, *.pt, *.pth, ...) and nothing else."""
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickle weights ({pickles[0]}), which are refused because loading them can run "
            "arbitrary code; convert them to safetensors (transformers: from_pretrained, then save_pretrained)"
        )


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    # Imported here because it takes longer than everything else in this folder, and local folders do not need it.
    from huggingface_hub import constants, errors, snapshot_download

    try:
        path = snapshot_download(
            repository, revision=revision, allow_patterns=patterns, ignore_patterns=IGNORE_PATTERNS
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repository} is gated: accept its terms on https://huggingface.co/{repository} and set HF_TOKEN to a "
            f"token of that account, {_ELSEWHERE}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} has no revision {revision!r}; name a branch, tag or commit") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {repository!r}, and no such repository on the Hugging Face hub; check the spelling, "
            "or set HF_TOKEN if it is private"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repository!r} is not a valid hub id: {error}") from error
    except Exception as error:  # which HTTP library can fail here depends on huggingface_hub's version
        wanted = repository if revision is None else f"{repository} at revision {revision!r}"
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(
                f"{wanted} is neither a folder nor complete in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE "
                f"forbids downloading; unset it, {_ELSEWHERE}"
            ) from error
        raise CheckpointError(
            f"there is no folder {wanted!r}, and it could not be downloaded from the Hugging Face hub ({error}); check "
            f"the network and the free disk space, {_ELSEWHERE}"
        ) from error
    return Path(path).resolve()
