"""A W&B server of a hundred lines on 127.0.0.1: what a client needs to log runs, and a record of what it sent.

Run as ``python wandb_stub.py`` it prints its port and serves until it is killed, so that a test can kill it.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import urlsplit

API_KEY = "0123456789" * 4
ENTITY = "somebody"


@dataclass
class StoredRun:
    """One run as the server holds it."""

    name: str
    project: str
    fields: dict[str, Any] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    opened: int = 0
    exit_code: int | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history, decoded."""
        return [json.loads(line) for line in self.history]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, without W&B's wrapping."""
        values = json.loads(self.fields.get("config") or "{}")
        return {key: value["value"] for key, value in values.items()}


class Stub(ThreadingHTTPServer):
    """The server and its runs by name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, StoredRun] = {}
        self.requests: list[str] = []
        self.fail_streams_with: int | None = None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """What goes into WANDB_BASE_URL."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are nothing to print."""

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The history of a run without what W&B adds to each row."""
        return [{k: v for k, v in row.items() if not k.startswith("_")} for row in self.runs[name].rows]

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The answer to the few operations that a run needs."""
        operation = (re.search(r"(?:query|mutation)\s+(\w+)", query) or ["", ""])[1]
        self.requests.append(operation)
        if operation == "UpsertBucket":
            return {"upsertBucket": {"bucket": self._upsert(variables), "inserted": True}}
        if operation == "RunResumeStatus":
            run = self.runs.get(variables["name"])
            return {"model": {"id": "p", "name": "p", "bucket": run and self._resume(run)}}
        if operation == "CreateRunFiles":
            files = [{"name": n, "uploadUrl": f"{self.url}/upload/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if operation == "Viewer":
            viewer = {"id": "v", "entity": ENTITY, "username": ENTITY, "flags": "{}", "email": None, "admin": False}
            return {"viewer": viewer | {"teams": {"edges": []}}}
        if operation == "RunStoppedStatus":
            return {"project": {"run": {"stopped": False}}}
        return {"serverInfo": {"features": []}}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        run = self.runs.setdefault(name, StoredRun(name, variables.get("project") or "uncategorized"))
        run.fields |= {key: value for key, value in variables.items() if value is not None}
        return {
            "id": f"id-{name}",
            "name": name,
            "displayName": run.fields.get("displayName"),
            "sweepName": None,
            "historyLineCount": len(run.history),
            "project": {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}},
        }

    def _resume(self, run: StoredRun) -> dict[str, Any]:
        return {
            "id": f"id-{run.name}",
            "name": run.name,
            "displayName": run.fields.get("displayName"),
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(run.history[-1:]),
            "eventsTail": "[]",
            "config": run.fields.get("config"),
            "tags": run.fields.get("tags"),
            "wandbConfig": '{"t": {}}',
        }

    def stream(self, name: str, body: dict[str, Any]) -> None:
        """One request of the file stream: history lines with their offset, the summary, the exit code."""
        run = self.runs[name]
        for kind, part in (body.get("files") or {}).items():
            if kind == "wandb-history.jsonl":
                run.history[part["offset"] : part["offset"] + len(part["content"])] = part["content"]
            elif kind == "wandb-summary.json":
                run.summary = json.loads(part["content"][-1])
        if body.get("complete"):
            run.exit_code = body["exitcode"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        stub = cast("Stub", self.server)
        with stub.lock:
            if path == "/graphql":
                request = json.loads(body)
                answer = {"data": stub.graphql(request["query"], request.get("variables") or {})}
                self._answer(200, answer)
            elif path.endswith("/file_stream"):
                if stub.fail_streams_with:
                    self._answer(stub.fail_streams_with, {"error": "no"})
                    return
                stub.stream(path.split("/")[-2], json.loads(body))
                self._answer(200, {"exitcode": None, "limits": {}})
            else:
                stub.requests.append(path)
                self._answer(404, {})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(200, {})

    do_GET = do_POST

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Stub]:
    """A stub that serves for the length of a ``with`` block."""
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
