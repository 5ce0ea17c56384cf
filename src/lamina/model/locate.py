"""Where a model's files are: a local folder, or a snapshot of a repository on the Hugging Face hub."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from lamina.errors import ModelError

# What a model needs: never .bin, .pth, .gguf, or the second copy of the weights that some repositories hold.
PATTERNS = ["*.json", "model*.safetensors", "tokenizer.model", "*.jinja", "LICENSE*"]
SHOWN = 8
"""Folders that an error names."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(name: str | Path, revision: str | None = None) -> Path:
    """Finds a model's folder, downloading it from the hub when ``name`` is not a local one.

    A connection that is cut goes on within its file; a run that is cut keeps the files that were complete; what is in the
    cache is used when the hub cannot be reached. Tokens, proxies and the cache's place are those of ``huggingface_hub``
    (``HF_TOKEN``, ``HF_HOME``, …).

    Raises:
        ModelError: no such folder, repository or revision; access refused; the hub cannot be reached and the model is
            not in the cache; no room on the disk.
    """
    return local(name, revision) or download(str(name), revision)


def local(name: str | Path, revision: str | None) -> Path | None:
    """The folder, where the name is that of a local one; None for a repository on the hub.

    Raises:
        ModelError: it can be neither.
    """
    if not str(name):  # its Path would be the current folder
        raise ModelError("model: nothing is named, expected a folder or an id on the hub (owner/name)")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(f"{name}: a local folder has no revision {revision!r}; leave --revision out")
        return folder
    if folder.parent != Path() and folder.parent.is_dir():  # runs/demo-2 is a slip, and not an id
        raise ModelError(f"{name}: no such folder; {_folders(folder.parent)}")
    if not _HUB_ID.fullmatch(str(name)):
        raise ModelError(f"{name}: no such folder, and not an id on the hub (owner/name); check the name")
    return None


def _folders(parent: Path) -> str:
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{parent} holds {', '.join(names[:SHOWN])}{more}" if names else f"{parent} holds no folder"


def download(name: str, revision: str | None) -> Path:
    """The snapshot of a repository, with its weights."""
    from huggingface_hub import snapshot_download

    with told(name, revision):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
        if any(folder.glob("model*.safetensors*")) or not _only_pickled(name, revision):
            return folder
    raise ModelError(
        f"{name}: published only as pickles, which can run code when read; choose a model published as safetensors, or convert "
        'it once, where you trust it: python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as '
        f"T; [c.from_pretrained('{name}').save_pretrained('converted') for c in (M, T)]\", then name the folder converted instead"
    )


@contextlib.contextmanager
def told(name: str, revision: str | None) -> Iterator[None]:
    """Says in our words why the hub gives nothing.

    Raises:
        ModelError: as ``locate``.
    """
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is there, but not exported
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
        return
    except GatedRepoError:
        message = f"access is restricted; accept the licence at huggingface.co/{name}, then run: hf auth login"
    except RepositoryNotFoundError:
        message = "no such folder and no such model on the hub, or it is private; check the name, or run: hf auth login"
    except RevisionNotFoundError:
        message = f"the model has no revision {revision!r} on the hub; check --revision"
    except LocalEntryNotFoundError as error:
        message = f"{_offline(error)}; run once with a connection, or name a local folder instead"
    except HfHubHTTPError as error:
        message = f"the hub answered {error.response.status_code}; run again later: complete files are kept"
    except HTTPError as error:
        message = f"the connection to the hub failed ({error}); run again: complete files are kept"
    except OSError as error:
        message = f"the download cannot be kept ({error.strerror or error}); HF_HOME sets where downloads go"
    raise ModelError(f"{name}: {message}")


def _only_pickled(name: str, revision: str | None) -> bool:
    """Whether a repository without safetensors holds pickles; not known where the hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        files = HfApi().list_repo_files(name, revision=revision)
    except (HTTPError, OSError):
        return False
    return any(file.startswith("pytorch_model") for file in files)


def _offline(error: OSError) -> str:
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import IncompleteSnapshotError

    why = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the hub cannot be reached"
    what = "only partly" if isinstance(error, IncompleteSnapshotError) else "not"
    return f"{why} and the model is {what} in the cache"
