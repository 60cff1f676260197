"""The API client: one method for each route, for the command line and for anyone's script.

Only reads are tried again by themselves. A change is sent once, with a key that lets a
caller repeat it safely.
"""

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

import httpx

from provisioner.core.model import Secret
from provisioner.errors import RequestError, Unavailable

from .problems import checked_token, error_of, no_answer

Json = dict[str, Any]

CONNECT_LIMIT_S: Final = 5.0
# A power action may take as long as an exchange with a BMC.
ANSWER_LIMIT_S: Final = 60.0
READ_ATTEMPTS_MAX: Final = 3
READ_PAUSE_S: Final = 0.5  # times the number of the attempt
OBSERVES: Final = "Provisioner-Observe-Only"
PAGE: Final = 1000
HOSTS_MAX: Final = 100_000
IDS_PER_REQUEST: Final = 50  # an id has some 20 characters; a request line holds 2048


class Client:
    """A connection to one service. Close it, or use it in a `with`.

    Every method raises the error that the service answered with (see provisioner.errors),
    and Unavailable when it does not answer at all.
    """

    def __init__(
        self, url: str, token: Secret | str, *, pause: Callable[[float], None] = time.sleep
    ) -> None:
        secret = checked_token(token.reveal() if isinstance(token, Secret) else token)
        if not url.startswith(("http://", "https://")):
            raise RequestError(
                "the service's URL is not one", expected="http://127.0.0.1:8080", found=url
            )
        self.url = url.rstrip("/")
        self._pause = pause
        # Whether the last answer said that its database was restored, and nothing is done.
        self.only_observes = False
        try:
            self._http = httpx.Client(
                base_url=self.url + "/api/v1",
                headers={"Authorization": f"Bearer {secret}"},
                timeout=httpx.Timeout(ANSWER_LIMIT_S, connect=CONNECT_LIMIT_S),
                # An environment variable must not send a token through somebody's proxy.
                trust_env=False,
            )
        except httpx.InvalidURL as error:
            raise RequestError("the service's URL is not one", found=url) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # hosts

    def hosts(self) -> list[Json]:
        """Return all hosts by name, without inventories."""
        found: list[Json] = []
        after = ""
        while len(found) < HOSTS_MAX:
            page = self._get("/hosts", {"after": after, "limit": PAGE})
            found += page["hosts"]
            after = page["next"]
            if not after:
                break
        return found

    def host(self, name: str) -> Json:
        return self._get(f"/hosts/{_part(name)}")

    def add_host(self, spec: Mapping[str, Any]) -> Json:
        """Enrol a host: {"name", "macs", "bmc"?, "profile"?, …}, see /openapi.json."""
        return self._change("POST", "/hosts", dict(spec))

    def import_hosts(self, specs: Sequence[Mapping[str, Any]]) -> list[Json]:
        """Enrol all of the hosts, or none."""
        body = {"hosts": [dict(spec) for spec in specs]}
        added: list[Json] = self._change("POST", "/hosts/import", body)["hosts"]
        return added

    def change_host(self, name: str, changes: Mapping[str, Any]) -> Json:
        return self._change("PATCH", f"/hosts/{_part(name)}", dict(changes))

    def delete_host(self, name: str) -> None:
        self._change("DELETE", f"/hosts/{_part(name)}")

    def power(self, name: str, action: str) -> str | None:
        """Do one of status, on, off, soft-off, reset. Returns on or off for status."""
        path = f"/hosts/{_part(name)}/power"
        answer: str | None = self._change("POST", path, {"action": action})["power"]
        return answer

    def check_bmc(self, name: str) -> list[Json]:
        """Return what makes the host's BMC open to people without a password."""
        found: list[Json] = self._change("POST", f"/hosts/{_part(name)}/bmc-check", {})["findings"]
        return found

    def set_flags(
        self,
        name: str,
        *,
        is_protected: bool | None = None,
        in_maintenance: bool | None = None,
        release_quarantine: bool = False,
    ) -> Json:
        body: Json = {"release_quarantine": release_quarantine}
        if is_protected is not None:
            body["is_protected"] = is_protected
        if in_maintenance is not None:
            body["in_maintenance"] = in_maintenance
        return self._change("POST", f"/hosts/{_part(name)}/flags", body)

    def confirm_host(self, name: str, changes: Mapping[str, Any]) -> Json:
        """Take a discovered host into management: {"new_name"?, "bmc"?, "profile"?}."""
        return self._change("POST", f"/hosts/{_part(name)}/confirm", dict(changes))

    def inspect_host(self, name: str) -> Json:
        return self._change("POST", f"/hosts/{_part(name)}/inspect")

    def host_events(self, name: str, *, after: int | None = None, limit: int = 200) -> list[Json]:
        """Return a host's events after a number, or the newest; oldest first."""
        query = _page(after, limit)
        events: list[Json] = self._get(f"/hosts/{_part(name)}/events", query)["events"]
        return events

    def why(self, name: str) -> Json:
        """Return where a host's boot stands, why, and what to do."""
        return self._get(f"/hosts/{_part(name)}/why", {})

    # operations

    def deploy(
        self,
        hosts: Sequence[str],
        release: str,
        *,
        soft_shutdown: bool = True,
        full: bool = False,
        attempts: int | None = None,
    ) -> list[Json]:
        """Queue a deployment of `release` for every host, or for none of them.

        `full` writes everything, also what stands on the disk already. `attempts` is how often
        it is tried in all, when the settings shall not say so.
        """
        options: Json = {"soft_shutdown": soft_shutdown, "full": full}
        if attempts is not None:
            options["attempts"] = attempts
        body = {"hosts": list(hosts), "release": release, "options": options}
        queued: list[Json] = self._change("POST", "/deployments", body)["operations"]
        return queued

    def verify(self, hosts: Sequence[str], release: str | None = None) -> list[Json]:
        """Queue a comparison of every host's disk with a release, or with what it runs.

        Nothing is written. The operations' evidence tells how much differs.
        """
        body: Json = {"hosts": list(hosts), "release": release}
        queued: list[Json] = self._change("POST", "/verifications", body)["operations"]
        return queued

    def operations(
        self, *, host: str | None = None, only_open: bool = False, limit: int = 100
    ) -> list[Json]:
        """Return operations, newest first."""
        query: dict[str, Any] = {"open": only_open, "limit": limit}
        if host is not None:
            query["host"] = host
        found: list[Json] = self._get("/operations", query)["operations"]
        return found

    def operations_by_id(self, ids: Sequence[str]) -> list[Json]:
        """Return these operations, in this order."""
        found: list[Json] = []
        # A request line is short; the ids go in slices that fit.
        for start in range(0, len(ids), IDS_PER_REQUEST):
            query = {"ids": ",".join(ids[start : start + IDS_PER_REQUEST])}
            found += self._get("/operations", query)["operations"]
        return found

    def operation(self, operation_id: str) -> Json:
        return self._get(f"/operations/{_part(operation_id)}")

    def cancel(self, operation_id: str) -> Json:
        return self._change("POST", f"/operations/{_part(operation_id)}/cancel")

    def breaker(self) -> Json:
        """Return whether the breaker is open, since when, and why."""
        return self._get("/breaker")

    def close_breaker(self, reason: str) -> Json:
        """Let queued operations start again."""
        return self._change("POST", "/breaker/close", {"reason": reason})

    def follow(self, operation_id: str) -> Iterator[Json]:
        """Yield an operation at each of its changes, until it is final or the stream ends."""
        path = f"/operations/{_part(operation_id)}/stream"
        try:
            with self._http.stream("GET", path) as response:
                if response.is_error:
                    response.read()
                    raise error_of(response)
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        yield json.loads(line.removeprefix("data: "))
        except httpx.TransportError as error:
            raise no_answer(self.url, error) from error

    # releases and channels

    def releases(self, *, with_removed: bool = False) -> list[Json]:
        found: list[Json] = self._get("/releases", {"removed": with_removed})["releases"]
        return found

    def release(self, reference: str) -> Json:
        """Return a release: image@version, image:channel, or the start of a digest."""
        return self._get(f"/releases/{_part(reference)}")

    def release_tests(self, reference: str) -> list[Json]:
        """Return how its tests went, the newest first."""
        tests: list[Json] = self._get(f"/releases/{_part(reference)}/tests")["tests"]
        return tests

    def release_part(self, reference: str, part: str) -> Iterator[bytes]:
        """Yield the blocks of a release's `log` (text), `files` or `spdx` (JSON)."""
        path = f"/releases/{_part(reference)}/{_part(part)}"
        try:
            with self._http.stream("GET", path) as response:
                if response.is_error:
                    response.read()
                    raise error_of(response)
                yield from response.iter_bytes()
        except httpx.TransportError as error:
            raise no_answer(self.url, error) from error

    def channels(self) -> list[Json]:
        found: list[Json] = self._get("/channels")["channels"]
        return found

    def promote(self, release: str, channel: str) -> Json:
        """Let the channel of the release's image point to it."""
        found = self.release(release)
        path = f"/channels/{_part(found['image'])}/{_part(channel)}"
        # By its digest: a channel that `release` names may move meanwhile.
        return self._change("PUT", path, {"release": found["digest"]})

    def revoke_release(self, reference: str, reason: str) -> Json:
        """Stop every deployment of a release, present and to come."""
        path = f"/releases/{_part(reference)}/revoke"
        return self._change("POST", path, {"reason": reason})

    # profiles

    def profiles(self) -> list[Json]:
        found: list[Json] = self._get("/profiles")["profiles"]
        return found

    def profile(self, name: str) -> Json:
        return self._get(f"/profiles/{_part(name)}")

    def save_profile(
        self, name: str, document: Mapping[str, Any], *, check_schema: bool = True
    ) -> Json:
        """Save a revision; return it, with what cloud-init's schema said of it."""
        body = {"document": dict(document), "check_schema": check_schema}
        return self._change("PUT", f"/profiles/{_part(name)}", body)

    def delete_profile(self, name: str) -> None:
        self._change("DELETE", f"/profiles/{_part(name)}")

    # services

    def services(self) -> list[Json]:
        found: list[Json] = self._get("/services")["services"]
        return found

    # audit and tokens

    def audit(self, *, after: int | None = None, limit: int = 200) -> list[Json]:
        """Return rows of the audit log after a number, or the newest; oldest first."""
        query = _page(after, limit)
        rows: list[Json] = self._get("/audit", query)["rows"]
        return rows

    def verify_audit(self) -> int:
        """Return how many rows hold together. Raises TrustError when one does not."""
        checked: int = self._get("/audit/verify")["rows_checked"]
        return checked

    def reconciliation(self) -> Json:
        """Return the plan by which a service goes on whose database was restored."""
        return self._get("/reconciliation")

    def reconcile(self, digest: str) -> Json:
        """Carry out the plan of that digest."""
        return self._change("POST", "/reconciliation", {"digest": digest})

    def tokens(self) -> list[Json]:
        found: list[Json] = self._get("/tokens")["tokens"]
        return found

    def create_token(self, name: str, role: str, *, expires_in_s: int | None = None) -> Secret:
        body: Json = {"name": name, "role": role}
        if expires_in_s is not None:
            body["expires_in_s"] = expires_in_s
        return Secret(self._change("POST", "/tokens", body)["token"])

    def revoke_token(self, name: str) -> None:
        self._change("DELETE", f"/tokens/{_part(name)}")

    # carrying it

    def _get(self, path: str, query: Mapping[str, Any] | None = None) -> Json:
        for attempt in range(1, READ_ATTEMPTS_MAX + 1):
            try:
                return _body(self._send("GET", path, query=query))
            except Unavailable:
                if attempt == READ_ATTEMPTS_MAX:
                    raise
                self._pause(READ_PAUSE_S * attempt)
        raise AssertionError("unreachable")

    def _change(self, method: str, path: str, body: Json | None = None) -> Json:
        headers = {"Idempotency-Key": secrets.token_hex(16)}
        return _body(self._send(method, path, body=body, headers=headers))

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Json | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        try:
            response = self._http.request(
                method, path, params=query, json=body, headers=dict(headers or {})
            )
        except httpx.TransportError as error:
            raise no_answer(self.url, error) from error
        self.only_observes = OBSERVES in response.headers
        if response.is_error:
            raise error_of(response)
        return response


def _page(after: int | None, limit: int) -> dict[str, int]:
    return {"limit": limit} if after is None else {"after": after, "limit": limit}


def _part(name: str) -> str:
    """Return one path segment. Raises RequestError for what is none: an empty one would turn
    a request about one thing into a request about all."""
    if not name or name in (".", "..") or "/" in name:
        found = name or "nothing"
        raise RequestError("that is not a name", expected="a name or an id", found=found)
    return quote(name, safe="@")


def _body(response: httpx.Response) -> Json:
    if not response.content:
        return {}
    try:
        body = response.json()
    except ValueError as error:
        raise Unavailable(
            "the answer is not JSON; is this the provisioner's API?", found=str(response.url)
        ) from error
    return body if isinstance(body, dict) else {}
