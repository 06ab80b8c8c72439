"""A real HTTP server on loopback that takes uploads as the Hub does: repositories, small and large files, commits."""

import base64
import http.server
import json
import socketserver
import threading
import time
from typing import Any


class FakeHub(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Keeps what was committed by path; refuses all requests of its first `refusals` uploads."""

    daemon_threads = True

    def __init__(self, refusals: int = 0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.refusals, self.uploads = refusals, 0
        self.stuck = False
        """Whether requests are left without an answer, for a minute."""
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            self.answer([{"type": "file", "path": path, "size": 1, "oid": "0"} for path in self.server.files])
        else:
            self.answer({"id": "org/name", "sha": "0" * 40, "siblings": [{"rfilename": p} for p in self.server.files]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.stuck:
            time.sleep(60.0)
        self.server.tokens.add(self.headers["Authorization"])
        if self.path.startswith("/api/repos/create"):
            self.server.uploads += 1
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.url}/org/name", "name": "org/name"})
        elif self.server.uploads <= self.server.refusals:
            self.answer({"error": f"no right to write with {self.headers['Authorization']}"}, 403)
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                value = json.loads(line)["value"]
                kind = json.loads(line)["key"]
                if kind == "header":
                    self.server.messages.append(value["summary"])
                elif kind == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif kind == "deletedFile":
                    del self.server.files[value["path"]]
            url = f"{self.server.url}/org/name/commit/{'0' * 40}"
            self.answer({"commitUrl": url, "commitOid": "0" * 40, "pullRequestUrl": None, "success": True})
        else:
            self.answer({"error": f"what is {self.path}?"}, 404)
