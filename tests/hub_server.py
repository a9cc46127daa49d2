"""A Hub on this machine, in memory: the part of its protocol that pushing and loading models use.

    with HubServer() as hub:
        subprocess.run(command, env={**os.environ, **hub.environment(home)})
        assert "config.json" in hub.files("someone/model")

`huggingface_hub` reads the server's address while it is imported, so a client is a process of its
own. Requests come in at the end of this file (`Handler`), find their function in `ROUTES`, and
change repositories (`Repo`) at the head of it.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

USER = "someone"
TOKEN = "hf_someone"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt")


def hub_environment(endpoint, home):
    """What a client process reads; lifts the offline mode that the tests are in."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


class Refusal(Exception):  # noqa: N818 - an answer, not a failure of the server
    """An answer other than 200; the client chooses its exception by the code."""

    def __init__(self, status, message, code=None, *, headers=None, **content):
        super().__init__(message)
        self.status = status
        self.content = {"error": message, **content}
        self.headers = {"X-Error-Message": message, **(headers or {})}
        if code is not None:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class StoredFile:
    content: bytes
    is_lfs: bool = False

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self):
        header = f"blob {len(self.content)}\0".encode()
        return hashlib.sha1(header + self.content).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass
class Repo:
    """Commits, by hash, and branches, which are lists of hashes with the newest last."""

    private: bool
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    branches: dict[str, list[str]] = field(default_factory=lambda: {"main": []})

    def __post_init__(self):
        self.commit("main", {".gitattributes": StoredFile(b"")}, "initial commit")

    def commit(self, branch, files, message):
        parents = self.branches[branch]
        content = [parents[-1:], message, sorted((path, files[path].etag) for path in files)]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[oid] = files
        parents.append(oid)
        return oid

    def resolve(self, revision):
        if revision in self.commits:
            return revision
        if revision not in self.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.branches[revision][-1]


@dataclass(frozen=True)
class Request:
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


@dataclass(frozen=True)
class Answer:
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


REPO = r"(?P<repo_id>[\w.-]+(?:/[\w.-]+)?)"
API = f"/api/models/{REPO}"
REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(method, pattern):
    def register(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class HubServer:
    """Serves while it is entered; `url` is its address, `requests` what it was asked."""

    def __init__(self):
        self.requests: list[str] = []
        self.repos: dict[str, Repo] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.read_only: set[str] = set()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.hub = self
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def environment(self, home):
        return hub_environment(self.url, home)

    def files(self, repo_id, revision="main"):
        """Contents by path, for tests."""
        repo = self.repos[repo_id]
        files = repo.commits[repo.resolve(revision)]
        return {path: stored.content for path, stored in files.items()}

    def answer(self, method, path, request):
        self.requests.append(f"{method} {path}")
        sent = request.headers.get("authorization")
        if sent not in (None, f"Bearer {TOKEN}"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        for its_method, pattern, function in ROUTES:
            if its_method == method and (match := pattern.fullmatch(path)):
                parts = {key: value and unquote(value) for key, value in match.groupdict().items()}
                # Addresses for uploads are signed and need no token.
                if method == "POST" and sent is None:
                    raise Refusal(401, "Invalid username or password.")
                with self.lock:
                    return function(self, request, **parts)
        raise Refusal(404, f"This server does not know {method} {path}")

    def find(self, request, repo_id, revision="main"):
        """Repository, commit hash and files."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and "authorization" not in request.headers):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        oid = repo.resolve(revision)
        return repo, oid, repo.commits[oid]

    # Repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self, request):
        if "authorization" not in request.headers:
            raise Refusal(401, "Invalid username or password.")
        return {"type": "user", "name": USER, "orgs": [], "auth": {}}

    @route("POST", "/api/repos/create")
    def create(self, request):
        wanted = request.json
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        url = f"{self.url}/{repo_id}"
        if repo_id in self.repos:
            raise Refusal(409, "You already created this model repo", url=url)
        self.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
        return {"url": url, "name": repo_id}

    @route("POST", f"{API}/branch/(?P<branch>[^/]+)")
    def create_branch(self, request, repo_id, branch):
        repo, *_ = self.find(request, repo_id)
        if branch in repo.branches:
            raise Refusal(409, "Reference already exists")
        start = request.json.get("startingPoint", "main")
        repo.branches[branch] = [repo.resolve(start)]
        return {}

    @route("GET", f"{API}/auth-check/write")
    def auth_check(self, request, repo_id):
        self.find(request, repo_id)
        if repo_id in self.read_only:
            raise Refusal(403, "You may only read this repository.")
        return {}

    @route("GET", f"{API}(?:/revision/{REVISION})?")
    def model_info(self, request, repo_id, revision):
        repo, oid, files = self.find(request, repo_id, revision or "main")
        return {
            "id": repo_id,
            "modelId": repo_id,
            "sha": oid,
            "private": repo.private,
            "tags": [],
            "siblings": [{"rfilename": path} for path in files],
        }

    # Reading files

    @route("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)")
    def resolve(self, request, repo_id, revision, path):
        _, oid, files = self.find(request, repo_id, revision)
        headers = {"X-Repo-Commit": oid}
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers=headers)
        stored = files[path]
        headers["ETag"] = f'"{stored.etag}"'
        if stored.is_lfs:
            headers["X-Linked-Etag"] = headers["ETag"]
            headers["X-Linked-Size"] = str(len(stored.content))
        return Answer(stored.content, headers)

    @route("GET", f"{API}/tree/{REVISION}(?:/(?P<folder>.+))?")
    def tree(self, request, repo_id, revision, folder):
        *_, files = self.find(request, repo_id, revision)
        start = f"{folder}/" if folder else ""
        recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        inside = [path for path in files if path.startswith(start)]
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        here = [path for path in inside if recursive or "/" not in path.removeprefix(start)]
        folders = {start + path.removeprefix(start).split("/")[0] for path in inside} - {*here}
        return [
            *([] if recursive else [folder_info(path) for path in sorted(folders)]),
            *(file_info(path, files[path]) for path in here),
        ]

    @route("POST", f"{API}/paths-info/{REVISION}")
    def paths_info(self, request, repo_id, revision):
        *_, files = self.find(request, repo_id, revision)
        paths = parse_qs(request.body.decode())["paths"]
        return [file_info(path, files[path]) for path in paths if path in files]

    # Writing files, in the order a client asks

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request):
        return {"errors": [], "warnings": []}

    @route("POST", f"{API}/preupload/{REVISION}")
    def preupload(self, request, repo_id, revision):
        *_, files = self.find(request, repo_id, revision)
        plans = []
        for wanted in request.json["files"]:
            path = wanted["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            plan = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in files:
                plan["oid"] = files[path].etag
            plans.append(plan)
        return {"files": plans}

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, request, repo_id):
        self.find(request, repo_id)
        objects = [dict(wanted) for wanted in request.json["objects"]]
        for each in objects:
            if each["oid"] not in self.lfs_objects:
                each["actions"] = {
                    "upload": {"href": f"{self.url}/lfs/{each['oid']}", "header": {}},
                    "verify": {"href": f"{self.url}/lfs-verify"},
                }
        return {"transfer": "basic", "objects": objects}

    @route("GET", f"{API}/xet-(?P<access>read|write)-token/{REVISION}")
    def xet_token(self, request, repo_id, access, revision):
        raise Refusal(404, f"This server has no Xet storage to {access}")

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self, request, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, f"The content's sha256 is not {oid}")
        self.lfs_objects[oid] = request.body
        return {}

    @route("POST", "/lfs-verify")
    def lfs_verify(self, request):
        wanted = request.json
        if len(self.lfs_objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(422, f"{wanted['oid']} was not uploaded with {wanted['size']} bytes")
        return {}

    @route("POST", f"{API}/commit/{REVISION}")
    def commit(self, request, repo_id, revision):
        repo, parent, files = self.find(request, repo_id, revision)
        if repo_id in self.read_only:
            raise Refusal(403, "You may only read this repository.")
        if revision not in repo.branches:
            raise Refusal(400, f"{revision} is not a branch")
        header, *changes = (json.loads(line) for line in request.body.splitlines())
        if header["value"].get("parentCommit", parent) != parent:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for change in changes:
            self.apply(change["key"], change["value"], files)
        oid = repo.commit(revision, files, header["value"]["summary"])
        url = f"{self.url}/{repo_id}/commit/{oid}"
        return {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}

    def apply(self, key, value, files):
        path = value["path"]
        if key == "file":
            files[path] = StoredFile(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.lfs_objects:
                raise Refusal(400, f"{path} refers to {value['oid']}, which was not uploaded")
            files[path] = StoredFile(self.lfs_objects[value["oid"]], is_lfs=True)
        elif key == "deletedFile":
            del files[path]
        elif key == "deletedFolder":
            for inside in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[inside]
        else:
            raise Refusal(400, f"This server does not know the operation {key}")


def folder_info(path):
    oid = hashlib.sha1(path.encode()).hexdigest()
    return {"type": "directory", "path": path, "size": 0, "oid": oid}


def file_info(path, stored):
    size = len(stored.content)
    info = {"type": "file", "path": path, "size": size, "oid": stored.git_oid}
    if stored.is_lfs:
        info["lfs"] = {"oid": stored.sha256, "size": size, "pointerSize": 130}
    return info


def as_json(content, headers=None):
    headers = {"Content-Type": "application/json", **(headers or {})}
    return Answer(json.dumps(content).encode(), headers)


class Handler(BaseHTTPRequestHandler):
    """Bytes from and to the socket."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def respond(self):
        address = urlsplit(self.path)
        # Also where it is not used: the next request starts after it.
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(parse_qs(address.query), headers, body)
        status = 200
        try:
            method = "GET" if self.command == "HEAD" else self.command
            answer = self.server.hub.answer(method, address.path, request)
        except Refusal as refusal:
            status = refusal.status
            answer = as_json(refusal.content, refusal.headers)
        if not isinstance(answer, Answer):
            answer = as_json(answer)
        self.send_response(status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = respond  # noqa: N815 - names of http.server
