"""A stand-in for the hub that serves repositories to download: folders of this machine, each as one commit."""

import json
import re
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

from huggingface_hub.utils.sha import git_hash

from tests.hub import Loopback

KINDS = {"models": "model", "datasets": "dataset"}
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Shelf(Loopback):
    """`folders` by kind and name. A full commit that is asked for is the repository's own; `main` is `commit`."""

    def __init__(self, commit):
        super().__init__(type("Handler", (Handler,), {"shelf": self}))
        self.commit, self.folders, self.requests = commit, {}, []

    def add(self, name, folder, kind="model"):
        self.folders[kind, name] = folder

    def files(self, kind, name):
        folder = self.folders[kind, name]
        return {
            str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
        }


class Handler(BaseHTTPRequestHandler):
    shelf: Shelf
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.shelf.requests.append((self.command, path))
        if match := API.fullmatch(path):
            self.about(KINDS[match[1]], unquote(match[2]), match[3], match[4])
        elif match := FILE.fullmatch(path):
            self.file("dataset" if match[1] else "model", unquote(match[2]), match[3], unquote(match[4]))
        else:
            self.answer(404)

    do_HEAD = do_GET

    def commit_of(self, revision):
        return revision if re.fullmatch("[0-9a-f]{40}", revision or "") else self.shelf.commit

    def about(self, kind, name, what, revision):
        if (kind, name) not in self.shelf.folders:
            self.answer(404, X_Error_Code="RepoNotFound")
            return
        files = self.shelf.files(kind, name)
        if what == "tree":
            values = [
                {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
                for path, content in files.items()
            ]
        else:
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            values = {"id": name, "sha": self.commit_of(revision), "private": False, "siblings": siblings}
        self.answer(200, json.dumps(values).encode(), Content_Type="application/json")

    def file(self, kind, name, revision, path):
        if (kind, name) not in self.shelf.folders:
            self.answer(404, X_Error_Code="RepoNotFound")
            return
        content = self.shelf.files(kind, name).get(path)
        if content is None:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.commit_of(revision))
        else:
            self.answer(200, content, ETag=f'"{git_hash(content)}"', X_Repo_Commit=self.commit_of(revision))
