"""A Hugging Face Hub of one model, as far as ``snapshot_download`` asks."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

NAME = "org/model"
BRANCHES = {"main": "a" * 40, "4.0bpw": "b" * 40}


@contextlib.contextmanager
def serve(folders: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serves a folder for each branch; yields the address, and what was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = urlparse(self.path).path
            headers, body = _answer(path, folders)
            if body is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()
                return
            if "/resolve/" in path and self.command == "GET":
                asked.append(path.rpartition("/")[2])
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _answer(path: str, folders: dict[str, Path]) -> tuple[dict[str, str], bytes | None]:
    by_commit = {BRANCHES[branch]: folder for branch, folder in folders.items()}
    if match := re.fullmatch(f"/api/models/{NAME}/revision/(.+)", path):
        commit = BRANCHES.get(match[1], match[1])
        if commit not in by_commit:
            return {}, None
        return {}, json.dumps({"id": NAME, "sha": commit, "siblings": []}).encode()
    if match := re.fullmatch(f"/api/models/{NAME}/tree/(.+)", path):
        folder = by_commit[match[1]]
        listed = [
            {
                "type": "file",
                "path": str(file.relative_to(folder)),
                "size": file.stat().st_size,
                "oid": _hash(file),
            }
            for file in folder.rglob("*")
            if file.is_file()
        ]
        return {}, json.dumps(listed).encode()
    if match := re.fullmatch(f"/{NAME}/resolve/([^/]+)/(.+)", path):
        file = by_commit[match[1]] / match[2]
        if file.is_file():
            headers = {"X-Repo-Commit": match[1], "ETag": f'"{_hash(file)}"'}
            return headers, file.read_bytes()
    return {}, None


def _hash(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
