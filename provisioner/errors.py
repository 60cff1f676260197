"""The error tree, cut by who must act.

`RequestError`: the caller. `DeviceError`: time or the operator. `TrustError`: security.
`ConfigError`: whoever installs. Anything else that flies is a bug of ours.
Imports only the standard library: the ramdisk's agent uses it too.
"""

from typing import Any, ClassVar


class ProvisionerError(Exception):
    """An error that a person can act on.

    `host` is the name of the host it is about; `expected` and `found` are short texts or
    small JSON values; `hint` is the one next step that usually helps. `code` is stable and
    machine-readable, `exit_code` is what the command line ends with.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 70
    status: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        host: str | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.host = host
        self.expected = expected
        self.found = found
        self.hint = hint

    def as_dict(self) -> dict[str, Any]:
        """Return the error as plain JSON values, leaving out what is not known."""
        parts = {
            "code": self.code,
            "message": self.message,
            "host": self.host,
            "expected": self.expected,
            "found": self.found,
            "hint": self.hint,
        }
        return {key: value for key, value in parts.items() if value is not None}


class RequestError(ProvisionerError):
    """The caller asked for something that cannot be done as asked."""

    code = "request"
    exit_code = 2
    status = 400


class NotFound(RequestError):
    """The named thing does not exist."""

    code = "not_found"
    status = 404


class Conflict(RequestError):
    """The world is not in a state that allows this."""

    code = "conflict"
    status = 409


class Gone(RequestError):
    """It was there once, and leaves only once."""

    code = "gone"
    status = 410


class DeviceError(ProvisionerError):
    """A device or a network did not do its part; time or the operator must act."""

    code = "device"
    exit_code = 4
    status = 502


class BmcAuthFailed(DeviceError):
    """The BMC refused the credentials. Never retried: BMCs lock accounts."""

    code = "bmc_auth_failed"


class BmcUnreachable(DeviceError):
    """The BMC did not answer in time."""

    code = "bmc_unreachable"
    exit_code = 3


class BmcBusy(BmcUnreachable):
    """Others held the BMC, its last session or all of our workers. Waiting helps."""

    code = "bmc_busy"


class BmcRejected(DeviceError):
    """The BMC answered, and said no."""

    code = "bmc_rejected"


class BmcDisobeyed(DeviceError):
    """The BMC acknowledged a power command, and the power was not seen to follow."""

    code = "bmc_disobeyed"


class Unavailable(DeviceError):
    """A part of the service is not ready; trying again later helps."""

    code = "unavailable"
    exit_code = 3
    status = 503


class TrustError(ProvisionerError):
    """Something that must be proven was not: a signature, a ticket, a token, a digest."""

    code = "trust"
    exit_code = 5
    status = 403


class ConfigError(ProvisionerError):
    """The installation is not configured as it must be; we refuse to start."""

    code = "configuration"
    exit_code = 78
