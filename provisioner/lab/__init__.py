"""A rack of QEMU hosts that behave like hardware: what `provisioner lab` runs.

Nothing here is imported by the service; to the service the rack is a rack.
"""

from provisioner.lab.lab import Lab
from provisioner.lab.model import Bmc, BootRecord, Disk, Host, HostStatus, LabHost

__all__ = ["Bmc", "BootRecord", "Disk", "Host", "HostStatus", "Lab", "LabHost"]
