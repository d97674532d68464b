"""A stand-in for the Hugging Face hub on loopback: repositories, large files and commits, as huggingface_hub asks."""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def git_hash(data):
    """As git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


# Files from this size on are sent apart from the commit, as large files are.
LARGE = 20_000


@dataclass
class Repository:
    """Revisions, oldest first: commit and files. A new one holds .gitattributes alone, as on the hub."""

    private: bool
    revisions: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def at(self, revision):
        """Commit and files of a revision, which is a commit or main; None without such a revision."""
        found = {"main": self.revisions[-1]} | {name: (name, files) for name, files in self.revisions}
        return found.get(revision)

    def commit(self, files):
        name = hashlib.sha1(repr((len(self.revisions), sorted(files))).encode()).hexdigest()
        self.revisions.append((name, files))
        return name

    @property
    def head(self):
        return self.revisions[-1][0]

    @property
    def files(self):
        return self.revisions[-1][1]


class Loopback:
    """A server on this machine, from the `with` to its end."""

    def __init__(self, handler):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()


class Hub(Loopback):
    """`tokens` says where each token may write; `refuse` answers a path that fits a pattern with a status."""

    def __init__(self):
        super().__init__(type("Handler", (Handler,), {"hub": self}))
        self.repositories, self.large, self.requests = {}, {}, []
        self.tokens = {"hf_writer": {"org"}, "hf_reader": set()}
        self.refuse = {}
        self.cut_off = None  # a pattern: such a request is read half, and its connection closed

    def create(self, repo, private=True):
        self.repositories[repo] = found = Repository(private)
        found.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return found

    def sent(self, method, pattern):
        """How many requests of a kind there were."""
        return sum(m == method and re.search(pattern, path) is not None for m, path in self.requests)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, values=None, **headers):
        body = json.dumps({} if values is None else values).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        path, hub = self.path.partition("?")[0], self.hub
        hub.requests.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        if hub.cut_off and re.search(hub.cut_off, f"{self.command} {path}"):
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.read_chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        for pattern, status in hub.refuse.items():
            if re.search(pattern, f"{self.command} {path}"):
                self.answer(status, {"error": "refused"})
                return
        if self.command == "PUT" and path.startswith("/large/"):
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            hub.large[path.rpartition("/")[2]] = body
            self.answer(200)
            return
        if download := re.fullmatch(r"/(?:api/(?:models|datasets)/)?(.+)/(revision|tree|resolve)/([^/]+)/?(.*)", path):
            self.download(*download.groups())
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in hub.tokens:
            self.answer(
                401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials in Authorization header"
            )
            return
        self.route(path, body, hub.tokens[token])

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def read_chunks(self):
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def route(self, path, body, may_write):
        hub = self.hub
        if path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create_repository(json.loads(body), may_write)
        elif match := re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?(/.*)?", path):
            repo, rest = match[1], match[2] or ""
            if repo not in hub.repositories:
                self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            elif self.command == "GET":
                found = hub.repositories[repo]
                names = [{"rfilename": name} for name in found.files]
                self.answer(200, {"id": repo, "sha": found.head, "private": found.private, "siblings": names})
            elif repo.partition("/")[0] not in may_write:
                self.answer(403, {"error": "Forbidden"})
            else:
                self.write(repo, rest, body)
        else:
            self.answer(404)

    def download(self, repo, what, revision, name):
        """What snapshot_download asks: the commit of a revision, its list of files, each file. Needs no token."""
        found = self.hub.repositories.get(repo)
        at = found and found.at(urllib.parse.unquote(revision))
        if not at:
            code = "RevisionNotFound" if found else "RepoNotFound"
            self.answer(404, {"error": "not found"}, X_Error_Code=code)
            return
        commit, files = at
        if what == "revision":
            self.answer(200, {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        elif what == "tree":
            tree = [
                {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)} for path, data in files.items()
            ]
            self.answer(200, tree)
        else:
            data = files[name]
            self.send_response(200)
            for header, value in {
                "ETag": f'"{git_hash(data)}"',
                "X-Repo-Commit": commit,
                "Content-Length": len(data),
            }.items():
                self.send_header(header, str(value))
            self.end_headers()
            self.wfile.write(data if self.command == "GET" else b"")

    def create_repository(self, wanted, may_write):
        repo = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] not in may_write:
            self.answer(403, {"error": f"You don't have the rights to create a model under {wanted['organization']}"})
        elif repo in self.hub.repositories:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"})
        else:
            self.hub.create(repo, wanted["visibility"] == "private")
            self.answer(200, {"url": f"{self.hub.url}/{repo}"})

    def write(self, repo, rest, body):
        hub, found = self.hub, self.hub.repositories[repo]
        if rest == "/preupload/main":
            files = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                }
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif rest == "/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            actions = [
                {
                    **one,
                    **(
                        {}
                        if one["oid"] in hub.large
                        else {"actions": {"upload": {"href": f"{hub.url}/large/{one['oid']}"}}}
                    ),
                }
                for one in wanted
            ]
            self.answer(200, {"transfer": "basic", "objects": actions})
        elif rest == "/commit/main":
            self.commit(repo, found, [json.loads(line) for line in body.splitlines()])
        elif rest == "/settings":
            found.private = json.loads(body)["visibility"] == "private"
            self.answer(200, {})
        else:
            self.answer(404)

    def commit(self, repo, found, lines):
        header, *changes = lines
        if header["value"].get("parentCommit") not in (None, found.head):
            self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        files = dict(found.files)
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif change["key"] == "deletedFile":
                del files[value["path"]]
        name = found.commit(files)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{name}", "commitOid": name})
