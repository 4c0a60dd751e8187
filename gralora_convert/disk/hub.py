"""Names of models and adapters on the Hugging Face Hub, and the folders that its cache holds.

The cache comes first, then a download unless offline (`HF_HUB_OFFLINE=1`). The only file that
talks to the network, through `huggingface_hub`, which is imported when a name is looked up.
"""

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gralora_convert.disk.files import is_file, is_folder, is_there, meant, near_path
from gralora_convert.errors import UnreadableError, sentences

_PART = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(
    rf"(?P<scheme>hf://)?(?P<repository>{_PART}(/{_PART})?)"
    r"(@(?P<revision>refs/\w+/\w+|[\w.-]+))?(?P<folder>(/[\w-][\w.-]*)*)"
)
# What no verb reads, and what can be large: other formats, the states of a training run.
_IGNORED = [
    "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ot", "original/*", "consolidated*", "optimizer.*",
    "*/optimizer.*", "global_step*", "*/global_step*",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository of the Hub, a revision of it, and a folder in it; `is_plain`: nothing in the
    name tells it from a path."""

    repository: str
    revision: str | None = None
    folder: str = ""
    is_plain: bool = field(default=False, repr=False, compare=False)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}" + (f"/{self.folder}" if self.folder else "")


def parse_name(text: str) -> HubName | None:
    """What `text` names on the Hub, None when it can be no such name.

    `model`, `org/model`, `org/model@revision`, and with a folder in the repository
    `hf://org/model/folder` or `org/model@revision/folder`; without a scheme or a revision three
    words are a local path.

    >>> parse_name("org/model@v1/last")
    HubName(repository='org/model', revision='v1', folder='last')
    >>> parse_name("runs/model/last") is None
    True
    """
    found = _NAME.fullmatch(text)
    if found is None or (found["folder"] and not (found["scheme"] or found["revision"])):
        return None
    is_plain = not (found["scheme"] or found["revision"])
    return HubName(found["repository"], found["revision"], found["folder"].strip("/"), is_plain)


def cached(text: str, file: str) -> Path | None:
    """The path of `file` of what `text` names, a folder here or a repository in the Hub's cache;
    None when neither has it. Nothing is downloaded."""
    if is_there(text):
        return found if is_file(found := Path(text) / file) else None
    from huggingface_hub import constants

    name = parse_name(text)
    if name is None:
        return None
    where = Path(constants.HF_HUB_CACHE) / f"models--{name.repository.replace('/', '--')}"
    if not is_folder(where):  # mostly so, and asking the library takes a fifth of a second
        return None
    from huggingface_hub import try_to_load_from_cache

    inner = f"{name.folder}/{file}" if name.folder else file
    held = try_to_load_from_cache(name.repository, inner, revision=name.revision)
    return Path(held) if isinstance(held, str) else None


def fetch(name: HubName, is_complete: Callable[[Path], bool]) -> Path:
    """The local folder of a repository: the cache's when it `is_complete`, else downloaded.

    Raises:
        UnreadableError: neither; the message tells being offline, a name that does not exist, a
            gated model and a Hub that does not answer apart.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    cached = None
    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
        cached = snapshot_download(name.repository, revision=name.revision, local_files_only=True)
    if cached and is_complete(Path(cached) / name.folder):
        return Path(cached) / name.folder
    if name.is_plain and (path := _misspelt(name.repository)):
        raise UnreadableError(
            "there is no such file or folder", where=name,
            hint=f"Did you mean {path}? For the Hub's write hf://{name}.",
        )  # fmt: skip
    try:
        found = snapshot_download(
            name.repository, revision=name.revision, ignore_patterns=_IGNORED,
            allow_patterns=[f"{name.folder}/*"] if name.folder else None,
        )  # fmt: skip
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if cached and (Path(cached) / name.folder).is_dir():
            return Path(cached) / name.folder  # whoever opens it says what is missing
        raise _not_had(name, error) from error
    if not (Path(found) / name.folder).is_dir():
        raise UnreadableError(
            f"the Hub's {name.repository} has no folder {name.folder!r}", where=name,
            hint="Look at its files on the Hub.",
        )  # fmt: skip
    return Path(found) / name.folder


def _misspelt(name: str) -> Path | None:
    """The path here of which `name` is a misspelling. Models beside one another have names that
    differ in numbers, or by more words: those are no misspellings."""
    near, path = near_path(name, least=0.8), Path(name)
    if near is None or near.parent != path.parent or near.parent == Path():
        return None
    digits = [re.findall(r"\d+", one.name) for one in (near, path)]
    is_longer = near.name.startswith(path.name) or path.name.startswith(near.name)
    return near if digits[0] == digits[1] and not is_longer else None


def config_errors() -> tuple[type[Exception], ...]:
    """What the Hub's library raises for a config.json whose values have wrong types; transformers
    lets it through, and it is no ValueError."""
    from huggingface_hub.errors import StrictDataclassError

    return (StrictDataclassError,)


def _not_had(name: HubName, error: Exception) -> UnreadableError:
    """Why a repository could not be had, and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    nowhere = "there is no such file or folder, and"
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    reason = reason.removeprefix("Got: ")  # as huggingface_hub 1.31 hands on a failed connection
    if isinstance(error, GatedRepoError):
        message = "is gated on the Hub: its files need your consent to its terms"
        hint = f"Accept them at https://huggingface.co/{name.repository}, then `hf auth login`."
    elif isinstance(error, RevisionNotFoundError):
        message = f"the Hub's {name.repository} has no revision {name.revision!r}"
        hint = "Name a branch, a tag or a commit of it after the @."
    elif isinstance(error, RepositoryNotFoundError):
        message = f"{nowhere} the Hub has no model of this name (or it is private)"
        hint = "Check the spelling; a private model needs `hf auth login`."
    elif isinstance(error, OfflineModeIsEnabled) or os.environ.get("HF_HUB_OFFLINE") == "1":
        message = (
            f"{nowhere} the Hub's cache has no complete model of this name; HF_HUB_OFFLINE "
            "forbids to ask the Hub"
        )
        hint = f"Name a local folder, or unset it, or run `hf download {name.repository}` first."
    else:
        message = f"{nowhere} no model of this name could be had from the Hub: {reason}"
        hint = "Name a local folder, or download the model first."
    near = meant(str(name)) if name.is_plain and message.startswith(nowhere) else ""
    return UnreadableError(message, where=name, hint=sentences(hint, near))
