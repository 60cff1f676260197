"""The clock that also runs while this process, or this machine, is stopped.

`bmc/child.py`, which is started by its path alone, and the agent in the ramdisk cannot import
it, and read the same clock for themselves.
"""

import time


def boot_time() -> float:
    """Return the seconds since this machine's kernel started, stops included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
