"""Settings are read from real files with real keys, and every problem is named at once."""

import os
import stat
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from provisioner import keys, setup
from provisioner.core.fleet import Floor, Rules
from provisioner.core.model import Secret
from provisioner.core.recovery import OnQuarantine, Policy
from provisioner.errors import ConfigError, Conflict, RequestError
from provisioner.in_force import addresses_of, limits_of, policy_of, rules_of
from provisioner.release_keys import new_pair, trust_key
from provisioner.setting_types import Address, ChannelRule
from provisioner.settings import CONFIG_FILE, documented, load
from provisioner.setup import Plan, initialise
from provisioner.wiring import archive_of, trust_policy

DOCS = Path(__file__).resolve().parents[2] / "docs" / "settings.md"


@pytest.fixture
def installation(tmp_path: Path) -> Path:
    folder = tmp_path / "installation"
    initialise(folder, Plan(listen_address="10.77.0.1", interface="br0", dhcp="full"))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder / CONFIG_FILE)
    assert caught.value.exit_code == 78
    return caught.value.message


def test_init_writes_an_installation_that_the_service_takes(installation: Path) -> None:
    settings = load(installation / CONFIG_FILE)
    assert settings.boot.url == "http://10.77.0.1:8081"
    assert settings.agent.url == "https://10.77.0.1:8443"
    assert settings.data_dir == installation
    assert settings.database.url == f"sqlite:///{installation}/state.db"
    assert (settings.dhcp.range_start, settings.dhcp.range_end) == ("10.77.0.100", "10.77.0.199")


def test_what_init_writes_is_closed_to_others(installation: Path) -> None:
    for path in [installation, *installation.rglob("*")]:
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_a_second_init_changes_nothing(installation: Path) -> None:
    before = {path: path.read_bytes() for path in installation.rglob("*") if path.is_file()}
    with pytest.raises(Conflict, match="nothing was changed") as caught:
        initialise(installation, Plan())
    assert caught.value.exit_code == 2
    after = {path: path.read_bytes() for path in installation.rglob("*") if path.is_file()}
    assert after == before


def test_an_interrupted_init_is_finished_by_the_next(tmp_path: Path) -> None:
    """As if the first run had died after it moved the keys, and another while writing."""
    folder = tmp_path / "installation"
    (folder / ".init-died").mkdir(parents=True)
    (folder / ".init-died" / CONFIG_FILE).write_text("[serv")
    keys.make_keys(folder / keys.FOLDER, "https://10.77.0.1:8443")
    master = (folder / keys.FOLDER / keys.MASTER_KEY).read_bytes()
    initialise(folder, Plan(listen_address="10.77.0.1"))
    assert (folder / keys.FOLDER / keys.MASTER_KEY).read_bytes() == master
    assert sorted(path.name for path in folder.iterdir()) == [
        "client.toml",
        "keys",
        "provisioner.toml",
    ]


def test_a_refused_plan_leaves_no_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "installation"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"dhcp\.interface"):
        initialise(folder, Plan(listen_address="10.77.0.1", dhcp="full"))
    assert list(folder.iterdir()) == []


def test_hosts_are_never_told_a_wildcard(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="one address"):
        initialise(tmp_path / "installation", Plan(listen_address="0.0.0.0"))


def test_one_error_lists_every_problem(installation: Path) -> None:
    """A shared secret that was always the same, and readable, started in public; not here."""
    (installation / CONFIG_FILE).write_text(
        """
        [bot]
        listen = 1
        [boot]
        listen = "x:1"
        lisen = "y"
        [agent]
        listen = "0.0.0.0:8443"
        [dhcp]
        mode = "full"
        subnet = "10.77.0.0/24"
        gateway = "10.78.0.1"
        range_start = "10.77.0.9"
        range_end = "10.77.0.3"
        [limits]
        netbooting_s = 0
        writing_s = true
        [database]
        url = "mysql://somebody:hush@there"
        """
    )
    folder = installation / keys.FOLDER
    (folder / keys.MASTER_KEY).write_text("ab" * 32)
    (folder / keys.ADMIN_TOKEN).chmod(0o644)
    message = refusal(installation)
    for part in (
        "[bot]: is not a section; did you mean boot?",
        "boot.listen: expected an IP address and a port",
        "boot.lisen: is not a setting; did you mean listen?",
        "agent.url: must be set, since agent.listen is a wildcard",
        "dhcp.interface: must be set",
        "dhcp.gateway: 10.78.0.1 is outside",
        "dhcp.range_end: comes before",
        "limits.netbooting_s: expected a whole number from 1",
        "limits.writing_s: expected a whole number",
        "database.url: expected",
        "master.key: is weak",
        "admin.token: others may read it (mode 0644)",
    ):
        assert part in message
    assert "hush" not in message


def damage_missing(folder: Path) -> None:
    (folder / keys.RELEASE_KEY).unlink()


def damage_token(folder: Path) -> None:
    (folder / keys.ADMIN_TOKEN).write_text("-1")


def damage_pair(folder: Path) -> None:
    other = folder.parent / "other"
    keys.make_keys(other, "https://10.77.0.1:8443")
    os.replace(other / keys.RELEASE_PUB, folder / keys.RELEASE_PUB)


def damage_certificate(folder: Path) -> None:
    other = folder.parent / "other"
    keys.make_keys(other, "https://10.77.0.2:8443")
    os.replace(other / keys.AGENT_TLS_PEM, folder / keys.AGENT_TLS_PEM)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_missing, "release.key: is missing"),
        (damage_token, "admin.token: expected at least 32"),
        (damage_pair, "release.pub: does not belong to release.key"),
        (damage_certificate, "is for 10.77.0.2, while agent.url says 10.77.0.1"),
    ],
)
def test_a_wrong_key_stops_the_start(
    installation: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(installation / keys.FOLDER)
    assert said in refusal(installation)


@pytest.mark.parametrize(
    ("text", "said"), [(None, "there is no configuration"), ("[boot", "is not TOML")]
)
def test_an_unreadable_file_is_one_clear_error(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / CONFIG_FILE).write_text(text)
    assert said in refusal(tmp_path)


def test_no_secret_is_shown(installation: Path) -> None:
    """A settings object may end in a traceback; its secrets must not."""
    text = (installation / CONFIG_FILE).read_text()
    text = text.replace("sqlite:///state.db", "postgresql://p:hush@db/provisioner")
    (installation / CONFIG_FILE).write_text(text)
    settings = load(installation / CONFIG_FILE)
    shown = repr(settings)
    assert "hush" not in shown
    assert settings.keys.master.reveal() not in shown
    assert settings.keys.admin_token.reveal() not in shown
    (installation / CONFIG_FILE).chmod(0o644)
    assert "holds a password, and others may read" in refusal(installation)


# --- releases -----------------------------------------------------------------------------


def with_releases(installation: Path, text: str) -> Path:
    """Add a section [releases] to the configuration; return the folder of the keys."""
    with (installation / CONFIG_FILE).open("a") as file:
        file.write(f"\n[releases]\n{text}\n")
    return installation / keys.FOLDER


def test_a_channel_asks_for_what_its_table_says(installation: Path) -> None:
    folder = with_releases(
        installation,
        "threshold = 1\n"
        "channels = {stable = {threshold = 2, tested = true}, canary = {}}\n"
        'mirrors = ["http://10.77.1.1:8081/"]\n',
    )
    assert "releases.channels.stable: asks for 2 signatures" in refusal(installation)
    trust_key(folder, new_pair()[1])
    settings = load(installation / CONFIG_FILE)
    assert settings.releases.channels == (
        ChannelRule("canary"),
        ChannelRule("stable", threshold=2, tested=True),
    )
    assert settings.releases.mirrors == ("http://10.77.1.1:8081",)
    policy = trust_policy(settings, {"web": "2"})
    assert policy.keys == tuple(sorted(settings.keys.trusted))
    assert (policy.threshold, dict(policy.channels)) == (1, {"canary": 1, "stable": 2})
    assert policy.minimum_versions == {"web": "2"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("threshold = 0", "releases.threshold: expected a whole number from 1 to 16"),
        ("threshold = 2", "releases.threshold: asks for 2 signatures"),
        ("channels = {stable = {thresholds = 2}}", "not thresholds; did you mean threshold?"),
        ("channels = {stable = {threshold = 17}}", "stable.threshold to be a whole number"),
        ("channels = {stable = {tested = 1}}", "stable.tested to be true or false"),
        ("channels = {stable = 2}", "stable = {threshold = 2, tested = true}"),
        ("channels = {Stable = {}}", "channel names of small letters"),
        ("channels = []", "a table of at most 32 channels"),
        ("channel = {}", "releases.channel: is not a setting; did you mean channels?"),
        ('mirrors = ["https://10.77.1.1"]', "at most 16 origins"),
        ('mirrors = [""]', "at most 16 origins"),
        ('mirrors = ["http://10.77.1.1/chunks"]', "at most 16 origins"),
        ('store = "s3://B"', "releases.store: expected s3://bucket/prefix"),
        ('store = "/srv"', "releases.store: expected s3://bucket/prefix"),
        ('s3_endpoint = "http://10.0.0.9:9000"', "names no bucket"),
        ('store = "s3://bkt"\ns3_endpoint = "ftp://x"', "expected http://host:port or https"),
        ('s3_region = "US EAST"', "a region"),
        ("keep_newest = 0", "from 1 to 1000"),
        ("grace_s = -1", "from 0 to"),
    ],
)
def test_a_wrong_setting_of_releases_is_named(installation: Path, text: str, said: str) -> None:
    with_releases(installation, text)
    assert said in refusal(installation)


def test_a_bucket_needs_credentials_and_shows_none(installation: Path) -> None:
    folder = with_releases(
        installation, 'store = "s3://releases/site-1"\ns3_endpoint = "http://10.0.0.9:9000"'
    )
    assert "s3.toml: is missing; write access_key and secret_key" in refusal(installation)
    file = folder / keys.S3_CREDENTIALS
    for content in ('access_key = "AK"', 'access_key = "AK"\nsecret_key = "hush', "x = 1"):
        file.write_text(content)
        file.chmod(0o600)
        message = refusal(installation)
        assert 's3.toml: expected access_key = "…" and secret_key = "…"' in message
        assert "hush" not in message
    file.write_text('access_key = "AK"\nsecret_key = "hush"')
    file.chmod(0o644)
    assert "s3.toml: others may read it" in refusal(installation)
    file.chmod(0o600)
    settings = load(installation / CONFIG_FILE)
    assert settings.keys.s3 == keys.S3Credentials("AK", Secret("hush"))
    assert "hush" not in repr(settings)
    assert archive_of(settings).blobs.place == "s3://releases/site-1"


def test_without_a_bucket_releases_lie_in_the_data_directory(installation: Path) -> None:
    settings = load(installation / CONFIG_FILE)
    assert settings.keys.s3 is None
    assert archive_of(settings).blobs.place == str(installation)


def test_how_failures_are_dealt_with_comes_from_the_settings(installation: Path) -> None:
    assert policy_of(load(installation / CONFIG_FILE)) == Policy()
    with (installation / CONFIG_FILE).open("a") as file:
        file.write(
            "\n[recovery]\nautomatic = false\nattempts_max = 5\nbackoff_s = 7\n"
            'backoff_max_s = 70\nrollback = false\non_quarantine = "ramdisk"\n'
        )
    expected = Policy(
        is_automatic=False,
        attempts_max=5,
        backoff=timedelta(seconds=7),
        backoff_max=timedelta(seconds=70),
        may_roll_back=False,
        on_quarantine=OnQuarantine.RAMDISK,
    )
    assert policy_of(load(installation / CONFIG_FILE)) == expected


@pytest.mark.parametrize(
    "line",
    ["attempts_max = 0", "attempts_max = 11", 'on_quarantine = "party"', "backoff_max_s = 59"],
)
def test_a_recovery_without_an_end_or_sense_is_refused(installation: Path, line: str) -> None:
    with (installation / CONFIG_FILE).open("a") as file:
        file.write(f"\n[recovery]\n{line}\n")
    assert f"recovery.{line.split()[0]}" in refusal(installation)


def test_what_may_happen_at_once_comes_from_the_limits(installation: Path) -> None:
    file = installation / CONFIG_FILE
    text = file.read_text().replace("[service]", '[service]\nown_hosts = ["r1n1", "host_1"]')
    file.write_text(
        text + "\n[limits]\ndeployments_in_flight_max = 7\nstarts_per_minute_max = 0\n"
        'group_in_flight_max = 3\ngroup_starts_per_minute_max = 2\ngroup_healthy_min = "60%"\n'
        "breaker_hosts_max = 4\nbreaker_window_s = 60\nwaiting_s = 120\n"
    )
    settings = load(file)
    assert rules_of(settings) == Rules(
        in_flight_max=7,
        starts_per_minute_max=0,
        group_in_flight_max=3,
        group_starts_per_minute_max=2,
        group_floor=Floor(percent=60),
        breaker_hosts_max=4,
        breaker_window=timedelta(seconds=60),
    )
    assert limits_of(settings).waiting == timedelta(seconds=120)
    assert settings.service.own_hosts == ("r1n1", "host_1")


@pytest.mark.parametrize("wrong", ['"60"', '"101%"', '"-5%"', "-1", "true", "1.5", '"half"'])
def test_a_floor_that_is_none_is_refused(installation: Path, wrong: str) -> None:
    file = installation / CONFIG_FILE
    file.write_text(file.read_text() + f"\n[limits]\ngroup_healthy_min = {wrong}\n")
    assert "limits.group_healthy_min: expected a number of hosts" in refusal(installation)


def test_the_defaults_of_the_limits_are_those_of_the_rules(installation: Path) -> None:
    assert rules_of(load(installation / CONFIG_FILE)) == Rules()


def test_only_our_own_dhcp_fixes_addresses(installation: Path) -> None:
    settings = load(installation / CONFIG_FILE)
    mac, lease = "52:54:00:77:00:01", "10.77.0.101"
    (installation / "dhcp").mkdir()
    (installation / "dhcp" / "dnsmasq.leases").write_text(f"1764075600 {mac} {lease} * *\n")
    addresses = addresses_of(settings)
    assert addresses.doubt([mac], lease) is None
    assert addresses.doubt([mac], "10.77.0.66") is not None
    # This machine asks for others: by its TFTP relay, or a proxy in front of it.
    for own in ("10.77.0.1", "127.0.0.1"):
        assert addresses.doubt([mac], own) is None
        assert addresses.is_own(own)
    for mode in ("proxy", "off"):
        other = replace(settings, dhcp=replace(settings.dhcp, mode=mode))
        assert addresses_of(other).doubt([mac], "10.77.0.66") is None


def test_every_setting_is_documented() -> None:
    text = DOCS.read_text()
    for name, _default, meaning in documented():
        assert f"`{name}`" in text, name
        assert meaning in text, name


def test_the_client_context_reaches_a_wildcard_listener() -> None:
    assert 'url = "http://127.0.0.1:8080"' in setup.client_text(Address("0.0.0.0", 8080), "t")
