"""A small Hugging Face Hub on 127.0.0.1, for tests that push and download through the real client.

It speaks what huggingface_hub asks of a model repo: create, delete, settings, branches, preupload,
LFS, commit, info, tree, resolve. As on the real Hub, every commit has a 40-hex SHA and stays
readable, weights go through LFS and are served by redirect to another host, writing needs a token,
and errors carry `X-Error-Code`. Xet, a chunk protocol of its own, is left out: the client prefers
it whenever hf_xet is installed, so set `HF_HUB_DISABLE_XET=1`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_local"
SHA = "1" * 40
LFS_SUFFIXES = (".safetensors", ".bin", ".model")
JSON = {"Content-Type": "application/json"}
Answer = tuple[int, dict[str, str], bytes]


class Refused(Exception):
    """An error answer: HTTP status, `X-Error-Code`, message."""

    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


@dataclass(frozen=True)
class Blob:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """What the Hub uses as ETag: SHA-256 of LFS files, git's blob SHA-1 of the others."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)  # SHA -> the whole tree
    branches: dict[str, str] = field(default_factory=dict)
    gated: str | bool = False

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(unquote(revision), revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def commit(self, branch: str, tree: dict[str, Blob]) -> str:
        history = self.branches.get(branch), [(path, blob.oid) for path, blob in tree.items()]
        sha = self.branches[branch] = hashlib.sha1(repr(history).encode()).hexdigest()
        self.commits[sha] = tree
        return sha


class LocalHub:
    """The repos and their server; a context manager.

    Attributes:
        url: to be given to clients as `HF_ENDPOINT`.
        requests: every request served so far, as "METHOD path".
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # Another host for the client, which otherwise wants X-Repo-Commit of the redirect's target.
        self.cdn_url = f"http://localhost:{self.server.server_port}/cdn"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables of a process whose client talks to this Hub and caches in `home`."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        return clean | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # the client prefers Xet whenever hf_xet is installed
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content."""
        return {path: blob.content for path, blob in self._tree(repo_id, revision).items()}

    def _repo(self, repo_id: str) -> Repo:
        if repo_id not in self.repos:
            raise Refused(404, "RepoNotFound", "Repository not found")
        return self.repos[repo_id]

    def _tree(self, repo_id: str, revision: str) -> dict[str, Blob]:
        repo = self._repo(repo_id)
        return repo.commits[repo.resolve(revision)]

    # Routes. They return what is sent as JSON, or a whole `Answer`.

    def create(self, call: Handler) -> Any:
        repo_id = call.repo_id()
        if repo_id in self.repos:
            return 409, JSON, json.dumps({"url": f"{self.url}/{repo_id}"}).encode()
        attributes = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES)
        self.repos[repo_id] = Repo()
        self.repos[repo_id].commit("main", {".gitattributes": Blob(attributes.encode(), False)})
        return {"url": f"{self.url}/{repo_id}"}

    def delete(self, call: Handler) -> Any:
        del self.repos[call.repo_id()]
        return {}

    def settings(self, call: Handler, repo_id: str) -> Any:
        self._repo(repo_id).gated = call.json()["gated"]
        return {}

    def branch(self, call: Handler, repo_id: str, name: str) -> Any:
        repo = self._repo(repo_id)
        if unquote(name) in repo.branches:
            raise Refused(409, "", f"Reference already exists: refs/heads/{name}")
        repo.branches[unquote(name)] = repo.resolve(call.json().get("startingPoint", "main"))
        return {}

    def info(self, call: Handler, repo_id: str, revision: str = "main") -> Any:
        repo = self._repo(repo_id)
        return {"id": repo_id, "sha": repo.resolve(revision), "gated": repo.gated, "tags": []}

    def tree(self, call: Handler, repo_id: str, revision: str, folder: str = "") -> Any:
        entries = [  # always recursive and without the folders: good enough for every caller
            {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.content)}
            for path, blob in self._tree(repo_id, revision).items()
            if path.startswith(unquote(folder))
        ]
        if not entries:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        return entries

    def preupload(self, call: Handler, repo_id: str, revision: str) -> Any:
        tree = self._tree(repo_id, revision)
        files = call.json()["files"]
        for file in files:
            file["uploadMode"] = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            file["shouldIgnore"] = False
            if file["path"] in tree:  # lets the client leave out what has not changed
                file["oid"] = tree[file["path"]].oid
        return {"files": files}

    def lfs_batch(self, call: Handler, repo_id: str) -> Any:
        objects = call.json()["objects"]
        for item in objects:
            if item["oid"] not in self.lfs:
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, call: Handler, oid: str) -> Any:
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise Refused(400, "", "the content does not have the announced SHA-256")
        self.lfs[oid] = call.body
        return {}

    def commit(self, call: Handler, repo_id: str, revision: str) -> Any:
        tree = dict(self._tree(repo_id, revision))
        for line in call.body.splitlines():
            key, value = (json.loads(line)[part] for part in ("key", "value"))
            if key == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                tree[value["path"]] = Blob(self.lfs[value["oid"]], True)
            elif key == "deletedFile":
                del tree[value["path"]]
            elif key != "header":
                raise Refused(400, "", f"commit operation {key} is not supported here")
        sha = self._repo(repo_id).commit(unquote(revision), tree)
        return {"commitUrl": f"{self.url}/{repo_id}/commit/{sha}", "commitOid": sha}

    def resolve(self, call: Handler, repo_id: str, revision: str, path: str) -> Answer:
        repo = self._repo(repo_id)
        sha = {"X-Repo-Commit": repo.resolve(revision)}
        if repo.gated and not call.authorized:
            raise Refused(401, "GatedRepo", f"Access to model {repo_id} is restricted", **sha)
        blob = self._tree(repo_id, revision).get(unquote(path))
        if blob is None:
            raise Refused(404, "EntryNotFound", "Entry not found", **sha)
        if not blob.lfs:
            return 200, {**sha, "ETag": f'"{blob.oid}"'}, blob.content
        linked = {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        return 302, {**sha, **linked, "Location": f"{self.cdn_url}/{blob.oid}"}, b""

    def cdn(self, call: Handler, oid: str) -> Answer:
        return 200, {"ETag": f'"{oid}"'}, self.lfs[oid]


REPO, PART = "([^/]+/[^/]+)", "([^/]+)"
ROUTES = {
    f"GET /api/models/{REPO}(?:/revision/{PART})?": LocalHub.info,
    f"GET /api/models/{REPO}/tree/{PART}(?:/(.+))?": LocalHub.tree,
    f"GET /{REPO}/resolve/{PART}/(.+)": LocalHub.resolve,
    f"GET /cdn/{PART}": LocalHub.cdn,
    f"PUT /lfs/{PART}": LocalHub.lfs_put,
    "POST /api/validate-yaml": lambda hub, call: {"errors": []},
    "POST /api/repos/create": LocalHub.create,
    "DELETE /api/repos/delete": LocalHub.delete,
    f"PUT /api/models/{REPO}/settings": LocalHub.settings,
    f"POST /api/models/{REPO}/branch/{PART}": LocalHub.branch,
    f"POST /api/models/{REPO}/preupload/{PART}": LocalHub.preupload,
    f"POST /api/models/{REPO}/commit/{PART}": LocalHub.commit,
    f"POST /{REPO}.git/info/lfs/objects/batch": LocalHub.lfs_batch,
}


class Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, finds their route, writes the answers."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"  # keeps connections open

    def _serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        try:
            with self.hub.lock:
                self.hub.requests.append(f"{self.command} {self.path}")
                reply = self._route()
        except Refused as error:
            reply = error.status, error.headers, str(error).encode()
        if not isinstance(reply, tuple):
            reply = 200, JSON, json.dumps(reply).encode()
        status, headers, content = reply
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if status == 200 and wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            span = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            status, headers, content = 206, {**headers, **span}, content[first : last + 1]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _route(self) -> Any:
        line = f"{self.command.replace('HEAD', 'GET')} {urlsplit(self.path).path}"
        # LFS uploads go to signed addresses on the real Hub: no token with them.
        if not line.startswith(("GET ", "PUT /lfs/")) and not self.authorized:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        for pattern, handler in ROUTES.items():
            if match := re.fullmatch(pattern, line):
                return handler(self.hub, self, *filter(None, match.groups()))
        raise Refused(404, "", f"no such route: {line}")

    def json(self) -> Any:
        return json.loads(self.body)

    def repo_id(self) -> str:
        return f"{self.json()['organization'] or 'me'}/{self.json()['name']}"

    def log_message(self, *args: object) -> None:
        """Silent: `LocalHub.requests` is the log."""


def in_cache(cache: Path, repo: str, folder: Path, sha: str = SHA) -> Path:
    """`folder` as huggingface_hub keeps a repo: a snapshot of links, and which commit main is."""
    place = cache / f"models--{repo.replace('/', '--')}"
    snapshot = place / "snapshots" / sha
    snapshot.mkdir(parents=True)
    (place / "blobs").mkdir(exist_ok=True)
    for file in folder.iterdir():
        blob = place / "blobs" / f"{sha[:8]}-{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(sha)
    return snapshot
