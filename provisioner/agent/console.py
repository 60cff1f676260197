"""Lines on the host's console, each with the seconds since the kernel started."""

import sys
import time


def since_start_s() -> float:
    """Return the seconds since the kernel started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def say(text: str) -> None:
    """Write one line; what others sent us cannot start a second one or move the cursor."""
    safe = "".join(letter if letter.isprintable() else "?" for letter in text)
    sys.stderr.write(f"[{since_start_s():9.3f}] provisioner: {safe}\n")
    sys.stderr.flush()
