"""Writes docs/why.md from the table of causes: run `python -m tests.why_page`."""

import re
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Final

from provisioner.core.causes import CAUSES
from provisioner.core.diagnosis import (
    AGENT_PATIENCE,
    BMC_PATIENCE,
    BOOT_PATIENCE,
    NETBOOT_PATIENCE,
    POST_PATIENCE,
)
from provisioner.web.downloads import TELL_S, TOLD_MAX

WIDTH: Final = 118
PAGE: Final = Path(__file__).parents[1] / "docs" / "why.md"

_ABOUT: Final = f"""\
# Why does this host not boot?

Written from the tables in `provisioner/core/causes.py` by `python -m tests.why_page`; a test
compares them.

`provisioner why HOST` (API: `GET /api/v1/hosts/HOST/why`, role viewer) says in four parts what
an operator wants to know at three in the morning. It changes nothing, and asks no BMC.

- The first line: what is being done to the host or was done last, in which phase it stands, since
  when, until when at most, its flags, and what follows by itself.
- `why`: the cause, with a name in brackets that stays the same for programs (`-o json`: `cause`).
- `seen`: the lines of its timeline that show it. `provisioner host events HOST` has all of them.
- `do`: what to do, the first thing first.

A cause is looked for from the top of the table below, and the first that fits is named. While
an operation goes on, it is called slow or unheard of only after a while: {
    BMC_PATIENCE.seconds
} s for its BMC to switch it on,
{POST_PATIENCE.seconds // 60}
min from switching on to the first sign (POST is slow), {NETBOOT_PATIENCE.seconds} s from one
sign of a netboot to the next, {AGENT_PATIENCE.seconds} s for an agent, {
    BOOT_PATIENCE.seconds // 60
} min for a new system. How far a netboot came is judged by the furthest that any start of
the operation came.

**What is seen.** Our DHCP and TFTP servers write what they see of known hosts into their
timelines: never of strangers, at most 20 lines at once and then one in ten minutes of a host
that nothing is being done to, at most 80 and then one in ten seconds of another. A system's own
DHCP counts while an operation is under way. With `dhcp.mode` `proxy` only our part of the
exchange is seen; with `off` none, and then TFTP and the boot script have to tell. TFTP knows
addresses only: it finds the host by our leases, or by what this machine's kernel last heard at
that address. What another DHCP server answered, whether a link is up, and what a console shows,
nobody tells the service.

**Downloads.** The boot listener writes when a host asks for kernel or ramdisk, when it has taken
the file whole or broken off and after how many bytes, and in between, at most once in
{int(TELL_S)} s and {
    TOLD_MAX
} times for each download, how far it is or that it stands still. Taken is what
the host's TCP has acknowledged: a host that was switched off in the middle stands still for a
quarter of an hour before Linux gives it up. iPXE may start the ramdisk before it acknowledges
its last bytes; then it counts as sent whole. The host is found by its address, as TFTP finds it,
and counts for as many lines again as with TFTP, in each process of the listener. GRUB (Secure
Boot) fetches by TFTP, which tells of a download only once it has ended.

What is not seen proves nothing, and `why` claims nothing from it: with `boot.accel`, or another
proxy in front, the files are sent or asked for by somebody else, and no download has a line;
nor has one where `dhcp.mode` is `proxy` or `off` and a router stands between host and service,
for then this machine hears no MAC of the host. Each answer to boot the ramdisk notes whether
downloads from that address will be seen (`downloads_seen`); only where they will,
`download_not_begun` may be the cause. Elsewhere it stays at `ramdisk_not_heard`.

| cause | in words |
|---|---|
"""


def page() -> str:
    rows = [f"| `{cause.name}` | {_shown(cause.why)} |" for cause in CAUSES]
    about = "\n\n".join(_folded(part) for part in _ABOUT.split("\n\n"))
    return about + "\n".join(rows) + "\n"


def _folded(paragraph: str) -> str:
    """Return a paragraph, or the items of a list, folded anew: figures have lengths of their
    own. A table stays as it is."""
    if paragraph.startswith("|"):
        return paragraph
    items = re.split(r"\n(?=- )", paragraph)
    fold = partial(fill, width=WIDTH, break_on_hyphens=False, break_long_words=False)
    return "\n".join(
        fold(" ".join(item.split()), subsequent_indent="  " if item.startswith("- ") else "")
        for item in items
    )


def _shown(text: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: found[1].replace("_", " ").upper(), text)


if __name__ == "__main__":
    PAGE.write_text(page())
