# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""A Hub on the loopback interface: what `huggingface_hub` and `datasets` need of repositories of models and datasets.

They create, fill, read and revise them. A dataset is known by its path, as "datasets/tester/voices".

Two listeners, as with the real Hub, of unlike hosts: the Hub itself, and the storage where large files are, under
signed addresses. Point a client at it with HF_ENDPOINT, set before huggingface_hub is imported, and with
HF_HUB_DISABLE_XET=1: the Xet protocol is a compiled client of its own, which without it would be used for uploads.
The host of the dataset viewer, which `datasets` derives from the Hub's, has no address: the Hub is its proxy. All of
this is in `hub_process.environment`.

    with HubServer(tokens={"hf_good": "tester"}) as hub:
        subprocess.run(..., env=environment(hub, home, token="hf_good"))
        hub.repos["tester/model"].files("main")
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml


# Models lie at the root and under api/models, datasets under datasets/ and api/datasets/.
REPO = r"(?P<repo>(?:datasets/)?[\w.-]+/[\w.-]+)"
API = rf"/api/(?:models/|(?=datasets/)){REPO}"
DATE = "2026-01-01T00:00:00.000Z"
# What the Hub stores outside of git, whatever its size; other files are large from 10 MB on.
LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".parquet")
LARGE_SIZE = 10_000_000


@dataclass(frozen=True)
class Blob:
    """A file of a commit; `content` is None where it lies in the storage under its sha256."""

    size: int
    git_sha: str
    content: bytes | None = None
    sha256: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.git_sha


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        sha = hashlib.sha1(f"{parent}{title}{sorted(files.items())}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, files)
        self.branches[branch] = sha
        return self.commits[sha]

    def at(self, revision: str) -> Commit | None:
        """The commit of a branch or of a full sha."""
        return self.commits.get(self.branches.get(revision, revision))

    def files(self, revision: str = "main") -> list[str]:
        commit = self.at(revision)
        return sorted(commit.files) if commit else []

    def history(self, revision: str = "main") -> list[Commit]:
        """Newest first."""
        commits, commit = [], self.at(revision)
        while commit:
            commits.append(commit)
            commit = self.commits.get(commit.parent)
        return commits


@dataclass(frozen=True)
class Request:
    """One line of the log; the status is 0 where the server hung up."""

    method: str
    path: str
    status: int


class HubServer:
    """Listens from entering the `with` block to leaving it.

    Args:
        tokens: user name of every token that is accepted.
        part_size: files larger than this are uploaded in parts, in bytes.
    """

    def __init__(self, tokens: dict[str, str], part_size: int = 1_000_000) -> None:
        self.tokens, self.part_size = tokens, part_size
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.log: list[Request] = []
        self.lock = threading.Lock()
        self._parts: dict[tuple[str, int], bytes] = {}
        self._drops: dict[tuple[str, str], list[int]] = {}
        self._listeners = [self._listener(HubHandler), self._listener(StorageHandler)]
        self.endpoint, self.storage_endpoint = (
            f"http://{host}:{listener.server_address[1]}"
            for host, listener in zip(("127.0.0.1", "localhost"), self._listeners)
        )

    def _listener(self, handler: type["Handler"]) -> ThreadingHTTPServer:
        listener = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (handler,), {"hub": self}))
        listener.daemon_threads = True
        return listener

    def __enter__(self) -> "HubServer":
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()

    def drop(self, repo: str, what: str, after: int = 0, times: int = 1) -> None:
        """Hang up on `times` requests of a repository once `after` of them were answered.

        `what` is "upload" or "download", cut off in the middle of a large file's body, or "commit", cut off after the
        commit was read and before it is taken.
        """
        self._drops[repo, what] = [after, times]

    def is_dropped(self, repo: str, what: str) -> bool:
        """Whether to hang up now; counts."""
        with self.lock:
            left = self._drops.get((repo, what), [0, 0])
            if left[0] > 0:
                left[0] -= 1
                return False
            left[1] -= 1
            return left[1] >= 0

    def requests(self, method: str, pattern: str) -> list[Request]:
        """The requests so far of this method whose path, with its query, matches the pattern."""
        return [request for request in self.log if request.method == method and re.search(pattern, request.path)]

    def signature(self, oid: str, repo: str) -> str:
        """What makes an address of the storage valid."""
        return hashlib.sha256(f"loopback {oid} {repo}".encode()).hexdigest()[:16]

    def storage_url(self, oid: str, repo: str, **query: object) -> str:
        values = {"repo": quote(repo, safe=""), "signature": self.signature(oid, repo), **query}
        return f"{self.storage_endpoint}/{oid}?" + "&".join(f"{name}={value}" for name, value in values.items())


class Handler(BaseHTTPRequestHandler):
    """Finds the route of a request and sends the answers; HEAD is GET without the body."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    routes: list[tuple[str, str, Callable]] = []  # noqa: RUF012 (set once, per subclass)

    def dispatch(self) -> None:
        parts = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, answer in self.routes:
            if verb == method and (match := re.fullmatch(pattern, parts.path)):
                values = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                return answer(self, **values)
        self.body()
        self.error(404, "NotFound", f"no such route: {self.command} {parts.path}")

    def do_GET(self) -> None:
        self.dispatch()

    do_HEAD = do_POST = do_PUT = do_GET

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def send(self, status: int, content: bytes = b"", **headers: object) -> None:
        with self.hub.lock:
            self.hub.log.append(Request(self.command, unquote(self.path), status))
        self.send_response(status)
        for name, value in {"Content_Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value: object, status: int = 200, **headers: object) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def error(self, status: int, code: str, message: str, **headers: object) -> None:
        self.send_json({"error": message}, status, X_Error_Code=code, X_Error_Message=message, **headers)

    def send_range(self, content: bytes, **headers: object) -> None:
        """The content, or the part of it that a Range header asks for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.send(200, content, Accept_Ranges="bytes", **headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if first > last:
            return self.send(416, Content_Range=f"bytes */{len(content)}")
        self.send(206, content[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(content)}", **headers)

    def hang_up(self) -> None:
        """Cuts the connection, with no answer or half of one."""
        with self.hub.lock:
            self.hub.log.append(Request(self.command, unquote(self.path), 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *arguments: object) -> None:
        """The log is `HubServer.log`, not stderr."""


class HubHandler(Handler):
    """The Hub: accounts, repositories, revisions, commits, and the addresses of files."""

    def user(self) -> str | None:
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def dispatch(self) -> None:
        """A token that nobody has is refused before anything else, as on the Hub."""
        if self.headers.get("Authorization") and self.user() is None:
            self.body()
            return self.error(401, "", "Invalid credentials in Authorization header")
        super().dispatch()

    def repo(self, name: str, write: bool = False) -> Repo | None:
        """The repository, or None once the error has been sent."""
        repo = self.hub.repos.get(name)
        may_write = self.user() == owner(name)
        if repo is None or (repo.private and not may_write):
            self.error(404 if self.user() else 401, "RepoNotFound", "Repository not found")
        elif write and not may_write:
            self.error(403, "", f"You have no write access to {name}")
        else:
            return repo
        return None

    def commit_of(self, repo: Repo, revision: str) -> Commit | None:
        if (commit := repo.at(revision)) is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def whoami(self) -> None:
        if (user := self.user()) is None:
            return self.error(401, "", "Invalid username or password.")
        self.send_json({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self) -> None:
        values = json.loads(self.body())
        user = self.user()
        name = f"{values.get('organization') or user}/{values['name']}"
        if user is None or not name.startswith(f"{user}/"):
            return self.error(403 if user else 401, "", f"You may not create {name}")
        kind = values.get("type") or "model"
        path = f"datasets/{name}" if kind == "dataset" else name
        with self.hub.lock:
            known = path in self.hub.repos
            if not known:
                repo = self.hub.repos[path] = Repo(private=values.get("visibility") == "private")
                attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
                repo.commit("main", "initial commit", {".gitattributes": regular_blob(attributes)})
        answer = {"url": f"{self.hub.endpoint}/{path}", "name": name, "id": name}
        if known:
            answer["error"] = f"You already created this {kind} repo"
        self.send_json(answer, 409 if known else 200)

    def validate_yaml(self) -> None:
        block = re.match(r"\s*---\n(.*?)\n---", json.loads(self.body())["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(block[1]) if block else None
        except yaml.YAMLError as error:
            return self.send_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        self.send_json({"errors": [], "warnings": warnings})

    def preupload(self, repo: str, revision: str) -> None:
        files = json.loads(self.body())["files"]
        if (found := self.repo(repo, write=True)) and (commit := self.commit_of(found, revision)):
            answers = []
            for file in files:
                large = file["path"].endswith(LARGE_SUFFIXES) or file["size"] >= LARGE_SIZE
                blob = commit.files.get(file["path"])
                mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                answers.append({"path": file["path"], "oid": blob.etag if blob else None, **mode})
            self.send_json({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        objects = json.loads(self.body())["objects"]
        if self.repo(repo, write=True):
            self.send_json({"transfer": "multipart", "objects": [self.lfs_object(repo, **item) for item in objects]})

    def lfs_object(self, repo: str, oid: str, size: int) -> dict:
        """How to upload an object, without actions where it is there."""
        if oid in self.hub.storage:
            return {"oid": oid, "size": size}
        verify = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/objects/verify"}
        upload: dict = {"href": self.hub.storage_url(oid, repo)}
        if size > self.hub.part_size:
            header = {"chunk_size": str(self.hub.part_size)}
            for number in range(1, -(-size // self.hub.part_size) + 1):
                header[str(number)] = self.hub.storage_url(oid, repo, part=number)
            upload = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/objects/complete", "header": header}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def lfs_complete(self, repo: str) -> None:
        """Puts the parts of an upload together."""
        values = json.loads(self.body())
        numbers = [part["partNumber"] for part in values["parts"]]
        content = b"".join(self.hub._parts.get((values["oid"], number), b"") for number in numbers)
        if hashlib.sha256(content).hexdigest() != values["oid"]:
            return self.error(400, "", "the parts do not make up the object")
        self.hub.storage[values["oid"]] = content
        self.send_json({})

    def lfs_verify(self, repo: str) -> None:
        values = json.loads(self.body())
        there = len(self.hub.storage.get(values["oid"], b"")) == values["size"]
        self.send_json({}) if there else self.error(404, "", "the object is not in the storage")

    def make_commit(self, repo: str, revision: str) -> None:
        """All of the operations, or none."""
        lines = [json.loads(line) for line in self.body().splitlines()]
        if self.hub.is_dropped(repo, "commit"):
            return self.hang_up()
        if not (found := self.repo(repo, write=True)) or not (commit := self.commit_of(found, revision)):
            return None
        header = lines[0]["value"]
        files = dict(commit.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = regular_blob(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if len(self.hub.storage.get(value["oid"], b"")) != value["size"]:
                    return self.error(400, "", f"LFS object of {value['path']} was not uploaded")
                pointer = f"oid sha256:{value['oid']}\nsize {value['size']}\n".encode()
                files[value["path"]] = Blob(value["size"], git_sha(pointer), sha256=value["oid"])
            elif files.pop(value["path"], None) is None:  # deletedFile
                return self.error(404, "EntryNotFound", "A file with this name doesn't exist")
        with self.hub.lock:
            head = found.branches[revision]
            new = (
                found.commit(revision, header["summary"], files) if header.get("parentCommit", head) == head else None
            )
        if new is None:
            return self.error(412, "", f"A commit has happened since: {head}")
        url = f"{self.hub.endpoint}/{repo}/commit/{new.sha}"
        self.send_json({"commitUrl": url, "commitOid": new.sha, "success": True})

    def create_branch(self, repo: str, branch: str) -> None:
        start = json.loads(self.body() or b"{}").get("startingPoint", "main")
        if not (found := self.repo(repo, write=True)) or not (commit := self.commit_of(found, start)):
            return None
        if branch in found.branches:
            return self.error(409, "", f"Reference already exists: {branch}")
        found.branches[branch] = commit.sha
        self.send_json({})

    def refs(self, repo: str) -> None:
        if found := self.repo(repo):
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                for name, sha in found.branches.items()
            ]
            self.send_json({"branches": branches, "converts": [], "tags": []})

    def commits(self, repo: str, revision: str) -> None:
        if (found := self.repo(repo)) and self.commit_of(found, revision):
            authors = [{"user": owner(repo)}]
            self.send_json(
                [
                    {"id": commit.sha, "title": commit.title, "message": "", "date": DATE, "authors": authors}
                    for commit in found.history(revision)
                ]
            )

    def repo_info(self, repo: str, revision: str = "main") -> None:
        if (found := self.repo(repo)) and (commit := self.commit_of(found, revision)):
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            name = repo.removeprefix("datasets/")
            values = {"id": name, "modelId": name, "sha": commit.sha, "lastModified": DATE, "tags": []}
            self.send_json({**values, "private": found.private, "siblings": siblings})

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        """What a folder holds, or with `recursive` also what its folders hold."""
        if not (found := self.repo(repo)) or not (commit := self.commit_of(found, revision)):
            return
        inside = [entry for entry in entries(commit) if not folder or entry["path"].startswith(f"{folder}/")]
        if folder and not inside:
            return self.error(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        depth = folder.count("/") + 1 if folder else 0
        whole = self.query.get("recursive", "").lower() == "true"
        self.send_json([entry for entry in inside if whole or entry["path"].count("/") == depth])

    def viewer(self) -> None:
        """The dataset viewer, which has yet to look at what was pushed a moment ago."""
        self.error(500, "ResponseNotReady", "The server is busier than usual and the response is not ready yet.")

    def resolve(self, repo: str, revision: str, path: str) -> None:
        """A regular file itself; for a large file the way to the storage, with what is known of it."""
        if not (found := self.repo(repo)) or not (commit := self.commit_of(found, revision)):
            return
        if (blob := commit.files.get(path)) is None:
            return self.error(404, "EntryNotFound", f"{path} does not exist on {revision}", X_Repo_Commit=commit.sha)
        headers = {"X_Repo_Commit": commit.sha, "ETag": f'"{blob.git_sha}"'}
        if blob.content is not None:
            return self.send_range(blob.content, Content_Type="text/plain; charset=utf-8", **headers)
        linked = {"X_Linked_Size": blob.size, "X_Linked_ETag": f'"{blob.sha256}"'}
        self.send(302, Location=self.hub.storage_url(str(blob.sha256), repo), **linked, **headers)

    routes = [  # noqa: RUF012
        ("GET", "/api/whoami-v2", whoami),
        ("POST", "/api/repos/create", create_repo),
        ("POST", "/api/validate-yaml", validate_yaml),
        ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", preupload),
        ("POST", rf"{API}/commit/(?P<revision>[^/]+)", make_commit),
        ("POST", rf"{API}/branch/(?P<branch>[^/]+)", create_branch),
        ("GET", rf"{API}/refs", refs),
        ("GET", rf"{API}/commits/(?P<revision>[^/]+)", commits),
        ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", tree),
        ("GET", rf"{API}(?:/revision/(?P<revision>[^/]+))?", repo_info),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/complete", lfs_complete),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", lfs_verify),
        ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
        ("GET", "/info", viewer),
    ]


class StorageHandler(Handler):
    """The storage of large files: signed addresses, and no token may ever come along."""

    def dispatch(self) -> None:
        oid, repo = urlsplit(self.path).path[1:], parse_qs(urlsplit(self.path).query).get("repo", [""])[-1]
        signature = parse_qs(urlsplit(self.path).query).get("signature", [""])[-1]
        if signature != self.hub.signature(oid, repo) or self.headers.get("Authorization"):
            self.body()
            return self.error(403, "", "the address is not signed, or a token was sent along")
        super().dispatch()

    def put(self, oid: str) -> None:
        if self.hub.is_dropped(self.query["repo"], "upload"):
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self.hang_up()
        content = self.body()
        if "part" in self.query:
            self.hub._parts[oid, int(self.query["part"])] = content
        elif hashlib.sha256(content).hexdigest() != oid:
            return self.error(400, "", "the content is not that of the object")
        else:
            self.hub.storage[oid] = content
        self.send(200, ETag=f'"{hashlib.md5(content).hexdigest()}"')

    def get(self, oid: str) -> None:
        content = self.hub.storage[oid]
        if self.hub.is_dropped(self.query["repo"], "download"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            return self.hang_up()
        self.send_range(content, Content_Type="application/octet-stream", ETag=f'"{oid}"')

    routes = [("PUT", "/(?P<oid>[0-9a-f]{64})", put), ("GET", "/(?P<oid>[0-9a-f]{64})", get)]  # noqa: RUF012


def git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def regular_blob(content: bytes) -> Blob:
    return Blob(len(content), git_sha(content), content=content)


def owner(repo: str) -> str:
    return repo.removeprefix("datasets/").split("/")[0]


def entries(commit: Commit) -> list[dict[str, Any]]:
    """What the Hub says of every folder and file, by path."""
    folders = {str(folder) for path in commit.files for folder in PurePosixPath(path).parents} - {"."}
    listed: list[dict[str, Any]] = [
        {"type": "directory", "path": path, "size": 0, "oid": git_sha(path.encode())} for path in folders
    ]
    for path, blob in commit.files.items():
        entry = {"type": "file", "path": path, "size": blob.size, "oid": blob.git_sha}
        if blob.sha256:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
        listed.append(entry)
    return sorted(listed, key=lambda entry: entry["path"])
