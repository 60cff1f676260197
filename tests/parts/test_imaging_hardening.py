"""Measures that harden an image: small, named, strict about their data, and really in force."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from provisioner.errors import RequestError
from provisioner.imaging.firewall import PORTS_MAX, Firewall, rules_file
from provisioner.imaging.hardening import (
    APT_FILE,
    LIMITS_FILE,
    MODULES_FILE,
    SSH_FILE,
    SYSCTL_FILE,
    SYSTEMD_FILE,
    Hardening,
    parts_of,
    read_hardening,
)
from provisioner.imaging.recipe_parts import RecipeFile

LIMIT_S: Final = 300
# sh: two namespaces joined by a wire; $RULES is loaded in the one that answers at 10.0.0.1.
NETWORK: Final = r"""
set -eu
ip link set lo up
unshare --net sleep 300 & far=$!
trap 'kill $far' EXIT
until [ "$(readlink /proc/$far/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add near type veth peer name far netns "/proc/$far/ns/net"
ip addr add 10.0.0.1/24 dev near; ip addr add fd00::1/64 dev near nodad; ip link set near up
there() { nsenter --net="/proc/$far/ns/net" "$@"; }
there ip addr add 10.0.0.2/24 dev far; there ip addr add fd00::2/64 dev far nodad
there ip link set far up; there ip link set lo up
nft -f "$RULES"
"""


def files_of(**measures: Any) -> dict[str, str]:
    return {file.path: file.content for file in parts_of(read_hardening(measures)).files}


def test_nothing_said_adds_nothing() -> None:
    parts = parts_of(Hardening())
    assert not parts.packages
    assert not parts.files
    assert not parts.scripts
    assert not parts.services.enable


@pytest.mark.parametrize(
    ("measure", "value", "path", "line"),
    [
        ("ssh", "keys-only", SSH_FILE, "PasswordAuthentication no"),
        ("ssh", "keys-only", SSH_FILE, "AuthenticationMethods publickey"),
        ("core_dumps", False, SYSCTL_FILE, "kernel.core_pattern = |/bin/false"),
        ("core_dumps", False, LIMITS_FILE, "* hard core 0"),
        ("core_dumps", False, SYSTEMD_FILE, "DefaultLimitCORE=0"),
        ("blocked_modules", ["sctp"], MODULES_FILE, "install sctp /bin/false"),
        ("sysctl", {"kernel.kptr_restrict": 2}, SYSCTL_FILE, "kernel.kptr_restrict = 2"),
        ("sysctl", {"net.ipv4.tcp_rmem": "4096 1 2"}, SYSCTL_FILE, "net.ipv4.tcp_rmem = 4096 1 2"),
        ("automatic_upgrades", False, APT_FILE, 'APT::Periodic::Enable "0";'),
    ],
)
def test_a_measure_writes_its_file(measure: str, value: object, path: str, line: str) -> None:
    assert line in files_of(**{measure: value})[path].splitlines()


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ("ssh", "as-packaged"),
        ("passwords", "allowed"),
        ("core_dumps", True),
        ("automatic_upgrades", True),
        ("firewall", False),
    ],
)
def test_every_measure_can_be_switched_off_above(measure: str, value: object) -> None:
    on = {
        "ssh": "keys-only",
        "passwords": "locked",
        "core_dumps": False,
        "automatic_upgrades": False,
        "firewall": {"policy": "drop"},
    }
    below = read_hardening({measure: on[measure]})
    assert parts_of(below) != parts_of(Hardening())
    assert parts_of(below.with_more(read_hardening({measure: value}))) == parts_of(Hardening())


def test_measures_on_top_add_to_those_below() -> None:
    below = read_hardening(
        {
            "ssh": "keys-only",
            "firewall": {"policy": "drop", "accept_tcp": [22]},
            "sysctl": {"a.b": 1, "a.c": 1},
            "blocked_modules": ["sctp"],
        }
    )
    above = read_hardening(
        {
            "firewall": {"policy": "drop", "accept_tcp": [443, 80, 22], "accept_udp": [443]},
            "sysctl": {"a.c": 2},
            "blocked_modules": ["dccp"],
        }
    )
    both = below.with_more(above)
    assert both.ssh == "keys-only"
    assert both.firewall == Firewall(accept_tcp=(22, 80, 443), accept_udp=(443,))
    assert both.sysctl == (("a.b", "1"), ("a.c", "2"))
    assert both.blocked_modules == ("dccp", "sctp")


def test_a_recipes_own_kernel_parameters_win_over_a_measures() -> None:
    said = files_of(core_dumps=False, sysctl={"kernel.core_pattern": "/tmp/core.%p"})[SYSCTL_FILE]
    assert said.count("kernel.core_pattern") == 1
    assert "kernel.core_pattern = /tmp/core.%p" in said


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ("ssh", "passwords"),
        ("ssh", True),
        ("passwords", False),
        ("firewall", True),
        ("firewall", {}),
        ("firewall", {"policy": "accept"}),
        ("firewall", {"policy": "drop", "accept": [22]}),
        ("firewall", {"policy": "drop", "accept_tcp": [0]}),
        ("firewall", {"policy": "drop", "accept_tcp": [65536]}),
        ("firewall", {"policy": "drop", "accept_tcp": [True]}),
        ("firewall", {"policy": "drop", "accept_tcp": ["22 } accept; #"]}),
        ("firewall", {"policy": "drop", "accept_tcp": list(range(1, PORTS_MAX + 2))}),
        ("sysctl", ["kernel.sysrq"]),
        ("sysctl", {"sysrq": 1}),
        ("sysctl", {"kernel.sysrq\nkernel.x": 1}),
        ("sysctl", {"-kernel.sysrq": 1}),
        ("sysctl", {"kernel.sysrq": True}),
        ("sysctl", {"kernel.sysrq": None}),
        ("sysctl", {"kernel.core_pattern": "|/bin/sh -c 'x'"}),
        ("sysctl", {"kernel.hostname": "a\nkernel.sysrq = 1"}),
        ("sysctl", {"kernel.hostname": " a"}),
        ("sysctl", {"kernel.hostname": "a" * 129}),
        ("core_dumps", "off"),
        ("blocked_modules", "sctp"),
        ("blocked_modules", ["sctp /bin/true\ninstall x"]),
        ("automatic_upgrades", 0),
    ],
)
def test_wrong_data_is_refused(measure: str, value: object) -> None:
    with pytest.raises(RequestError):
        read_hardening({measure: value})


def test_an_unknown_measure_gets_a_suggestion() -> None:
    with pytest.raises(RequestError, match="'firewal'") as caught:
        read_hardening({"firewal": {"policy": "drop"}})
    assert caught.value.hint == "did you mean 'firewall'?"


@pytest.mark.parametrize(
    ("shadow", "code"),
    [
        ("root:!*:20781:::::\ndaemon:*:20781:::::\n", 0),
        ("root:!*:20781:::::\nme:$y$j9T$abc:20781:::::\n", 1),
        ("root::20781:::::\n", 1),
    ],
)
def test_locked_passwords_are_checked_at_the_end_of_a_build(
    tmp_path: Path, shadow: str, code: int
) -> None:
    """An account with a password, or with none to be asked for, ends the build."""
    (script,) = parts_of(read_hardening({"passwords": "locked"})).scripts
    (tmp_path / "shadow").write_text(shadow)
    program = tmp_path / "script"
    program.write_text(script.content.replace("/etc/shadow", str(tmp_path / "shadow")))
    program.chmod(0o755)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == code
    assert bool(re.search(r"locked: (me|root)\n", done.stderr)) == bool(code)


@pytest.fixture
def in_network(tmp_path: Path) -> Any:
    """Run shell commands in a network behind a firewall; as root, or as root of a namespace."""

    def run(firewall: Firewall, commands: str) -> list[str]:
        rules = tmp_path / "rules"
        rules.write_text(rules_file(firewall).content)
        nft = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin")
        assert nft, "script/setup installs nftables"
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", NETWORK + commands],
            env={"RULES": str(rules), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return run


# A refusal comes at once, or on a busy machine a little later; what is dropped never does.
TRY: Final = r"""
try() { if there curl -s -m "$2" "telnet://$1" </dev/null >/dev/null 2>&1; then
    echo "$1:open"; else case $? in 28) echo "$1:dropped";; *) echo "$1:refused";; esac; fi; }
"""


def test_the_firewall_lets_in_what_it_says_and_nothing_else(in_network: Any) -> None:
    """A port that is open but on which nobody listens refuses; a closed one says nothing."""
    firewall = Firewall(accept_tcp=(22, 80))
    tries = "try 10.0.0.1:22 60; try '[fd00::1]:80' 60\ntry 10.0.0.1:23 2; try '[fd00::1]:443' 2\n"
    assert in_network(firewall, TRY + tries) == [
        "10.0.0.1:22:refused",
        "[fd00::1]:80:refused",
        "10.0.0.1:23:dropped",
        "[fd00::1]:443:dropped",
    ]


def test_the_firewall_lets_out_and_lets_answers_and_pings_in(in_network: Any) -> None:
    """IPv6 works at all, since neighbours are answered; and a connection out gets through."""
    said = in_network(
        Firewall(),
        "there ping -c 1 -w 60 10.0.0.1 >/dev/null && echo ping4\n"
        "there ping -c 1 -w 60 fd00::1 >/dev/null && echo ping6\n"
        "curl -s -m 60 telnet://10.0.0.2:9 || [ $? = 7 ] && echo answered\n"
        "nft list chain inet filter forward | grep -c 'policy drop'\n",
    )
    assert said == ["ping4", "ping6", "answered", "1"]


def test_a_profile_may_add_rules_of_its_own(in_network: Any, tmp_path: Path) -> None:
    """Files in /etc/nftables.d are read with the image's rules."""
    more = tmp_path / "nftables.d"
    more.mkdir()
    (more / "site.nft").write_text("add rule inet filter input tcp dport 8080 accept\n")
    rules = rules_file(Firewall())
    assert 'include "/etc/nftables.d/*.nft"' in rules.content
    said = in_network(
        Firewall(),
        f'sed "s:/etc/nftables.d:{more}:" "$RULES" > "$RULES.site"; nft -f "$RULES.site"\n'
        "nft list chain inet filter input | grep -c 8080\n",
    )
    assert said == ["1"]


def test_the_rules_are_a_file_that_only_root_changes() -> None:
    assert rules_file(Firewall()) == RecipeFile(
        "/etc/nftables.conf", rules_file(Firewall()).content, "0644"
    )
