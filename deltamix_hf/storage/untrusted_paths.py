"""Find a repo's files, whose author chose what they say and where they point, not the user.

docs/security.md is the threat model. Headers of weight files are `headers.py`'s, packed
tensors `packed_layout.py`'s; here are the names of other files and repos.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import GenerationConfig
from transformers.utils.hub import cached_file, cached_files

from ..errors import DeltaMixError, first_line

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_MAX_JSON = 20_000_000  # bytes; fingerprints of 200,000 tensors
_MOST_LISTS = 200_000  # and objects in a JSON file: 6.5e6 empty ones took 14 s
_LONGEST_NAME = 4096  # of a path on Linux


def commit_of(path: str) -> str | None:
    """Read the commit from the path of a file in the Hub's cache; None for any other file."""
    found = re.search(r"snapshots/([0-9a-f]{40})/", path.replace(os.sep, "/"))
    return found.group(1) if found else None


def repo_files(repo: str, kwargs: dict[str, Any]) -> tuple[list[str], dict[str, Any], str | None]:
    """Find a repo's weight files, config.json's content and commit (None for a local folder).

    A whole file goes before shards, as in transformers. `kwargs` are those of `cached_file`, and a
    `variant`. Raises an OSError or ValueError if they are not found, or not readable.
    """
    kwargs, weights, shards = dict(kwargs), WEIGHTS, INDEX
    if variant := kwargs.pop("variant", None):
        weights, shards = f"model.{variant}.safetensors", f"{WEIGHTS}.index.{variant}.json"
    path = cached_file(repo, CONFIG, **kwargs)
    if path is None:
        raise OSError(f"no file {CONFIG}")
    commit = commit_of(path)
    kwargs = kwargs | {"revision": commit or kwargs.get("revision")}  # the rest from this very one
    config = read_object(path)
    whole = cached_file(repo, weights, _raise_exceptions_for_missing_entries=False, **kwargs)
    if whole is not None:
        return [whole], config, commit
    index = cached_file(repo, shards, _raise_exceptions_for_missing_entries=False, **kwargs)
    if index is None:
        raise OSError(f"no file {weights}")
    files = cached_files(repo, sorted(set(read_index(index).values())), **kwargs)
    return files or [], config, commit


def is_hub_id(name: str) -> bool:
    """Tell whether a name has the form of a Hub id; a path may have it too."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_base_name(name: str | None, revision: str | None, repo: str, file: str) -> None:
    """Raise a DeltaMixError for a base that a repo's config.json may not name.

    Its author chose the name, not the user. Looking a network path up is already a message to its
    server, so it must not come to that. What was fetched from the Hub, by the id `repo` or with its
    weight `file` in the Hub's cache, may name a model of the Hub alone, never a place on this
    machine.
    """
    if not name:
        return  # resolve_base says so
    odd = revision and (not revision.isprintable() or ".." in revision or revision[0] in "/\\")
    if odd or len(revision or "") > 255:  # huggingface_hub makes file names of it
        raise DeltaMixError(f"the delta repo names {revision!r} as its base's branch or commit")
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise DeltaMixError(f"the delta repo names {name[:80]!r} as its base, no path or Hub id")
    problem, what = None, "comes from the Hub, and its base"
    if "://" in name or name.startswith(("//", "\\\\")):
        what, problem = "names the network address", "as its base"
    elif commit_of(file) is not None or not os.path.exists(repo):
        if os.path.exists(name):
            problem = "is a path on this machine"
        elif not is_hub_id(name):
            problem = "is no Hub id"
    if problem is not None:
        raise DeltaMixError(
            f"the delta repo {what} {name!r} {problem}; if you trust it, pass "
            "DeltaMixConfig(base_model=...)"
        )


def read_index(path: str) -> dict[str, str]:
    """Read a checkpoint's index: tensor name -> shard.

    Raises an OSError or ValueError if it is not readable, or names what is no file beside it.
    """
    shards = read_object(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{INDEX} holds no weight_map")
    for shard in shards.values():
        plain = isinstance(shard, str) and shard.isprintable() and not {*"/\\:"} & {*shard}
        if not plain or not shard.endswith(".safetensors"):
            raise ValueError(f"{INDEX} names {shard!r}, which is no safetensors file beside it")
    return shards


def check_weight_files(repo: str, files: list[str], names: Callable[[], Iterable[str]]) -> None:
    """Raise a DeltaMixError if a delta repo reads from elsewhere, or its index knows other tensors.

    Or if its generation_config.json is none, which transformers reads after our checks. `names`
    gives the names of the tensors in its files.

    A folder may hold links, and so lend out what belongs to others on this machine. (The Hub's
    cache consists of links, into its own folder for the repo.) A base may: its bytes are known by
    their fingerprints.
    """
    beside = os.path.dirname(files[0])
    index = os.path.join(beside, INDEX)
    settings = os.path.join(beside, "generation_config.json")
    for file in [os.path.join(beside, CONFIG), index, settings, *files]:
        if not lies_inside(repo, file):
            raise DeltaMixError(f"{file} of the delta repo lies outside its folder; copy it in")
    _check_generation(settings)
    if os.path.basename(files[0]) == WEIGHTS or not os.path.isfile(index):
        return
    try:
        listed = read_index(index)
    except (OSError, ValueError) as error:
        raise DeltaMixError(f"{index} is no sound index: {first_line(error)}") from error
    if wrong := sorted(listed.keys() ^ set(names())):
        where = "the index" if wrong[0] in listed else "the shards"
        raise DeltaMixError(f"only {where} of the delta repo know {wrong[0]}: it is incomplete")


def _check_generation(path: str) -> None:
    """Raise a DeltaMixError for a generation_config.json, if there is one, that cannot be used."""
    try:
        if os.path.exists(path):
            GenerationConfig.from_dict(read_object(path))
    except Exception as error:  # of whatever type transformers has for odd values
        raise DeltaMixError(
            f"{path} of the delta repo is damaged, remove it or repair it: {first_line(error)}"
        ) from error


def lies_inside(repo: str, file: str) -> bool:
    """Tell whether a file of a repo, if that is a folder, is no link out of it."""
    root = os.path.realpath(repo).replace(os.sep, "/")
    root = re.sub(r"(/models--[^/]+)/snapshots/[0-9a-f]{40}(/.*)?$", r"\1", root)
    return not os.path.isdir(repo) or Path(os.path.realpath(file)).is_relative_to(root)


def find_file(repo: str, name: str, kwargs: dict[str, Any]) -> str | None:
    """Find a file of a repo; None if it has none, or was not fetched and the Hub does not answer.

    Raises an OSError if there is no such repo.
    """
    reasons = ("missing_entries", "connection_errors", "gated_repo")
    lenient: Any = {f"_raise_exceptions_for_{reason}": False for reason in reasons}
    return cached_file(repo, name, **lenient, **kwargs)


def read_beside(
    repo: str | None, weights: str, name: str, kwargs: dict[str, Any], links: bool = False
) -> Any:
    """Read another file of a repo, of the commit that its `weights` are of; None without one.

    It is a JSON object, or the text of what ends otherwise than in .json. Raises a DeltaMixError if
    it is not readable, or a link out of the repo's folder, unless `links` may be.
    """
    kwargs = kwargs | {"revision": commit_of(weights) or kwargs.get("revision")}
    try:
        path = find_file(repo, name, kwargs) if repo else None
        if path is None or repo is None:
            return None
        if not links and not lies_inside(repo, path):
            raise OSError("it lies outside the folder of the repo")
        return read_object(path) if name.endswith(".json") else read_bytes(path).decode()
    except (OSError, ValueError) as error:
        raise DeltaMixError(f"cannot read {name} of {repo!r}: {first_line(error)}") from error


def read_bytes(path: str) -> bytes:
    """Read a file; a ValueError if it is longer than 20 MB, or no file (a pipe would not end)."""
    if not os.path.isfile(path):
        raise ValueError(f"{os.path.basename(path)} is no file")
    if os.path.getsize(path) > _MAX_JSON:
        raise ValueError(f"{os.path.basename(path)} is longer than {_MAX_JSON:,} bytes")
    return Path(path).read_bytes()


def read_object(path: str) -> dict[str, Any]:
    """Read a JSON object from a file; a ValueError if it holds none, or is longer than 20 MB.

    Or if it holds more than 200,000 lists and objects.
    """
    content = read_bytes(path)
    if content.count(b"[") + content.count(b"{") > _MOST_LISTS:
        raise ValueError(f"{os.path.basename(path)} holds more than {_MOST_LISTS:,} lists")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.path.basename(path)} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{os.path.basename(path)} is not a JSON object")
    return found
