"""`provisioner dhcp-config` from a configuration that `provisioner init` wrote."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from provisioner.cli.dhcp import dhcp_config
from provisioner.cli.init import init
from provisioner.errors import ConfigError

NETWORK = {
    "interface": "br0",
    "subnet": "10.77.0.0/24",
    "range_start": "10.77.0.100",
    "range_end": "10.77.0.200",
}


def run(folder: Path, server: str, dhcp: dict[str, str]) -> str:
    CliRunner().invoke(init, [str(folder)], catch_exceptions=False)
    file = folder / "provisioner.toml"
    text = file.read_text().replace("127.0.0.1:69", "10.77.0.1:69")
    for name, value in dhcp.items():
        text = text.replace(f'{name} = ""', f'{name} = "{value}"')
    file.write_text(text)
    arguments = [server, "--config", str(file)]
    result = CliRunner().invoke(dhcp_config, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("server", ["dnsmasq", "kea", "isc"])
def test_each_snippet_names_our_files_and_our_servers(tmp_path: Path, server: str) -> None:
    text = run(tmp_path / "site", server, NETWORK)
    for expected in ("undionly.kpxe", "snponly.efi", "10.77.0.1", "/boot/ipxe?mac=${netX/mac"):
        assert expected in text


def test_a_network_that_is_not_described_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        run(tmp_path / "site", "kea", {"interface": "br0", "subnet": "10.77.0.0/24"})
    assert refused.value.expected == "dhcp.range_start, dhcp.range_end"
    assert 'dhcp.mode may stay "off"' in (refused.value.hint or "")
