"""How the threads of a boot listener are shared out. Imports nothing: it is read early."""

from typing import Final

# Of each of its processes.
BOOT_THREADS: Final = 24
# Those that are left to boot scripts and to files of this machine, however long a release
# store elsewhere is waited for.
SCRIPT_THREADS: Final = 8
