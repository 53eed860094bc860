"""Finding a model by name: a local directory, or a repository of the Hugging Face hub, which is fetched.

Every process of a run calls `find_model` (and `snapshot` for data sets). Each host fetches into its own
cache, and huggingface_hub's file locks keep the processes of a host apart: one fetches a file, the others
wait for it. Without a revision each host asks for the branch `main`, which can move in between; a commit
(`Org/Name@COMMIT`) cannot.

Only the files named below are fetched: neither pickle weights, which can run code when they are read, nor a
repository's own code.
"""

import os
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fr3e_jax.config import QUICKSTART_MODEL, ConfigError

DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
)
RUN_SETTINGS = "config.yaml"  # in a run directory
FINAL_MODEL = "model"  # the directory of the final model, in a run directory
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")

RepositoryKind = Literal["model", "dataset"]
CALLED = {"model": "model", "dataset": "data set"}
LOCAL = {"model": "a directory", "dataset": "a file"}

NO_NAME = (
    "is not a directory; give a Hugging Face model directory, a name of the hub (Org/Name or "
    "Org/Name@REVISION) or `quickstart`"
)
LOG_IN = "`hf auth login` or set HF_TOKEN"


def find_model(name: str, weights: bool = True) -> Path:
    """The directory of a model by the name that a user gives.

    Args:
      name: `quickstart`, a directory, or `Org/Name` or `Org/Name@REVISION` of the hub (a branch, tag or
        commit). A directory that exists is never looked up on the hub; a run's stands for the model that the
        run ended with.
      weights: whether the weights are needed; without, only configuration and tokenizer are fetched.

    Returns:
      The directory; that of a fetched model lies in the hub's cache.

    Raises:
      ConfigError: there is no such model, or it cannot be fetched; the message, one line, says what to do.
    """
    if (directory := local_model(name)) is not None:
        if (directory / RUN_SETTINGS).exists() and not (directory / "config.json").exists():
            raise ConfigError(
                f"{name} is a run that has not ended, so that there is no {FINAL_MODEL}/ in it; start it "
                "again to its end, or name what `python -m fr3e_jax.export --run "
                f"{name} --out DIR` writes of its last checkpoint"
            )
        return directory
    repository, at, revision = name.partition("@")
    if os.path.exists(os.path.expanduser(name)) or repository.count("/") != 1 or (at and not revision):
        raise ConfigError(f"model {name!r} {NO_NAME}")
    return fetch_model(name, repository, revision or constants.DEFAULT_REVISION, weights)


def local_model(name: str) -> Path | None:
    """The directory of a model on this machine; None if the name is one of the hub, or of no model.

    Of the directory of a run it is that of its final model, if it is there.
    """
    if name == "quickstart":
        return QUICKSTART_MODEL
    directory = os.path.expanduser(name)
    # os.path, since Path raises on names that no file can have.
    if not os.path.isdir(directory):
        return None
    final = Path(directory, FINAL_MODEL)
    ended = Path(directory, RUN_SETTINGS).exists() and (final / "config.json").exists()
    return final if ended else Path(directory)


def pinned(name: str, source: Path) -> str:
    """The name of a model with the commit of `source`, the snapshot that `find_model` returned for it."""
    if local_model(name) is not None:
        return name
    return f"{name.partition('@')[0]}@{source.name}"


def fetch_model(name: str, repository: str, revision: str, weights: bool) -> Path:
    """Fetch the files of a model that are not in the cache yet.

    Args:
      name: of the model as the user gave it, for messages.
      repository: Org/Name.
      revision: a branch, tag or commit.
      weights: whether to fetch the weights too.

    Returns:
      The snapshot's directory in the cache.

    Raises:
      ConfigError: the files cannot be fetched, or the repository has no safetensors.
    """
    files = [*DESCRIPTION_FILES, *(WEIGHT_FILES if weights else ())]
    # "*" also matches "/": folders hold the same weights for other programs.
    folder = snapshot(name, repository, revision, kind="model", files=files, but="*/*")
    if weights and not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model {name!r} {no_weights(repository, revision, folder.name)}")
    return folder


def snapshot(
    name: str, repository: str, revision: str, kind: RepositoryKind, files: list[str], but: str | list[str]
) -> Path:
    """Fetch files of a repository that are not in the cache yet.

    Args:
      name: as the user gave it, for messages.
      repository: Org/Name.
      revision: a branch, tag or commit.
      kind: of the repository.
      files: patterns of the files.
      but: patterns of files to leave out.

    Returns:
      The snapshot's directory in the cache, named after its commit.

    Raises:
      ConfigError: the files cannot be fetched.
    """
    try:
        folder = snapshot_download(
            repository,
            repo_type=kind,
            revision=revision,
            allow_patterns=files,
            ignore_patterns=but,
            # Offline implies it, but unless it is said, a commit's partial snapshot is not called partial.
            local_files_only=constants.HF_HUB_OFFLINE,
        )
    # The library lets exceptions of HTTP, TLS, proxies and the disk through.
    except Exception as error:
        message = f"{CALLED[kind]} {name!r} {reason(error, repository, revision, kind)}"
        raise ConfigError(" ".join(message.split())) from error
    return Path(folder)


def reason(error: Exception, repository: str, revision: str, kind: RepositoryKind) -> str:
    """Why a repository cannot be fetched, and what to do about it; the end of a sentence."""
    hub, cache, local = constants.ENDPOINT, constants.HF_HUB_CACHE, LOCAL[kind]
    page = f"{hub}/{'datasets/' if kind == 'dataset' else ''}{repository}"
    if isinstance(error, HFValidationError):  # such as ./model or ~/model
        return NO_NAME if kind == "model" else "is neither a file nor a name that the hub could have"
    if isinstance(error, GatedRepoError):  # before RepositoryNotFoundError, of which it is one
        return f"is gated; ask for access at {page}, then {LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"is neither {local} nor found at {hub}; check the name, or, if it is private, {LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision!r}; give a branch, tag or commit of {page}"
    if isinstance(error, IncompleteSnapshotError):
        return f"is only partly in the cache {cache}; {advice(repository, revision, kind)} ({error})"
    if isinstance(error, LocalEntryNotFoundError):
        cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
        return f"is neither {local} nor in the cache {cache}; {advice(repository, revision, kind)}{cause}"
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return f"was refused to the token in use; {LOG_IN} ({error})"
    return f"could not be fetched from {hub} ({type(error).__name__}: {error})"


def no_weights(repository: str, revision: str, commit: str) -> str:
    """Why a snapshot holds no weights, and what to do about it; the end of a sentence.

    Either the repository has none, or they were never fetched.
    """
    try:
        # Not the listing of the tree, which is tried again for half a minute without a network.
        files = [file.rfilename for file in HfApi().model_info(repository, revision=commit).siblings or ()]
        absent = not any(file.endswith(".safetensors") and "/" not in file for file in files)
    except Exception:  # the cache may hold what another program fetched, for example a tokenizer
        absent = False
    if absent:
        return (
            "has no safetensors weights in its repository, and pickle files are not read because they can "
            "run code; give a repository with safetensors"
        )
    return f"has no weights in the cache {constants.HF_HUB_CACHE}; {advice(repository, revision, 'model')}"


def advice(repository: str, revision: str, kind: RepositoryKind) -> str:
    """What to do if the hub cannot be reached."""
    option = "" if kind == "model" else " --repo-type dataset"
    option += "" if revision == constants.DEFAULT_REVISION else f" --revision {revision}"
    download = f"run `hf download {repository}{option}` where there is a network"
    if constants.HF_HUB_OFFLINE:
        return f"unset HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE), or {download}"
    return f"{constants.ENDPOINT} gave no usable answer: check the network, or {download}"
