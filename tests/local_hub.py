"""A small Hugging Face Hub on 127.0.0.1, for tests that push and download through the real client.

It speaks what huggingface_hub asks of a model repo: create, settings, branches, preupload, LFS,
commit, info, tree, resolve. As on the real Hub, every commit has a 40-hex SHA and stays readable,
weights go through LFS and are served by redirect, writing needs a token, and errors carry
`X-Error-Code`. Xet, its own chunk protocol, is left out: clients set `HF_HUB_DISABLE_XET=1`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_local"
LFS_SUFFIXES = (".safetensors", ".bin", ".model")


class Refused(Exception):
    """An error answer: HTTP status, `X-Error-Code`, message."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}


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
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def commit(self, branch: str, tree: dict[str, Blob], message: str) -> str:
        listing = [(path, blob.oid) for path, blob in sorted(tree.items())]
        parent = self.branches.get(branch)
        sha = hashlib.sha1(repr((parent, listing, message)).encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha


@dataclass(frozen=True)
class Request:
    body: bytes
    query: dict[str, list[str]]
    authorized: bool

    def json(self) -> Any:
        return json.loads(self.body)


Answer = tuple[int, dict[str, str], bytes]


def answer(data: Any, status: int = 200, **headers: str) -> Answer:
    return status, {"Content-Type": "application/json", **headers}, json.dumps(data).encode()


class LocalHub:
    """The repos and the server; a context manager.

    Attributes:
        url: to be given to clients as `HF_ENDPOINT`.
        repos: repo id -> `Repo`.
        requests: every request served so far, as "METHOD path".
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return {path: b.content for path, b in repo.commits[repo.resolve(revision)].items()}

    # What the routes below need

    def _repo(self, repo_id: str) -> Repo:
        if repo_id not in self.repos:
            raise Refused(404, "RepoNotFound", "Repository not found")
        return self.repos[repo_id]

    def _tree(self, repo_id: str, revision: str) -> dict[str, Blob]:
        repo = self._repo(repo_id)
        return repo.commits[repo.resolve(unquote(revision))]

    # The account and whole repos

    def whoami(self, request: Request) -> Answer:
        return answer({"type": "user", "name": "me", "orgs": [], "auth": {"type": "access_token"}})

    def create(self, request: Request) -> Answer:
        asked = request.json()
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        reply = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repos:
            return answer(reply, 409, **{"X-Error-Message": "You already created this model repo"})
        repo = self.repos[repo_id] = Repo()
        attributes = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES)
        repo.commit("main", {".gitattributes": Blob(attributes.encode(), False)}, repo_id)
        return answer(reply)

    def delete(self, request: Request) -> Answer:
        asked = request.json()
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self._repo(repo_id)
        del self.repos[repo_id]
        return answer({})

    def settings(self, request: Request, repo_id: str) -> Answer:
        self._repo(repo_id).gated = request.json()["gated"]
        return answer({})

    def branch(self, request: Request, repo_id: str, name: str) -> Answer:
        repo = self._repo(repo_id)
        repo.branches[unquote(name)] = repo.resolve(request.json().get("startingPoint", "main"))
        return answer({})

    def info(self, request: Request, repo_id: str, revision: str = "main") -> Answer:
        repo = self._repo(repo_id)
        sha = repo.resolve(unquote(revision))
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        about = {"id": repo_id, "modelId": repo_id, "sha": sha, "private": False, "tags": []}
        return answer({**about, "gated": repo.gated, "siblings": siblings})

    def tree(self, request: Request, repo_id: str, revision: str, folder: str = "") -> Answer:
        tree = self._tree(repo_id, revision)
        prefix = f"{unquote(folder)}/" if folder else ""
        inside = {path: blob for path, blob in sorted(tree.items()) if path.startswith(prefix)}
        if not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        recursive = request.query.get("recursive", ["false"])[0].lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in inside.items():
            head, nested, _ = path[len(prefix) :].partition("/")
            if nested:
                oid = hashlib.sha1(f"{prefix}{head}".encode()).hexdigest()
                entries[prefix + head] = {"type": "directory", "path": prefix + head, "oid": oid}
            if recursive or not nested:
                size = len(blob.content)
                entry = {"type": "file", "path": path, "oid": blob.oid, "size": size}
                if blob.lfs:
                    entry["lfs"] = {"oid": blob.oid, "size": size, "pointerSize": 130}
                entries[path] = entry
        return answer(list(entries.values()))

    # Uploads

    def validate_yaml(self, request: Request) -> Answer:
        return answer({"errors": [], "warnings": []})

    def preupload(self, request: Request, repo_id: str, revision: str) -> Answer:
        tree = self._tree(repo_id, revision)
        files = []
        for file in request.json()["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            # The id of the present version lets the client leave out what has not changed.
            present = {"oid": tree[path].oid} if path in tree else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **present})
        return answer({"files": files})

    def lfs_batch(self, request: Request, repo_id: str) -> Answer:
        self._repo(repo_id)
        objects = request.json()["objects"]
        for item in objects:
            if item["oid"] not in self.lfs:
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
        return answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, request: Request, oid: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refused(400, "BadDigest", "the content does not have the announced SHA-256")
        self.lfs[oid] = request.body
        return answer({})

    def commit(self, request: Request, repo_id: str, revision: str) -> Answer:
        tree = dict(self._tree(repo_id, revision))
        message = ""
        for line in request.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.lfs:
                    raise Refused(400, "LfsMissing", f"{value['path']} was never uploaded")
                tree[value["path"]] = Blob(self.lfs[value["oid"]], True)
            elif key == "deletedFile":
                del tree[value["path"]]
        sha = self._repo(repo_id).commit(unquote(revision), tree, message)
        return answer({"commitUrl": f"{self.url}/{repo_id}/commit/{sha}", "commitOid": sha})

    # Downloads

    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Answer:
        repo = self._repo(repo_id)
        sha = repo.resolve(unquote(revision))
        commit = {"X-Repo-Commit": sha}
        if repo.gated and not request.authorized:
            raise Refused(401, "GatedRepo", f"Access to model {repo_id} is restricted", commit)
        blob = repo.commits[sha].get(unquote(path))
        if blob is None:
            raise Refused(404, "EntryNotFound", "Entry not found", commit)
        if not blob.lfs:
            return 200, {**commit, "ETag": f'"{blob.oid}"'}, blob.content
        linked = {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        return 302, {**commit, **linked, "Location": f"{self.url}/cdn/{blob.oid}"}, b""

    def cdn(self, request: Request, oid: str) -> Answer:
        return 200, {"ETag": f'"{oid}"'}, self.lfs[oid]


_REPO, _PART = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES = [  # method, path, handler; "!" needs a token
    ("GET", "/api/whoami-v2", LocalHub.whoami, "!"),
    ("POST", "/api/repos/create", LocalHub.create, "!"),
    ("DELETE", "/api/repos/delete", LocalHub.delete, "!"),
    ("POST", "/api/validate-yaml", LocalHub.validate_yaml, ""),
    ("PUT", f"/api/models/{_REPO}/settings", LocalHub.settings, "!"),
    ("POST", f"/api/models/{_REPO}/branch/{_PART}", LocalHub.branch, "!"),
    ("POST", f"/api/models/{_REPO}/preupload/{_PART}", LocalHub.preupload, "!"),
    ("POST", f"/api/models/{_REPO}/commit/{_PART}", LocalHub.commit, "!"),
    ("GET", f"/api/models/{_REPO}", LocalHub.info, ""),
    ("GET", f"/api/models/{_REPO}/revision/{_PART}", LocalHub.info, ""),
    ("GET", f"/api/models/{_REPO}/tree/{_PART}", LocalHub.tree, ""),
    ("GET", f"/api/models/{_REPO}/tree/{_PART}/(.+)", LocalHub.tree, ""),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", LocalHub.lfs_batch, "!"),
    ("PUT", f"/lfs/{_PART}", LocalHub.lfs_put, ""),  # signed addresses on the real Hub
    ("GET", f"/cdn/{_PART}", LocalHub.cdn, ""),
    ("GET", f"/{_REPO}/resolve/{_PART}/(.+)", LocalHub.resolve, ""),
]


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"  # keeps connections open; every answer has a Content-Length

    def _serve(self) -> None:
        url = urlsplit(self.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        request = Request(self._body(), parse_qs(url.query), token == TOKEN)
        try:
            with self.hub.lock:
                self.hub.requests.append(f"{self.command} {self.path}")
                status, headers, content = self._route(url.path, request)
        except Refused as error:
            status, headers, content = answer({"error": str(error)}, error.status, **error.headers)
        status, headers, content = self._cut_range(status, headers, content)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _route(self, path: str, request: Request) -> Answer:
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, handler, guard in ROUTES:
            found = re.fullmatch(pattern, path)
            if verb == method and found:
                if guard and not request.authorized:
                    raise Refused(401, "", "Invalid credentials in Authorization header")
                return handler(self.hub, request, *found.groups())
        raise Refused(404, "", f"no such route: {method} {path}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _cut_range(self, status: int, headers: dict[str, str], content: bytes) -> Answer:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if status != 200 or not wanted:
            return status, headers, content
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        span = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return 206, {**headers, **span}, content[first : last + 1]

    def log_message(self, *args: object) -> None:
        pass  # the requests list is the log
