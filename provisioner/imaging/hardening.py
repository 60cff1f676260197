"""Named measures that make an image harder to attack, and the files and units they consist of.

Each is one small thing with its data. A recipe names those it wants; one on top of another
adds to them, or switches one off. Nothing here acts: measures become parts of a recipe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from provisioner.imaging.firewall import Firewall, read_firewall, rules_file
from provisioner.imaging.recipe_parts import RecipeFile, Script, Services
from provisioner.imaging.strict_yaml import check_keys, mapping, one_of, strings, wrong

_T = TypeVar("_T")

_PARAMETER: Final = re.compile(r"[a-z0-9_]+(\.[A-Za-z0-9_/-]+)+")
_SETTING: Final = re.compile(r"[A-Za-z0-9_.,:/%|+-]+( [A-Za-z0-9_.,:/%|+-]+)*")
SETTING_CHARACTERS_MAX: Final = 128
_MODULE: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")

# sshd takes the first value it finds for a word, and reads these files by name.
SSH_FILE: Final = "/etc/ssh/sshd_config.d/01-hardening.conf"
_SSH: Final = """\
# Nobody logs in by a password, whatever a later file says (sshd takes the first value).
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitEmptyPasswords no
AuthenticationMethods publickey
PermitRootLogin prohibit-password
X11Forwarding no
"""
# Behind Debian's own (50), before a site's (90).
SYSCTL_FILE: Final = "/etc/sysctl.d/60-hardening.conf"
MODULES_FILE: Final = "/etc/modprobe.d/60-hardening.conf"
LIMITS_FILE: Final = "/etc/security/limits.d/60-hardening.conf"
SYSTEMD_FILE: Final = "/etc/systemd/system.conf.d/60-hardening.conf"
APT_FILE: Final = "/etc/apt/apt.conf.d/60-hardening"
# For sessions and for services; for what runs with other rights than its user's; and for
# what asked for a dump nevertheless.
_NO_DUMPS: Final = {"fs.suid_dumpable": "0", "kernel.core_pattern": "|/bin/false"}
_UPGRADING: Final = ("apt-daily.timer", "apt-daily-upgrade.timer", "unattended-upgrades.service")
_NO_PASSWORDS: Final = """\
#!/bin/sh
# Ends the build when somebody could log in by a password, or without one (shadow(5)).
set -eu
open=$(awk -F: '$2 !~ /^[!*]/ { print $1 }' /etc/shadow)
[ -z "$open" ] && exit 0
echo "these accounts have a password, and the recipe says passwords: locked:" $open >&2
exit 1
"""


@dataclass(frozen=True)
class Hardening:
    """The measures of a recipe. None means that it does not speak of one.

    sysctl holds (parameter, value) pairs, sorted; blocked_modules is sorted.
    """

    ssh: str | None = None
    passwords: str | None = None
    firewall: Firewall | None = None
    sysctl: tuple[tuple[str, str], ...] = ()
    core_dumps: bool | None = None
    blocked_modules: tuple[str, ...] = ()
    automatic_upgrades: bool | None = None

    def with_more(self, above: Hardening) -> Hardening:
        """Return the measures of a recipe on top of this one's: added, or said anew."""
        firewall = self.firewall or above.firewall
        if self.firewall and above.firewall:
            firewall = self.firewall.with_more(above.firewall)
        return Hardening(
            ssh=_latest(self.ssh, above.ssh),
            passwords=_latest(self.passwords, above.passwords),
            firewall=firewall,
            sysctl=tuple(sorted({**dict(self.sysctl), **dict(above.sysctl)}.items())),
            core_dumps=_latest(self.core_dumps, above.core_dumps),
            blocked_modules=tuple(sorted({*self.blocked_modules, *above.blocked_modules})),
            automatic_upgrades=_latest(self.automatic_upgrades, above.automatic_upgrades),
        )


@dataclass(frozen=True)
class HardeningParts:
    """What the measures add to a recipe."""

    packages: tuple[str, ...]
    files: tuple[RecipeFile, ...]
    services: Services
    scripts: tuple[Script, ...]


def read_hardening(value: object) -> Hardening:
    """Return the measures that YAML names; RequestError for what is none, and for wrong data."""
    entry = mapping("hardening", value)
    check_keys("hardening", entry, optional=_READERS)
    return Hardening(**{key: _READERS[key](entry[key]) for key in entry})


def parts_of(hardening: Hardening) -> HardeningParts:
    """Return packages, files, units and scripts that carry the measures out."""
    packages: list[str] = []
    files: list[RecipeFile] = []
    scripts: list[Script] = []
    enabled: list[str] = []
    masked: list[str] = []
    sysctl: dict[str, str] = {}
    if hardening.ssh == "keys-only":
        files.append(RecipeFile(SSH_FILE, _SSH))
    if hardening.passwords == "locked":
        scripts.append(Script("no-passwords", _NO_PASSWORDS))
    if hardening.firewall and hardening.firewall.is_on:
        packages.append("nftables")
        files.append(rules_file(hardening.firewall))
        enabled.append("nftables.service")
    if hardening.core_dumps is False:
        sysctl |= _NO_DUMPS
        files.append(RecipeFile(LIMITS_FILE, "* hard core 0\nroot hard core 0\n"))
        files.append(RecipeFile(SYSTEMD_FILE, "[Manager]\nDefaultLimitCORE=0\n"))
    if hardening.blocked_modules:
        # A blacklist alone does not stop what asks for the module by its name.
        lines = [f"install {module} /bin/false\n" for module in hardening.blocked_modules]
        files.append(RecipeFile(MODULES_FILE, "".join(lines)))
    if hardening.automatic_upgrades is False:
        files.append(RecipeFile(APT_FILE, 'APT::Periodic::Enable "0";\n'))
        masked.extend(_UPGRADING)
    if sysctl := {**sysctl, **dict(hardening.sysctl)}:
        lines = [f"{name} = {setting}\n" for name, setting in sorted(sysctl.items())]
        files.append(RecipeFile(SYSCTL_FILE, "".join(lines)))
    services = Services(enable=tuple(enabled), mask=tuple(masked))
    return HardeningParts(tuple(packages), tuple(files), services, tuple(scripts))


def _latest(below: _T | None, above: _T | None) -> _T | None:
    return below if above is None else above


def _sysctl(value: object) -> tuple[tuple[str, str], ...]:
    """Return kernel parameters with their values as sysctl.d(5) writes them, sorted."""
    pairs = []
    for name, setting in mapping("sysctl", value).items():
        if not isinstance(name, str) or not _PARAMETER.fullmatch(name):
            raise wrong("sysctl", "names such as kernel.kptr_restrict", name)
        # bool is a kind of int, and YAML's `on` is no value of a kernel parameter.
        shown = str(setting) if type(setting) in (int, str) else ""
        if len(shown) > SETTING_CHARACTERS_MAX or not _SETTING.fullmatch(shown):
            raise wrong(
                name, "a number, or words of letters, digits and . , : / % | + - _", setting
            )
        pairs.append((name, shown))
    return tuple(sorted(pairs))


def _modules(value: object) -> tuple[str, ...]:
    return tuple(sorted(set(strings("blocked_modules", value, _MODULE, "names of kernel modules"))))


def _switch(where: str) -> Callable[[object], bool]:
    """Return the reader of on or off, which YAML reads as true and false."""

    def read(value: object) -> bool:
        if not isinstance(value, bool):
            raise wrong(where, "on or off", value)
        return value

    return read


_READERS: Final[Mapping[str, Callable[[object], Any]]] = {
    "ssh": lambda value: one_of("ssh", value, ("keys-only", "as-packaged")),
    "passwords": lambda value: one_of("passwords", value, ("locked", "allowed")),
    "firewall": read_firewall,
    "sysctl": _sysctl,
    "core_dumps": _switch("core_dumps"),
    "blocked_modules": _modules,
    "automatic_upgrades": _switch("automatic_upgrades"),
}
