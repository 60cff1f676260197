"""A service that speaks the agent's protocol, and a small signed release for it to serve.

For tests of the agent alone: it keeps no state but what the test asks about afterwards.
"""

import hashlib
import json
import random
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import zstandard
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from provisioner.core.batches import indexes_in, pack
from provisioner.core.manifest import Manifest
from provisioner.core.trust import TrustPolicy, key_id, signatures_to_bytes

MIB = 1024 * 1024
CHUNK = 64 * 1024
SEED = {
    "meta-data": "instance-id: i-1\n",
    "user-data": "#cloud-config\nhostname: lab-1\n",
    "vendor-data": "#cloud-config\n" + "# long\n" * 5000,
    "network-config": "version: 2\n",
}


@dataclass
class Release:
    """One release: its manifest, who signs it, and chunks by the path they are served at."""

    raw: bytes
    manifest: Manifest
    keys: tuple[Ed25519PrivateKey, ...]
    chunks: dict[str, bytes]

    @property
    def key(self) -> Ed25519PrivateKey:
        return self.keys[0]

    @property
    def folder(self) -> str:
        return f"/releases/{self.manifest.digest}"

    @property
    def signatures(self) -> bytes:
        return signed(self.manifest.to_bytes(), *self.keys)

    @property
    def trust(self) -> bytes:
        """A policy that trusts its keys, and asks for one signature."""
        return TrustPolicy(tuple(map(public_hex, self.keys))).to_bytes()

    def files(self) -> dict[str, bytes]:
        """Everything of it that is fetched, by path."""
        data = self.manifest.to_bytes()
        return {
            f"{self.folder}/manifest.json": data,
            f"{self.folder}/manifest.json.zst": zstandard.compress(data),
            f"{self.folder}/manifest.sig": self.signatures,
            **self.chunks,
        }

    def digest_at(self, offset: int) -> str:
        """Return the digest of the chunk at this byte of the image."""
        digest = self.manifest.chunks[offset // self.manifest.chunk_bytes]
        assert digest is not None
        return digest


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public half, as a policy names it."""
    return key.public_key().public_bytes_raw().hex()


def signed(data: bytes, *keys: Ed25519PrivateKey) -> bytes:
    """The signature file for these bytes by these keys."""
    return signatures_to_bytes({key_id(public_hex(key)): key.sign(data) for key in keys})


def chunk_path(digest: str) -> str:
    return f"/chunks/{digest[:2]}/{digest}"


def make_image(path: Path, *, size_mib: int, seed: int = 1) -> bytes:
    """Make a small image with a real GPT: every third MiB is data, the rest zeros."""
    path.write_bytes(b"")
    with path.open("r+b") as file:
        file.truncate(size_mib * MIB)
    script = (
        "label: gpt\n"
        "start=2048, size=2048, type=21686148-6449-6E6F-744E-656564454649, name=bios\n"
        f"start=4096, size={(size_mib - 3) * 2048}, type=L, name=root\n"
    )
    subprocess.run(["sfdisk", "--quiet", path], input=script, text=True, check=True)
    chance = random.Random(seed)
    with path.open("r+b") as file:
        # Boot code, which must survive.
        file.write(b"\xebBOOT" + chance.randbytes(200))
        for at in range(1, size_mib - 2, 3):
            file.seek(at * MIB)
            file.write(chance.randbytes(MIB // 2) + b"text that compresses " * (MIB // 42))
    return path.read_bytes()


def make_release(
    raw: bytes,
    *keys: Ed25519PrivateKey,
    chunk_bytes: int = CHUNK,
    **changes: Any,
) -> Release:
    """Chunk, pack and describe an image; `changes` replace fields of the manifest."""
    chunks: list[str | None] = []
    stored: dict[str, bytes] = {}
    packer = zstandard.ZstdCompressor(level=3)
    for at in range(0, len(raw), chunk_bytes):
        part = raw[at : at + chunk_bytes]
        if part.count(0) == len(part):
            chunks.append(None)
            continue
        digest = hashlib.sha256(part).hexdigest()
        chunks.append(digest)
        stored[chunk_path(digest)] = packer.compress(part)
    values: dict[str, Any] = {
        "image": "test",
        "version": "1",
        "architecture": "amd64",
        "size_bytes": len(raw),
        "chunk_bytes": chunk_bytes,
        "chunks": tuple(chunks),
        "firmware": ("bios", "uefi"),
        "release_id": "0" * 32,
        "root_digest": "0" * 64,
        "partitions": (),
        "packages": {},
        "recipe_digest": "0" * 64,
        "builder": "test",
        "built_at": "2026-11-23T12:00:00Z",
    }
    manifest = Manifest(**{**values, **changes})
    return Release(raw, manifest, keys or (Ed25519PrivateKey.generate(),), stored)


@dataclass
class Service:
    """What the servers answer, and what they were told. Change it while they run."""

    files: dict[str, bytes]
    hello: dict[str, Any]
    ticket: str = "ticket-1"
    token: str = "token-1"
    ca_pem: bytes = b""
    boot_url: str = ""
    agent_url: str = ""
    permits: bool = True
    expires_in_s: float = 30.0
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    # Called before each file is sent; may change `files`, or raise ConnectionError to cut.
    on_file: Callable[[str], None] = lambda _: None
    # Called with each file that is sent; what it returns is sent instead.
    alter: Callable[[str, bytes], bytes] = lambda _path, data: data
    # Called before each call is answered; a number is the HTTP status to answer instead.
    on_call: Callable[[str, dict[str, Any]], int | None] = lambda _name, _body: None
    # Called when a call was carried out, before its answer is sent; True cuts the connection.
    loses: Callable[[str], bool] = lambda _name: False
    # What an agent is answered that reports its failure.
    after_failure: dict[str, Any] = field(default_factory=dict)
    ended: threading.Event = field(default_factory=threading.Event)

    def file(self, path: str) -> bytes | None:
        """Return what stands at a path: a file, or a batch of chunks."""
        folder, found, spec = path.partition("/chunks/")
        manifest = self.files.get(f"{folder}/manifest.json") if folder and found else None
        if manifest is None:
            return self.files.get(path)
        digests = json.loads(manifest)["chunks"]
        frames = [self.files.get(chunk_path(digests[index])) for index in indexes_in(spec)]
        whole = [frame for frame in frames if frame is not None]
        return pack(whole) if len(whole) == len(frames) else None

    def asked_for(self) -> list[int]:
        """Return the numbers of all chunks that were asked for in batches, in order."""
        specs = [path.partition("/chunks/")[2] for path in self.fetched if is_batch(path)]
        return [index for spec in specs for index in indexes_in(spec)]

    def told(self, name: str) -> list[dict[str, Any]]:
        """Return the bodies of all calls of that name."""
        return [body for called, body in self.calls if called == name]

    def answer(self, name: str, body: dict[str, Any], token: str) -> tuple[int, dict[str, Any]]:
        """Answer one call of the agent."""
        self.calls.append((name, body))
        status = self.on_call(name, body)
        if status is not None:
            return status, {"status": status, "code": f"test_{status}", "detail": "as told"}
        if name == "hello":
            return self._hello(body)
        if token != f"Bearer {self.token}" or body["generation"] != self.hello["generation"]:
            return 403, {"code": "token", "detail": "not for you"}
        if name == "authorise":
            if not self.permits:
                return 403, {"code": "not_permitted", "detail": "not now"}
            return 200, {"permitted": True, "expires_in_s": self.expires_in_s}
        if name == "seed":
            return (200, SEED) if len(self.told("seed")) == 1 else (410, {"code": "gone"})
        if name in ("done", "compared", "failed"):
            self.ended.set()
        answers: dict[str, dict[str, Any]] = {
            "progress": {"go_on": True},
            "done": {"restart": "reboot"},
            "failed": self.after_failure,
        }
        return 200, answers.get(name, {})

    def _hello(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Answer a session's tries, each later one with a new token, and no other session."""
        earlier = self.told("hello")[:-1]
        if body["ticket"] != self.ticket or any(
            known["session"] != body["session"] or known["attempt"] >= body["attempt"]
            for known in earlier
            if known["ticket"] == self.ticket
        ):
            return 403, {"code": "ticket", "detail": "the ticket is not valid"}
        self.token = f"token-{len(earlier) + 1}"
        return 200, {**self.hello, "token": self.token, "boot_url": self.boot_url}


def is_batch(path: str) -> bool:
    return path.startswith("/releases/") and "/chunks/" in path


def deployment(release: Release, **changes: Any) -> dict[str, Any]:
    """Return the answer to hello for a deployment of the release; `changes` replace parts."""
    return {
        "operation": "op_1",
        "generation": 3,
        "kind": "deployment",
        "host": "lab-1",
        "heartbeat_s": 1,
        "release": release.manifest.digest,
        "disk_rule": {"serial": "LAB-1-0"},
        "then": "reboot",
        **changes,
    }


@contextmanager
def running(service: Service, *, seen_at: str = "127.0.0.1") -> Iterator[Service]:
    """Run both listeners on loopback; `seen_at` is the address that the agent uses for it."""
    files = ThreadingHTTPServer(("127.0.0.1", 0), _file_handler(service))
    calls = ThreadingHTTPServer(("127.0.0.1", 0), _call_handler(service))
    key_pem, service.ca_pem = self_signed(seen_at)
    calls.socket = _tls(key_pem, service.ca_pem).wrap_socket(calls.socket, server_side=True)
    service.boot_url = f"http://{seen_at}:{files.server_port}"
    service.agent_url = f"https://{seen_at}:{calls.server_port}"
    threads = [
        threading.Thread(target=server.serve_forever, args=(0.05,)) for server in (files, calls)
    ]
    for thread in threads:
        thread.start()
    try:
        yield service
    finally:
        for server, thread in zip((files, calls), threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def self_signed(address: str) -> tuple[bytes, bytes]:
    """Return a private key and a certificate for an IP address, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "provisioner")])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Valid in the past only: the agent must not care about anybody's clock.
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now - timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))]), False)
    )
    certificate = builder.sign(key, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return private, certificate.public_bytes(serialization.Encoding.PEM)


def _tls(key_pem: bytes, certificate_pem: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        file.write(key_pem + certificate_pem)
        file.flush()
        context.load_cert_chain(file.name)
    return context


def _file_handler(service: Service) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            service.fetched.append(self.path)
            try:
                service.on_file(self.path)
            except ConnectionError:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
                self.close_connection = True
                return
            data = service.file(self.path)
            sent = b"" if data is None else service.alter(self.path, data)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    return Handler


def _call_handler(service: Service) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = self.path.removeprefix("/agent/v1/")
            status, value = service.answer(name, body, self.headers.get("Authorization", ""))
            if service.loses(name):
                self.close_connection = True
                return
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    return Handler
