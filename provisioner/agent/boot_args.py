"""What the kernel command line tells the agent."""

from dataclasses import dataclass
from typing import Final

from provisioner.agent.http import Origin
from provisioner.agent.problems import BootArguments

COMMAND_LINE: Final = "/proc/cmdline"


@dataclass(frozen=True)
class BootArgs:
    """Where the service is, and the boot ticket."""

    boot: Origin
    agent: Origin
    ticket: str

    def __repr__(self) -> str:
        """Leave the ticket out."""
        return f"BootArgs(boot={self.boot}, agent={self.agent})"


def parse_boot_args(line: str) -> BootArgs:
    """Return what stands in a kernel command line.

    Raises BootArguments when a word is missing or an address is not understood.
    """
    words = dict(word.partition("=")[::2] for word in line.split())
    names = ("provisioner.boot", "provisioner.agent", "provisioner.ticket")
    if missing := [name for name in names if not words.get(name)]:
        raise BootArguments(f"the kernel command line lacks {', '.join(missing)}")
    try:
        boot, agent = (Origin.parse(words[name]) for name in names[:2])
    except ValueError as error:
        raise BootArguments(f"the kernel command line holds no usable address: {error}") from error
    if not agent.is_tls:
        raise BootArguments("provisioner.agent must be https", found=words[names[1]])
    return BootArgs(boot, agent, words[names[2]])
