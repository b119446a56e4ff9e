"""Push a delta repo to the Hub: its files, a model card and a picture in one commit.

One commit, so that nobody loads a new config.json with old weights; `upload_folder` may make
several of it (huggingface_hub 2.4, with hf_xet). A repo that others cannot load is refused: its
base must be on the Hub too.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from ..checkpoint.base import resolve_base
from ..config import DeltaMixConfig
from ..constants import QUANT_METHOD
from ..errors import DeltaMixError, first_line
from ..storage.headers import check_base, read_headers
from ..storage.untrusted_paths import CONFIG, is_hub_id, read_object

CARD = "README.md"
WEIGHTS = ["model*.safetensors", "model*.safetensors.index.json"]


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    base: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Upload a delta repo with its model card and return the address of the commit.

    Args:
        folder: a saved delta repo.
        repo_id: where to on the Hub, `name` or `org/name`; made if it is not there.
        base: Hub id of the base, if the delta was made from a local copy of it. It is checked
            tensor by tensor, and named and pinned in the uploaded config.json.
        token: of the Hub, if not the one logged in with.
        private: make a new repo private.
        revision: branch to push to, made if it is not there.
        create_pr: open a pull request instead.
        commit_message: first line of the commit.
        commit_description: the rest of it.
        tags: tags of the card besides our own.
        trust_remote_code: run the repo's own code for its model, whose sizes the card states.

    Raises:
        DeltaMixError: not a delta repo, a base that is not on the Hub or not the right one, or a
            Hub that refuses.
    """
    config = _config_for_others(folder, base, token)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        try:
            # Annotated as str, but handed on to hf_hub_download, which takes all three.
            earlier = ModelCard.load(repo_id, token=token, ignore_metadata_errors=True)  # type: ignore[arg-type]
        except EntryNotFoundError:
            earlier = None
        contents = _contents(folder, repo_id, config, earlier, [*(tags or ())], trust_remote_code)
        # What an earlier push left would be read instead: a whole file wins over shards.
        there = api.list_repo_files(repo_id, revision=revision)
        stale = set(filter_repo_objects(there, allow_patterns=WEIGHTS)) - contents.keys()
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationDelete(name) for name in sorted(stale)),
            *(CommitOperationAdd(name, content) for name, content in contents.items()),
        ]
        commit: Any = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload delta",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise DeltaMixError(f"cannot push to {repo_id!r}: {first_line(error)}") from error
    return commit.pr_url or commit.commit_url


def _config_for_others(folder: Path, base: str | None, token: str | bool | None) -> dict[str, Any]:
    """Read the repo's config.json and let it name a base that is on the Hub."""
    try:
        config = read_object(str(folder / CONFIG))
        settings = config["quantization_config"]
        ours = settings["quant_method"] == QUANT_METHOD
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise DeltaMixError(f"{folder} is not a delta repo; make one with `deltamix compress`")
    DeltaMixConfig.from_dict(settings)  # refuses what is damaged
    if base is not None:
        files, commit = resolve_base(base, None, {"token": token})
        if commit is None:
            raise DeltaMixError(f"{base!r} is a local folder; give the base's id on the Hub")
        check_base(settings["base_fingerprints"], read_headers(files), repr(base))
        settings |= {"base_model": base, "base_revision": commit}
    elif not (name := settings.get("base_model")) or not is_hub_id(name) or Path(name).exists():
        raise DeltaMixError(
            f"the delta names its base by the local path {name!r}, which "
            "nobody else has; name the same base on the Hub (--base org/base, or base=)"
        )
    return config


def _contents(
    folder: Path,
    repo_id: str,
    config: dict[str, Any],
    earlier: ModelCard | None,
    tags: list[str],
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Give what is uploaded by name: a file's path, or its bytes."""
    from ..checkpoint.report import inspect_repo
    from .model_card import PICTURE, model_card
    from .plots import allocation_figure, png

    report = inspect_repo(folder, trust_remote_code)
    card = model_card(report, repo_id, config, earlier, tags)
    paths = {p.relative_to(folder): p for p in sorted(folder.rglob("*")) if p.is_file()}
    contents: dict[str, Any] = {
        name.as_posix(): path
        for name, path in paths.items()
        if not any(part.startswith(".") for part in name.parts)
    }
    contents["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return contents | {CARD: str(card).encode(), PICTURE: png(allocation_figure(report))}
