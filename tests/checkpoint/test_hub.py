"""Where a model is found: folder, hub cache, download; every failure says what to do. No network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from skyline.checkpoint import CheckpointError, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("model") == tmp_path / "model" == resolve(str(tmp_path / "model"))
    with pytest.raises(CheckpointError, match="no revisions"):
        resolve("model", revision="main")


@pytest.mark.parametrize(
    "model", ["./nope", "/nope/nope", "../a/b", "a/b/c", "~/nope", "", "a b", "owner/name@", "a/..b"]
)
def test_neither_folder_nor_hub_id(model: str) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        resolve(model)


def test_file_instead_of_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match="is a file; pass the folder"):
        resolve(str(path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_only_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"only pickle weights .* convert them to safetensors"):
        resolve(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert resolve(str(tmp_path)) == tmp_path


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of snapshot_download, which "downloads" one safetensors file."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        calls.append({"repository": repository, **options})
        if repository != "owner/pickles":
            (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_download_pins_the_revision_and_fetches_no_code(downloads: list[dict[str, Any]], tmp_path: Path) -> None:
    assert resolve("owner/name") == tmp_path
    resolve("owner/name", revision="v1")
    resolve("owner/name@v2")
    resolve("owner/name@v2", revision="v2")
    assert [call["revision"] for call in downloads] == [None, "v1", "v2", "v2"]
    with pytest.raises(CheckpointError, match="give only one"):
        resolve("owner/name@v2", revision="v3")
    options = downloads[0]
    wanted = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    wanted += ["model-00001-of-2.safetensors", "model.safetensors.index.json"]
    others = ["modeling.py", "pytorch_model.bin", "model.pt", "x.gguf"]
    others += ["consolidated.safetensors", "original/model.safetensors"]
    kept = huggingface_hub.utils.filter_repo_objects(
        [*wanted, *others], allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
    )
    assert list(kept) == wanted


def test_configuration_alone_needs_no_weights(downloads: list[dict[str, Any]]) -> None:
    resolve("owner/pickles", weights=False)
    assert "config.json" in downloads[0]["allow_patterns"]
    assert not any("safetensors" in pattern for pattern in downloads[0]["allow_patterns"])


def test_repository_without_safetensors(downloads: list[dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError, match=r"owner/pickles holds no \*.safetensors weights; convert"):
        resolve("owner/pickles")


def http_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    http = sys.modules[errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]
    response = http.Response(404, request=http.Request("GET", "https://huggingface.co/owner/name"))
    return kind("404 Client Error", response=response)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, r"gated: accept its terms on https://huggingface.co/owner/name and set HF_TOKEN"),
        (errors.RepositoryNotFoundError, r"no such repository.*check the spelling, or set HF_TOKEN"),
        (errors.RevisionNotFoundError, r"has no revision 'v1'; name a branch, tag or commit"),
        (
            errors.HfHubHTTPError,
            r"could not be downloaded.*404.*check the network.*another machine and pass the folder",
        ),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, kind: type[errors.HfHubHTTPError], message: str) -> None:
    check_failure(monkeypatch, http_error(kind), message)


@pytest.mark.parametrize(
    "error",
    [
        errors.LocalEntryNotFoundError("no connection"),
        ConnectionError("no connection"),
        OSError(28, "No space left on device"),
    ],
)
def test_network_and_disk_errors(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    check_failure(monkeypatch, error, "could not be downloaded.*check the network and the free disk space")


def check_failure(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve("owner/name", revision="v1")
    assert caught.value.__cause__ is error


def test_offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    assert resolve("owner/name") == snapshot == resolve(f"owner/name@{COMMIT}") == resolve("owner/name", "main")
    with pytest.raises(CheckpointError, match=r"owner/other is neither a folder.*HF_HUB_OFFLINE.*unset it"):
        resolve("owner/other")
    with pytest.raises(CheckpointError, match=r"owner/name at revision 'v9' is neither"):
        resolve("owner/name@v9")


def test_the_package_imports_no_torch() -> None:
    code = "import sys, skyline.checkpoint; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
