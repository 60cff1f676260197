"""BMC passwords at rest open for their own host, column and key, and for nothing else."""

import pytest

from provisioner.bmc.credentials import open_, seal
from provisioner.core.model import HostId, Secret
from provisioner.errors import ConfigError, TrustError

KEY = bytes(range(32))
HOST = HostId("host_1")
PASSWORD = Secret("correct-horse-42 ü")


def test_a_sealed_password_opens_again_and_shows_nothing() -> None:
    sealed = seal(KEY, HOST, "bmc_password", PASSWORD)
    assert open_(KEY, HOST, "bmc_password", sealed) == PASSWORD
    assert b"horse" not in sealed


def test_the_same_password_is_sealed_differently_each_time() -> None:
    assert seal(KEY, HOST, "bmc_password", PASSWORD) != seal(KEY, HOST, "bmc_password", PASSWORD)


@pytest.mark.parametrize(
    ("key", "host", "column"),
    [
        (bytes(32), "host_1", "bmc_password"),
        (KEY, "host_2", "bmc_password"),
        (KEY, "host_1", "bmc_user"),
        (KEY, "host_1bmc", "_password"),
    ],
)
def test_another_key_host_or_column_does_not_open_it(key: bytes, host: str, column: str) -> None:
    sealed = seal(KEY, HOST, "bmc_password", PASSWORD)
    with pytest.raises(TrustError):
        open_(key, HostId(host), column, sealed)


def test_no_changed_or_missing_byte_goes_unseen() -> None:
    sealed = seal(KEY, HOST, "bmc_password", PASSWORD)
    for place in range(len(sealed)):
        changed = bytearray(sealed)
        changed[place] ^= 1
        for broken in (bytes(changed), sealed[:place]):
            with pytest.raises(TrustError):
                open_(KEY, HOST, "bmc_password", broken)


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33])
def test_a_key_of_another_length_is_a_configuration_error(length: int) -> None:
    with pytest.raises(ConfigError):
        seal(bytes(length), HOST, "bmc_password", PASSWORD)
    with pytest.raises(ConfigError):
        open_(bytes(length), HOST, "bmc_password", b"")
