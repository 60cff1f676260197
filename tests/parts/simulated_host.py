"""A host behind a real IPMI BMC, without hardware: it boots, runs its agent over real HTTP and
HTTPS, restarts and phones home. The BMC's chassis program writes down what happened to it.
"""

import base64
import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx

from provisioner.settings import Settings
from tests.parts.service_site import inventory, mac

# Called by ipmi_sim as: get power|boot, or set power|reset|shutdown|boot VALUE. `log` has a
# line for each thing that really happened: `off`, `on pxe`, `reset default`, `next pxe`.
CHASSIS: Final = """\
#!/bin/sh
cd "{directory}" || exit 1
read -r power < power
read -r boot < boot
case "$1 $2" in
"get power") echo "power:$power" ;;
"get boot") echo "boot:$boot" ;;
"set power"|"set shutdown")
  [ "$2" = shutdown ] && wanted=0 || wanted=$3
  [ "$power" = "$wanted" ] && exit 0
  echo "$wanted" > power
  if [ "$wanted" = 0 ]; then echo off >> log.host; exit 0; fi
  echo "on $boot" >> log.host; echo default > boot ;;
"set reset")
  [ "$power" = 1 ] || exit 0
  echo "reset $boot" >> log.host; echo default > boot ;;
"set boot") echo "$3" > boot; echo "next $3" >> log.host ;;
esac
"""

LOOK_S: Final = 0.01
ASK_AGAIN_S: Final = 0.05
REPORT_AGAIN_S: Final = 0.5
OLD: Final = "the old system"


class Cut(Exception):
    """The host lost its power, or was reset, in the middle of what it did."""


@dataclass
class SimulatedHost:
    """`behave` says what its agent does after the hello: `deploy`, `fail`, or `hang`.

    `system` is what its disk holds: the old system, or the nonce of a new one. `said` is what
    it did, in order.
    """

    settings: Settings
    bmc_folder: Path
    number: int = 1
    release_id: str = ""
    behave: str = "deploy"
    # The digest of a release at which its disk fails in the middle of the write.
    unfit: str = ""
    system: str = OLD
    said: list[str] = field(default_factory=list)
    # How long an agent that gave up waits before it restarts by itself. Longer than a worker
    # takes to be started again, on a busy machine too: a real host takes as long to come up.
    patience_s: float = 20.0
    # Called with each call of its agent before it is made, and with each that was answered.
    on_call: Callable[[str], None] = lambda _name: None
    on_answer: Callable[[str], None] = lambda _name: None
    # How often it looks at its power, and how long it waits when nobody answers: doubled each
    # time, up to the longest pause.
    look_s: float = LOOK_S
    ask_again_s: float = ASK_AGAIN_S
    pause_max_s: float = ASK_AGAIN_S
    _power_ons: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        trust = ssl.create_default_context(cafile=str(self.settings.keys.agent_tls_pem))
        trust.check_hostname = False
        self._http = httpx.Client(verify=trust, timeout=60, trust_env=False)
        self._thread = threading.Thread(target=self._live, daemon=True)

    def install(self) -> None:
        """Put its chassis program in place, with the host switched on and its log empty."""
        (self.bmc_folder / "chassis").write_text(CHASSIS.format(directory=self.bmc_folder))
        (self.bmc_folder / "power").write_text("1\n")
        (self.bmc_folder / "log.host").write_text("")

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Do nothing more; `stop` waits until that is so."""
        self._over.set()

    def stop(self) -> None:
        self.end()
        self._thread.join(60)
        self._http.close()

    def happened(self) -> list[str]:
        """Return what the BMC did to the host, in order; boot flags aside."""
        return [line for line in self._log() if not line.startswith("next")]

    def forget(self) -> None:
        """Begin a new page: what happened before is of no interest any more."""
        (self.bmc_folder / "log.host").write_text("")
        self.said.clear()
        self._power_ons = 0

    def _log(self) -> list[str]:
        lines = (self.bmc_folder / "log.host").read_text().splitlines()
        return [line for line in lines if line]

    def boots(self) -> list[bool]:
        """Return for each time it booted whether that was from the network."""
        return [line.endswith("pxe") for line in self._log() if line.startswith(("on", "reset"))]

    def is_on(self) -> bool:
        return (self.bmc_folder / "power").read_text().strip() != "0"

    def _live(self) -> None:
        while not self._over.wait(self.look_s):
            boots = self.boots()
            if len(boots) <= self._power_ons:
                continue
            self._power_ons = len(boots)
            try:
                self._boot(is_network=boots[-1])
            except Cut:
                self.said.append("cut off")

    def _check_power(self) -> None:
        if self._over.is_set() or not self.is_on() or len(self.boots()) != self._power_ons:
            raise Cut

    def _pauses(self) -> Iterator[None]:
        """Yield at once and then after growing pauses, for as long as the host is as it was.
        Raises Cut when it is not."""
        pause_s = self.ask_again_s
        while True:
            self._check_power()
            yield
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, self.pause_max_s)

    def _boot(self, *, is_network: bool) -> None:
        while is_network:
            script = self._asked(f"{self.settings.boot.url}/boot/ipxe?mac={mac(self.number)}")
            ticket = re.search(r"provisioner\.ticket=(\S+)", script)
            if ticket is None:
                break
            self._run_agent(ticket[1])
            is_network = False  # a one-time boot flag: from here on it is its disk
        self.said.append("boots its disk")
        if self.system != OLD:
            self._phone_home()

    def _asked(self, url: str) -> str:
        for _ in self._pauses():
            self.on_call("script")
            with suppress(httpx.TransportError):
                script = self._http.get(url).text
                self.on_answer("script")
                return script
        raise Cut

    def _run_agent(self, ticket: str) -> None:
        about = inventory(self.number)
        session, attempt = f"{id(object()):064x}"[-64:], 0

        def hello() -> dict[str, Any]:
            nonlocal attempt
            attempt += 1
            return {
                "ticket": ticket,
                "session": session,
                "attempt": attempt,
                "inventory": about,
                "agent_version": "1",
            }

        orders = self._call("hello", hello)
        if orders is None:
            self.said.append("was refused")
            return
        self.said.append(f"agent is told {orders['kind']}")
        token, known = orders["token"], {"generation": orders["generation"]}
        if self.behave == "hang":
            self._hang()
            return
        if self.behave == "fail":
            body = {"code": "no_disk_matches", "message": "there is no disk", **known}
            self._call("failed", lambda: body, token)
            self._hang()
            return
        self._deploy(orders["release"], about["disks"][0], token, known)

    def _deploy(self, release: str, disk: dict[str, Any], token: str, known: Any) -> None:
        own = {key: disk[key] for key in ("name", "serial", "wwn", "size_bytes")}
        calls: list[tuple[str, dict[str, Any]]] = [
            ("authorise", {"release": release, "disk": own}),
            ("progress", {"phase": "writing", "done_bytes": 1}),
            ("seed", {}),
            ("progress", {"phase": "verifying", "done_bytes": 2}),
            (
                "done",
                {"release": release, "written_bytes": 2, "fetched_bytes": 2, "seconds": {}},
            ),
        ]
        nonce = ""
        for name, body in calls:
            told = self._call(name, partial(dict, body, **known), token)
            if told is None:
                self._stop_at(name, token, known)
                return
            if name == "authorise":
                self.said.append("writes")
                self.system = OLD
            if name == "progress" and release == self.unfit:
                self._fail_at_the_disk(token, known)
                return
            if name == "seed":
                nonce = _nonce_in(told["vendor-data"])
        self.system = nonce

    def _fail_at_the_disk(self, token: str, known: Any) -> None:
        broken = {"code": "disk_failed", "message": "the disk failed", **known}
        self._call("failed", lambda: broken, token)
        self.said.append("fails in the middle")
        self._hang()

    def _stop_at(self, name: str, token: str, known: Any) -> None:
        if name == "seed":
            gone = {"code": "seed_gone", "message": "the seed had left", **known}
            self._call("failed", lambda: gone, token)
        self.said.append(f"stops at {name}")
        self._hang()

    def _hang(self) -> None:
        """Stay in the ramdisk until the BMC acts, or the agent loses its patience."""
        end = time.monotonic() + self.patience_s
        while time.monotonic() < end:
            self._check_power()
            time.sleep(self.look_s)
        self.said.append("agent restarts by itself")

    def _phone_home(self) -> None:
        disk = inventory(self.number)["disks"][0]
        body = {
            "nonce": self.system,
            "release_id": self.release_id,
            "root_disk": {"name": "sda", "serial": disk["serial"], "wwn": disk["wwn"]},
            "ssh_host_keys": [],
            "failed_units": [],
        }
        told = self._call("phone-home", lambda: body, where="report")
        while told and told["ask_again"]:
            self._check_power()
            time.sleep(REPORT_AGAIN_S)
            told = self._call("phone-home", lambda: body, where="report")
        self.said.append("is accepted" if told else "is not accepted")
        if told is None:
            self.system = OLD  # told that its nonce is spent, a reporter forgets it

    def _call(
        self, name: str, body: Callable[[], Any], token: str = "", where: str = "agent"
    ) -> Any:
        """Make a call until it is answered; None when the answer is no."""
        url = f"{self.settings.agent.url}/{where}/v1/{name}"
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        for _ in self._pauses():
            self.on_call(name)
            with suppress(httpx.TransportError):
                answer = self._http.post(url, json=body(), headers=headers)
                if answer.status_code < 500:
                    self.on_answer(name)
                    return answer.json() if answer.is_success else None
        raise Cut


def _nonce_in(vendor_data: str) -> str:
    packed = vendor_data.split("reporter.json 0600 << 'END'\n")[1].split("\nEND")[0]
    return str(json.loads(base64.b64decode(packed))["nonce"])
