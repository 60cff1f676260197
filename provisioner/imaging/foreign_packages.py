"""What a stranger's dpkg says is installed, judged before anything else works with it.

Reads no file: it is given what stands in dpkg's status file.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Final

from provisioner.errors import RequestError
from provisioner.imaging.rootfs import installed_packages
from provisioner.imaging.spdx import InstalledPackages, spdx_document

PACKAGES_MAX: Final = 20_000
# Debian Policy, 5.6.1 and 5.6.12. Names become parts of paths further on.
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9+.-]{1,199}")
_VERSION: Final = re.compile(r"[A-Za-z0-9.+:~-]{1,200}")
# As the readers of such files take it: in any case, and with space before the colon.
_NAME_LINE: Final = re.compile(r"package\s*:(.*)", re.IGNORECASE)


def foreign_packages(status: str) -> dict[str, str]:
    """Return {package: version} of what is installed.

    Raises RequestError for a list that dpkg would not have written.
    """
    names = [match[1].strip() for line in status.splitlines() if (match := _NAME_LINE.match(line))]
    strange = [name for name in names if not _NAME.fullmatch(name)]
    if len(names) > PACKAGES_MAX or strange:
        raise _refused(
            f"at most {PACKAGES_MAX} packages, named as Debian names them",
            f"{len(names)}, among them {strange[:3]}",
        )
    try:
        packages = installed_packages(status)
    except KeyError as error:
        raise _refused("a name and a version for each package", f"one without {error}") from error
    strange = [name for name, version in packages.items() if not _VERSION.fullmatch(version)]
    if strange:
        raise _refused("versions as Debian writes them", f"others, of {strange[:3]}")
    return packages


def foreign_spdx(
    status: str,
    *,
    image: str,
    version: str,
    architecture: str,
    release_id: str,
    created_at: datetime,
) -> bytes | None:
    """Return the SPDX document of packages that `foreign_packages` let pass.

    None when they cannot be described in one: the reader of the list raises plain
    Python errors for whatever it does not understand, and an image is not worse for it.
    """
    try:
        return spdx_document(
            InstalledPackages(status),
            image=image,
            version=version,
            architecture=architecture,
            release_id=release_id,
            created_at=created_at,
        )
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


def _refused(expected: str, found: str) -> RequestError:
    return RequestError(
        "the image's list of packages is refused (/var/lib/dpkg/status)",
        expected=expected,
        found=found,
    )
