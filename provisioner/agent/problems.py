"""What can go wrong in the ramdisk, each with the code that an operator reads."""

from provisioner.errors import DeviceError, ProvisionerError, TrustError


class ServiceUnreachable(DeviceError):
    """The service did not answer within the agent's patience."""

    code = "service_unreachable"


class ServiceRefused(DeviceError):
    """The service answered, and said no; `found` holds its own code."""

    code = "service_refused"


class PermissionRefused(DeviceError):
    """The service took the permission to write away, or never gave it."""

    code = "permission_refused"


class PermissionExpired(DeviceError):
    """The permission to write ran out, and could not be renewed in time."""

    code = "permission_expired"


class ManifestSignature(TrustError):
    """Fewer pinned keys than needed signed the manifest."""

    code = "manifest_signature"


class ManifestDigest(TrustError):
    """The manifest is not that of the release we were told to write."""

    code = "manifest_digest"


class ManifestMalformed(TrustError):
    """The manifest is signed, and still not one we can read."""

    code = "manifest_malformed"


class ReleaseExpired(TrustError):
    """The release is past the date until which its signers meant it to be deployed."""

    code = "release_expired"


class ReleaseTooOld(TrustError):
    """The release is below the version that its image may go back to."""

    code = "release_too_old"


class ChunkCorrupt(TrustError):
    """A chunk's bytes are not those that the manifest names, wherever it was asked for."""

    code = "chunk_corrupt"


class ChunkUnavailable(DeviceError):
    """A chunk or a file could not be fetched within the agent's patience."""

    code = "chunk_unavailable"


class FileMissing(ChunkUnavailable):
    """The service answered that it does not have the file."""


class HostUnfit(DeviceError):
    """The release cannot run on this host, or not from this disk."""

    code = "host_unfit"


class DiskTooSmall(HostUnfit):
    """The image and its CIDATA partition do not fit on the disk."""

    code = "disk_too_small"


class ImageUnfit(DeviceError):
    """The image is not one that we can place on a disk, such as one without a GPT."""

    code = "image_unfit"


class DiskFailed(DeviceError):
    """The disk refused to be read or written."""

    code = "disk_failed"


class ReadBackMismatch(DeviceError):
    """The disk returned other bytes than were written to it."""

    code = "read_back_mismatch"


class SeedUnfit(DeviceError):
    """The seed is not the four documents we expect, or too large for its partition."""

    code = "seed_unfit"


class SeedGone(DeviceError):
    """The seed has left the service already: its answer to us was lost, or others have it."""

    code = "seed_gone"


class BootArguments(DeviceError):
    """The kernel command line lacks what the agent needs."""

    code = "boot_arguments"


AGENT_PROBLEMS: tuple[type[ProvisionerError], ...] = (
    ServiceUnreachable,
    ServiceRefused,
    PermissionRefused,
    PermissionExpired,
    ManifestSignature,
    ManifestDigest,
    ManifestMalformed,
    ReleaseExpired,
    ReleaseTooOld,
    ChunkCorrupt,
    ChunkUnavailable,
    HostUnfit,
    DiskTooSmall,
    ImageUnfit,
    DiskFailed,
    ReadBackMismatch,
    SeedUnfit,
    SeedGone,
    BootArguments,
)
