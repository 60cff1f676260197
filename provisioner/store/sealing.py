"""Secrets as the database keeps them: sealed, and opened where somebody needs what they say."""

from collections.abc import Callable
from dataclasses import dataclass

from ..core.model import HostId, Secret
from ..errors import ProvisionerError, TrustError


@dataclass(frozen=True)
class Sealing:
    """How secrets are put away: `seal(host id, column, secret)` and its reverse, `open`. For a
    profile its digest stands in the host's place."""

    seal: Callable[[HostId, str, Secret], bytes]
    open: Callable[[HostId, str, bytes], Secret]


class Sealed(Secret):
    """A secret as it is kept. One that does not open stops nobody who does not need it, and is
    saved again as it is."""

    __slots__ = ("_at", "_kept", "_refusal", "_sealing")

    def __init__(
        self,
        at: tuple[HostId, str],
        kept: bytes | None,
        sealing: Sealing,
        refusal: Callable[[], ProvisionerError],
    ) -> None:
        """`at` is the host and the column that it was sealed for; `refusal` makes what is
        raised when it does not open."""
        self._at = at
        self._kept = bytes(kept or b"")
        self._sealing = sealing
        self._refusal = refusal

    def reveal(self) -> str:
        """Return it in clear. Raises what `refusal` makes: trying again does not help."""
        try:
            return self._sealing.open(*self._at, self._kept).reveal()
        except TrustError as error:
            raise self._refusal() from error

    def kept_for(self, at: tuple[HostId, str], sealing: Sealing) -> bytes | None:
        """Return it sealed, where it may stay so: in the same place, under the same key."""
        return self._kept if at == self._at and sealing is self._sealing else None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Sealed) and (other._at, other._kept) == (self._at, self._kept):
            return True
        try:
            return isinstance(other, Secret) and other.reveal() == self.reveal()
        except ProvisionerError:
            return False

    def __hash__(self) -> int:
        return hash(self.reveal())


def sealed(secret: Secret, at: tuple[HostId, str], sealing: Sealing) -> bytes:
    """Return a secret as it is kept for this host and column."""
    kept = secret.kept_for(at, sealing) if isinstance(secret, Sealed) else None
    return kept if kept is not None else sealing.seal(*at, secret)
