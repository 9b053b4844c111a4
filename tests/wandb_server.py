"""A stand-in for W&B's server: what its client sends is kept, and the answers are those that it goes on with."""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

ENTITY = "tester"


def identity(*parts: str) -> str:
    """As W&B's identities are: base64 of a kind and a name."""
    return base64.b64encode(":".join(parts).encode()).decode()


def name_of(identity: str) -> str:
    """What :func:`identity` was made of, without the kind."""
    return base64.b64decode(identity).decode().partition(":")[2]


class WandbServer(ThreadingHTTPServer):
    """What it was told.

    ``runs``: by id the config, summary and rows of history. ``artifacts``: by name their type, the run that made them,
    and whether they were committed. ``used``: pairs of a run and an artifact that it took. ``files``: by path what was
    uploaded. ``failures``: what there was no answer for.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.used: list[tuple[str, str]] = []
        self.files: dict[str, bytes] = {}
        self.failures: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of one GraphQL request."""
        name = re.search(r"(?:query|mutation)\s+(\w+)", query)
        with self.lock:
            answered: dict[str, Any] = getattr(self, f"_{name[1]}" if name else query)(
                variables.get("input", variables)
            )
        return answered

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are done close their connections."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def _run(self, name: str) -> dict[str, Any]:
        return self.runs.setdefault(name, {"history": {}, "summary": {}, "config": {}, "complete": False})

    def _bucket(self, name: str, project: str) -> dict[str, Any]:
        run = self._run(name)
        owner = {"id": identity("Project", project), "name": project, "entity": {"id": "e", "name": ENTITY}}
        return {
            "id": identity("Run", name),
            "name": name,
            "displayName": run.get("displayName"),
            "description": None,
            "config": json.dumps(run["config"]),
            "sweepName": None,
            "project": owner,
            "historyLineCount": len(run["history"]),
        }

    def _UpsertBucket(self, told: dict[str, Any]) -> dict[str, Any]:
        inserted, run = told["name"] not in self.runs, self._run(told["name"])
        run |= {key: told[key] for key in ("groupName", "jobType", "tags", "displayName", "project") if told.get(key)}
        if told.get("config"):
            run["config"] = json.loads(told["config"])
        return {"upsertBucket": {"bucket": self._bucket(told["name"], run["project"]), "inserted": inserted}}

    def _RunResumeStatus(self, told: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(told["name"])
        model = {"id": "p", "name": told["project"], "entity": {"id": "e", "name": ENTITY}, "bucket": None}
        if run is not None:
            rows = [json.dumps(run["history"][place]) for place in sorted(run["history"])]
            model["bucket"] = {
                **self._bucket(told["name"], told["project"]),
                "summaryMetrics": json.dumps(run["summary"]),
                "logLineCount": 0,
                "eventsLineCount": 0,
                "historyTail": json.dumps(rows[-1:]),
                "eventsTail": "[]",
                "tags": run.get("tags", []),
                "notes": None,
                "wandbConfig": json.dumps({"t": 1}),
            }
        return {"model": model}

    def _Viewer(self, told: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "v", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": None}}

    def _ServerFeaturesQuery(self, told: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _OrganizationCoreWeaveOrganizationID(self, told: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def _CreateRunFiles(self, told: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/put/{told['run']}/{name}"} for name in told["files"]]
        return {"createRunFiles": {"runID": identity("Run", told["run"]), "uploadHeaders": [], "files": files}}

    def _CreateArtifact(self, told: dict[str, Any]) -> dict[str, Any]:
        name = told["artifactCollectionName"]
        kept = {
            "type": told["artifactTypeName"],
            "run": told.get("runName"),
            "digest": told["digest"],
            "state": "PENDING",
        }
        self.artifacts[name] = {**kept, "metadata": told.get("metadata"), "aliases": told.get("aliases")}
        artifact = {"id": identity("Artifact", name), "state": "PENDING", "digest": told["digest"]}
        return {"createArtifact": {"artifact": {**artifact, "artifactSequence": {"id": name, "latestArtifact": None}}}}

    def _CreateArtifactManifest(self, told: dict[str, Any]) -> dict[str, Any]:
        name = name_of(told["artifactID"])
        file = {"id": "f", "uploadUrl": f"{self.url}/put/manifests/{name}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": identity("Manifest", name), "file": file}}}

    def _UpdateArtifactManifest(self, told: dict[str, Any]) -> dict[str, Any]:
        name = name_of(told["artifactManifestID"])
        file = {"id": "f", "uploadUrl": f"{self.url}/put/manifests/{name}", "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": told["artifactManifestID"], "file": file}}}

    def _CreateArtifactFiles(self, told: dict[str, Any]) -> dict[str, Any]:
        def node(file: dict[str, Any]) -> dict[str, Any]:
            artifact = name_of(file["artifactID"])
            place = f"artifacts/{artifact}/{file['name']}"
            url = f"{self.url}/put/{place}"
            return {
                "node": {
                    "storagePath": place,
                    "uploadUrl": url,
                    "uploadHeaders": [],
                    "artifact": {"id": file["artifactID"]},
                }
            }

        return {"createArtifactFiles": {"files": {"edges": [node(file) for file in told["artifactFiles"]]}}}

    def _CommitArtifact(self, told: dict[str, Any]) -> dict[str, Any]:
        name = name_of(told["artifactID"])
        self.artifacts[name]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": told["artifactID"], "digest": self.artifacts[name]["digest"]}}}

    def _UseArtifact(self, told: dict[str, Any]) -> dict[str, Any]:
        name = name_of(told["artifactID"])
        self.used.append((told["runName"], name))
        return {"useArtifact": {"artifact": {"id": told["artifactID"]}}}

    def _ArtifactType(self, told: dict[str, Any]) -> dict[str, Any]:
        kept = self.artifacts.get(told["name"].partition(":")[0])
        return {"project": {"artifact": kept and {"artifactType": {"name": kept["type"]}}}}

    def _ArtifactByID(self, told: dict[str, Any]) -> dict[str, Any]:
        name = name_of(told["id"])
        kept = self.artifacts[name]
        project = {"id": identity("Project", "p"), "internalId": "1", "name": "p", "entity": {"name": ENTITY}}
        found = {
            "__typename": "Artifact",
            "id": told["id"],
            "artifactSequence": {"__typename": "ArtifactSequence", "name": name, "project": project},
            "artifactType": {"name": kept["type"]},
            "metadata": kept["metadata"],
            "state": kept["state"],
            "digest": kept["digest"],
            "tags": [],
            "size": 1,
            "fileCount": 1,
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "versionIndex": 0,
            "createdAt": "2026-01-01T00:00:00",
            "aliases": [],
            **dict.fromkeys(("description", "historyStep", "commitHash", "updatedAt")),
        }
        return {"artifact": found}

    def stream(self, name: str, told: dict[str, Any]) -> None:
        """What the client streams of a run: rows of its history at their places, its summary, its end."""
        with self.lock:
            run = self._run(name)
            for file, chunk in (told.get("files") or {}).items():
                for place, line in enumerate(chunk["content"], chunk["offset"]):
                    if file == "wandb-history.jsonl":
                        run["history"][place] = json.loads(line)
                    elif file == "wandb-summary.json":
                        run["summary"] |= json.loads(line)
            run["complete"] = run["complete"] or told.get("complete", False)
            run["exitcode"] = told.get("exitcode", run.get("exitcode"))


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            asked = json.loads(body)
            try:
                self._say({"data": self.server.answer(asked["query"], asked.get("variables") or {})})
            except Exception as error:  # the client is told, and the test sees it
                self.server.failures.append(f"{asked['query']}: {error!r}")
                self._say({"errors": [{"message": repr(error)}]}, 400)
        elif self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body))
            self._say({})
        else:  # telemetry
            self._say({}, 404)

    def do_PUT(self) -> None:
        self.server.files[unquote(self.path).removeprefix("/put/")] = self._body()
        self._say({})

    def do_GET(self) -> None:
        self._say({}, 404)

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _say(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
