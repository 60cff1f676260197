"""Rules for nftables: what a host lets in, as data, and as the file that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from provisioner.imaging.recipe_parts import RecipeFile
from provisioner.imaging.strict_yaml import check_keys, items, mapping, wrong

PORTS_MAX: Final = 64
RULES_FILE: Final = "/etc/nftables.conf"

_RULES: Final = """\
# What this image lets in. It is made from the recipe's `hardening: firewall`.
flush ruleset

table inet filter {{
  chain input {{
    type filter hook input priority filter; policy drop;
    ct state vmap {{ established : accept, related : accept, invalid : drop }}
    iifname "lo" accept
    icmp type {{ destination-unreachable, time-exceeded, parameter-problem, echo-request }} accept
    # Without these there is no IPv6: RFC 4890, section 4.4.
    icmpv6 type {{
      destination-unreachable, packet-too-big, time-exceeded, parameter-problem, echo-request,
      mld-listener-query, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert
    }} accept
    # Answers to DHCP: a request that went to everybody has no connection they belong to.
    udp sport 67 udp dport 68 accept
    ip6 saddr fe80::/10 udp sport 547 udp dport 546 accept
{ports}  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
  }}
  chain output {{
    type filter hook output priority filter; policy accept;
  }}
}}

# A profile may add rules of its own: files with lines such as
#   add rule inet filter input tcp dport 8080 accept
include "/etc/nftables.d/*.nft"
"""


@dataclass(frozen=True)
class Firewall:
    """Everything that comes in is dropped but for answers, ICMP and these ports.

    Where is_on is false nothing is dropped, and the ports say nothing.
    """

    is_on: bool = True
    accept_tcp: tuple[int, ...] = ()
    accept_udp: tuple[int, ...] = ()

    def with_more(self, above: Firewall) -> Firewall:
        """Return what a recipe on top of this one's makes of it: more ports, or no firewall."""
        if not above.is_on:
            return above
        return Firewall(
            accept_tcp=tuple(sorted({*self.accept_tcp, *above.accept_tcp})),
            accept_udp=tuple(sorted({*self.accept_udp, *above.accept_udp})),
        )


def read_firewall(value: object) -> Firewall:
    """Return the firewall that YAML describes; `off` is YAML's word for false."""
    if value is False:
        return Firewall(is_on=False)
    where = "firewall"
    entry = mapping(where, value)
    check_keys(where, entry, required=("policy",), optional=("accept_tcp", "accept_udp"))
    if entry["policy"] != "drop":
        raise wrong("policy", "drop, or `firewall: off`", entry["policy"])
    return Firewall(
        accept_tcp=_ports("accept_tcp", entry.get("accept_tcp", [])),
        accept_udp=_ports("accept_udp", entry.get("accept_udp", [])),
    )


def rules_file(firewall: Firewall) -> RecipeFile:
    """Return the file that nftables.service loads before the network comes up."""
    lines = [
        f"    {protocol} dport {{ {', '.join(map(str, ports))} }} accept\n"
        for protocol, ports in (("tcp", firewall.accept_tcp), ("udp", firewall.accept_udp))
        if ports
    ]
    return RecipeFile(RULES_FILE, _RULES.format(ports="".join(lines)))


def _ports(where: str, value: object) -> tuple[int, ...]:
    """Return the port numbers, sorted, each once."""
    ports = items(where, value)
    for port in ports:
        # bool is a kind of int: `yes` is not port 1.
        if type(port) is not int or not 1 <= port <= 65535:
            raise wrong(where, "port numbers, 1 to 65535", port)
    if len(ports) > PORTS_MAX:
        raise wrong(where, f"at most {PORTS_MAX} ports", len(ports))
    return tuple(sorted(set(ports)))
