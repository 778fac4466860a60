"""A server that speaks as much of the Hugging Face Hub's protocol as a download and an upload of a folder need.

Repositories with revisions, their trees, files by commit; making a repository and a branch; commits of files that travel
inside the commit or, as large ones do, by Git LFS. Not spoken: Xet, the faster transfer that the client prefers where it is
installed, and everything about accounts but whether a token is there.
"""

import base64
import hashlib
import json
import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_token"


class FakeHub:
    def __init__(self):
        self.commits = defaultdict(dict)  # by repository and commit: file names to bytes
        self.branches = defaultdict(dict)  # by repository: names of branches and tags to commits
        self.uploaded = {}  # large files by their sha256
        self.requests = []
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def commit(self, repository, files, branch="main"):
        before = self.commits[repository].get(self.branches[repository].get(branch), {})
        name = hashlib.sha1(repr((repository, branch, len(self.commits[repository]))).encode()).hexdigest()
        self.commits[repository][name] = {**before, **files}
        self.branches[repository][branch] = name
        return name

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_): ...

    def answer(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code):
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def find(self, repository, revision):
        """The commit, its files; or an answer that says what is not there."""
        commits = self.hub.commits[repository]
        if not commits:
            return self.refuse(404, "RepoNotFound")
        commit = self.hub.branches[repository].get(unquote(revision), unquote(revision))
        if commit not in commits:
            return self.refuse(404, "RevisionNotFound")
        return commit, commits[commit]

    def read(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([^/]+))?", path):
            repository, what, revision = match.groups()
            if found := self.find(repository, revision or "main"):
                commit, files = found
                if what == "tree":
                    oid = lambda content: hashlib.sha1(content).hexdigest()
                    entry = lambda name, content: {
                        "type": "file",
                        "path": name,
                        "size": len(content),
                        "oid": oid(content),
                    }
                    self.answer([entry(*file) for file in files.items()], Content_Type="application/json")
                else:
                    siblings = [{"rfilename": name} for name in files]
                    self.answer({"id": repository, "sha": commit, "siblings": siblings})
        elif match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            repository, revision, name = match.groups()
            if found := self.find(repository, revision):
                commit, files = found
                if name not in files:
                    return self.refuse(404, "EntryNotFound")
                etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
                self.answer(files[name], X_Repo_Commit=commit, ETag=etag)
        else:
            self.refuse(404, "NotFound")

    do_HEAD = do_GET

    def do_POST(self):
        path, body = self.path.partition("?")[0], self.read()
        self.hub.requests.append(f"{self.command} {path}")
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            if self.hub.commits[repository]:
                return self.answer({"error": "exists", "url": f"{self.hub.url}/{repository}"}, 409)
            self.hub.commit(repository, {})
            return self.answer({"url": f"{self.hub.url}/{repository}"})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/branch/(.+)", path):
            repository, branch = match.groups()
            self.hub.branches[repository][unquote(branch)] = self.hub.branches[repository]["main"]
            return self.answer({})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/(.+)", path):
            mode = lambda name: "lfs" if name.endswith(".safetensors") else "regular"
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                {"files": [{"path": name, "uploadMode": mode(name), "shouldIgnore": False} for name in names]}
            )
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}", "header": {}}}
            return self.answer({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/(.+)", path):
            repository, revision = match.groups()
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.uploaded[value["oid"]]
            commit = self.hub.commit(repository, files, unquote(revision))
            return self.answer({"commitUrl": f"{self.hub.url}/{repository}/commit/{commit}", "commitOid": commit})
        self.refuse(404, "NotFound")

    def do_PUT(self):
        body = self.read()
        self.hub.uploaded[hashlib.sha256(body).hexdigest()] = body
        self.answer()
