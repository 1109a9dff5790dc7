"""A stand-in for the Hugging Face Hub: the few HTTP endpoints that the real client needs, on this machine."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class StandInHub:
    """Repositories as {"owner/name": [{path: bytes}, …]}, one dictionary per commit.

    Attributes:
        gated, private: names that are refused as the Hub refuses them.
        fetched: paths of the files that were downloaded.
    """

    def __init__(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.private: dict[str, bool] = {}
        self.fetched: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Stop listening: the Hub cannot be reached any more."""
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes]) -> str:
        """Make a commit that holds just these files; returns its id."""
        self.repos.setdefault(name, []).append(files)
        return self.commit(name, len(self.repos[name]) - 1)

    def commit(self, name: str, number: int) -> str:
        """Id of a repository's commit."""
        return hashlib.sha1(f"{name} {number}".encode()).hexdigest()

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit id, files) of "main" or a commit id."""
        for number, files in reversed(list(enumerate(self.repos[name]))):
            commit = self.commit(name, number)
            if revision in ("main", commit):
                return commit, files
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Be quiet."""

    def do_HEAD(self) -> None:
        self.route(None)

    def do_GET(self) -> None:
        self.route(None)

    def do_POST(self) -> None:
        self.route(self.rfile.read(int(self.headers["Content-Length"])))

    def reply(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.reply({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def route(self, body: bytes | None) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        hub = self.hub
        if parts == ["api", "repos", "create"]:
            assert body is not None
            if not self.headers.get("Authorization"):
                return self.refuse(401, "Unauthorized")
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            if name in hub.repos:
                return self.reply({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
            hub.repos[name] = [{}]
            hub.private[name] = "private" in (wanted.get("visibility"), "private" if wanted.get("private") else None)
            return self.reply({"url": f"{hub.url}/{name}"})
        if parts == ["api", "validate-yaml"]:
            return self.reply({"errors": [], "warnings": []})
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if name in hub.gated:
            return self.refuse(403, "GatedRepo")
        if name not in hub.repos:
            return self.refuse(401, "RepoNotFound")
        if parts[0] != "api":
            return self.resolve(name, parts[3], "/".join(parts[4:]))
        action, rest = (parts[4], parts[5:]) if len(parts) > 4 else ("revision", [])
        found = hub.find(name, rest[0] if rest else "main")
        if found is None:
            return self.refuse(404, "RevisionNotFound")
        commit, files = found
        if action == "revision":
            return self.reply({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files],
                               "private": hub.private.get(name, False), "downloads": 0, "likes": 0, "tags": []})
        if action == "tree":
            assert "recursive=true" in self.path.lower()
            return self.reply([{"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
                               for path, data in files.items()])
        assert body is not None
        if action == "preupload":
            return self.reply({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                         for file in json.loads(body)["files"]]})
        assert action == "commit"
        changed = dict(files)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                changed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = hub.add(name, changed)
        return self.reply({"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{name}/commit/{commit}",
                           "hookOutput": ""})

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.hub.find(name, revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound")
        commit, files = found
        if path not in files:
            return self.refuse(404, "EntryNotFound")
        if self.command == "GET":
            self.hub.fetched.append(path)
        return self.reply(files[path], ETag=f'"{_oid(files[path])}"', X_Repo_Commit=commit,
                          Content_Type="application/octet-stream")


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
