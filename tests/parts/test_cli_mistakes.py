"""What a person gets for a file, a token or an address that is none: who must act, what was
expected and found; never a trace, and never a secret."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from provisioner.cli.main import main
from tests.parts.command_line import Cli, commands_of
from tests.parts.fake_bmc import FakeBmc
from tests.parts.service_site import Site, mac

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hunter2"


@pytest.fixture
def cli(site: Site) -> Iterator[Cli]:
    with commands_of(site) as cli:
        yield cli


def refused(cli: Cli, *words: str, exit_code: int = 2, stdin: str | None = None) -> str:
    """Return what a refused command says on standard error, after it was looked through."""
    done = cli(*words, exit_code=exit_code, stdin=stdin)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr
    return done.stderr


# --- files --------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"\xff" + SECRET.encode(), b"a folder"])
def test_an_unusable_file_is_a_mistake_in_the_request(
    cli: Cli, tmp_path: Path, content: bytes | None
) -> None:
    place = tmp_path / "given"
    if content == b"a folder":
        place.mkdir()
    elif content is not None:
        place.write_bytes(content)
    bmc = ("--bmc", "127.0.1.1", "--bmc-user", "admin", "--bmc-password-file", str(place))
    spec = tmp_path / "hosts.yaml"
    bmc_in_file = {"address": "127.0.1.1", "user": "admin", "password_file": "given"}
    spec.write_text(json.dumps([{"name": "r1n1", "macs": [mac(1)], "bmc": bmc_in_file}]))
    for words in (
        ("host", "add", "r1n1", "--mac", mac(1), *bmc),
        ("host", "import", str(spec)),
        ("host", "import", str(place)),
        ("profile", "save", str(place), "--name", "web2"),
        ("host", "list", "--token-file", str(place)),
    ):
        assert str(place) in refused(cli, *words)
    assert cli("host", "list", "-o", "name").stdout == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("disk: {bus: nvme}\ndisk: {bus: sata}", "the key disk stands there twice"),
        ("disk: {bus: nvme}\nvariables: {a: .nan}", "cannot be sent"),
        ("&a {disk: *a}", "cannot be sent"),
        ("[" * 3000 + "]" * 3000, "cannot be sent"),
        ("disk: {bus: nvme", "is not YAML"),
        ("disk: !!binary aGk=", "cannot be sent"),
    ],
)
def test_a_document_that_means_nothing_is_refused(cli: Cli, text: str, told: str) -> None:
    assert told in refused(cli, "profile", "save", "-", "--name", "bad", stdin=text)


def test_a_message_of_yaml_has_the_place_and_not_the_line(cli: Cli) -> None:
    text = f"- {{name: r1n1, bmc: {{password: {SECRET}, password: {SECRET}}}}}"
    assert "line 1, column" in refused(cli, "host", "import", "-", stdin=text)


def test_dates_and_mac_addresses_need_no_quotes(cli: Cli) -> None:
    """YAML 1.1 takes the one for a date, which JSON has not, the other for a number."""
    profile = "disk: {bus: nvme}\ncloud_config: {users: [{name: ops, expiredate: 2032-09-01}]}"
    cli("profile", "save", "-", "--name", "dated", stdin=profile)
    users = cli.json("profile", "show", "dated")["document"]["cloud_config"]["users"]
    assert users == [{"name": "ops", "expiredate": "2032-09-01"}]
    cli("host", "import", "-", stdin="- {name: r1n1, macs: [10:22:33:44:55:56]}")
    assert cli.json("host", "show", "r1n1")["macs"] == ["10:22:33:44:55:56"]


# --- words --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("hots list", "host"),
        ("host remove r1n1", "delete"),
        ("host set r1n1", "change"),
        ("host ls", "list"),
        ("token rm ci", "revoke"),
        ("profile create web.yaml", "save"),
        ("deploy r1n1", "reimage"),
    ],
)
def test_a_word_of_another_program_leads_to_ours(cli: Cli, words: str, meant: str) -> None:
    assert f"Did you mean {meant}?" in refused(cli, *words.split())


def test_the_breaker_has_a_word_for_its_state(cli: Cli) -> None:
    assert cli("breaker", "show", "-o", "name").stdout == "closed\n"


# --- the service and the token ------------------------------------------------------------


def with_token(url: str, token: str) -> Result:
    environment = {"PROVISIONER_URL": url, "PROVISIONER_TOKEN": token}
    return CliRunner().invoke(main, ("host", "list"), env=environment)


def test_a_files_token_goes_to_the_service_that_it_names(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("client.toml").touch(mode=0o600)
    Path("client.toml").write_text(f'url = "http://127.0.0.1:1"\ntoken = "{cli.token}"\n')
    for words in (("host", "list", "--url", cli.url), ("audit", "list", "--url", f"{cli.url}/")):
        done = CliRunner().invoke(main, words, env={})
        assert done.exit_code == 78
        assert f"no API token for {cli.url}" in done.stderr
        assert "PROVISIONER_TOKEN" in done.stderr
        assert cli.token not in done.output
    Path("client.toml").write_text(f'url = "{cli.url}/"\ntoken = "{cli.token}"\n')
    assert CliRunner().invoke(main, ("host", "list", "--url", cli.url), env={}).exit_code == 0


@pytest.mark.parametrize("token", [f"{SECRET}\nmore", f"{SECRET} ", f"ü{SECRET}"])
def test_a_token_that_fits_no_header_is_refused_and_not_shown(
    cli: Cli, token: str, tmp_path: Path
) -> None:
    done = with_token(cli.url, token)
    assert done.exit_code == 2
    assert "the API token is not one" in done.stderr
    assert SECRET not in done.output
    (tmp_path / "token").write_text(f"# mine\n{token}")
    refused(cli, "host", "list", "--token-file", str(tmp_path / "token"))
    (tmp_path / "token").write_text("\n")
    assert "nothing" in refused(cli, "host", "list", "--token-file", str(tmp_path / "token"))


def test_another_listener_is_told_from_the_api(cli: Cli) -> None:
    told = refused(Cli(cli.url + "/elsewhere", cli.token), "host", "list")
    assert "api.listen" in told


@pytest.mark.parametrize("name", ["", ".", "..", "../tokens", "a/b"])
def test_a_name_is_one_part_of_a_path(cli: Cli, name: str) -> None:
    assert "that is not a name" in refused(cli, "host", "show", name)


# --- a new installation -------------------------------------------------------------------


def init(*words: str) -> Result:
    return CliRunner().invoke(main, ("init", *words))


@pytest.mark.parametrize("place", ["/proc/site", "n" * 300])
def test_init_where_nothing_can_be_made_says_so(place: str) -> None:
    done = init(place)
    assert done.exit_code == 2
    assert "no installation can be made in" in done.stderr


@pytest.mark.parametrize(
    "words", [("--dhcp", "full"), ("--database", "mysql://db"), ("--listen-address", "r1n1")]
)
def test_init_that_is_refused_leaves_no_folder_and_names_none(
    tmp_path: Path, words: tuple[str, str]
) -> None:
    done = init(str(tmp_path / "site"), *words)
    assert done.exit_code in (2, 78)
    assert ".init-" not in done.stderr
    assert words[0].strip("-").split("-")[0] in done.stderr
    assert not (tmp_path / "site").exists()


def test_what_init_says_to_do_next_can_be_pasted(tmp_path: Path) -> None:
    done = init(str(tmp_path / "our site"))
    assert f"doctor --config '{tmp_path / 'our site' / 'provisioner.toml'}'" in done.stdout


def test_the_folder_of_an_installation_is_its_configuration(tmp_path: Path) -> None:
    assert init(str(tmp_path / "site")).exit_code == 0
    for words in (("ramdisk", "list"), ("image", "keys", "list")):
        done = CliRunner().invoke(main, (*words, "--config", str(tmp_path / "site")))
        assert done.exit_code == 0, done.stderr
    nowhere = CliRunner().invoke(main, ("ramdisk", "list", "--config", str(tmp_path)))
    assert (nowhere.exit_code, "provisioner init" in nowhere.stderr) == (78, True)


# --- hosts --------------------------------------------------------------------------------


def test_a_bmc_that_does_not_answer_yet_is_said_and_no_error(cli: Cli, site: Site) -> None:
    site.pool.bmcs["127.0.1.1"] = FakeBmc(is_silent=True)
    bmc = ("--bmc", "127.0.1.1", "--bmc-user", "admin", "--bmc-password-file", "-")
    done = cli("host", "add", "r1n1", "--mac", mac(1), *bmc, stdin=SECRET)
    assert done.stdout.splitlines()[1].startswith("r1n1 ")
    assert "did not say who may log in, so far" in done.stderr
    assert "provisioner host power r1n1 status" in done.stderr


def test_an_import_says_who_asks_its_bmcs(cli: Cli) -> None:
    with_bmc = {"address": "127.0.1.1", "user": "admin", "password": SECRET}
    hosts = [
        {"name": f"r1n{n}", "macs": [mac(n)], "bmc": with_bmc if n else None} for n in range(2)
    ]
    done = cli("host", "import", "-", "-o", "name", stdin=json.dumps(hosts))
    assert done.stdout == "r1n0\nr1n1\n"
    assert "1 BMCs" in done.stderr
    assert "doctor --bmcs" in done.stderr
    bare = json.dumps([{"name": "r1n2", "macs": [mac(2)]}])
    assert cli("host", "import", "-", stdin=bare).stderr == ""


def test_of_many_hosts_the_one_that_does_not_fit_is_named(cli: Cli) -> None:
    hosts: list[dict[str, object]] = [{"name": f"r1n{n}", "macs": [mac(n)]} for n in range(3)]
    hosts[1]["mcas"] = []
    hosts[2]["bmc"] = {"address": "bmc.example.com", "user": "admin", "password": SECRET}
    told = refused(cli, "host", "import", "-", stdin=json.dumps(hosts))
    assert "hosts.1.mcas (host r1n1): Extra inputs are not permitted" in told
    assert "hosts.2.bmc.address (host r1n2): Input is not a valid IPv4 address" in told
    assert "lax" not in told


def test_what_is_refused_says_the_way_out(cli: Cli) -> None:
    cli("host", "add", "r1n1", "--mac", mac(1))
    assert "host change r1n1 --bmc" in refused(cli, "host", "power", "r1n1", "status")
    assert "--profile" in refused(cli, "host", "change", "r1n1")
    cli("host", "protect", "r1n1")
    assert "host unprotect r1n1" in refused(cli, "host", "delete", "r1n1")


# --- what is printed ----------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "is_plain"), [("1", True), ("", False)])
def test_no_color_is_obeyed_on_a_terminal(cli: Cli, asked: str, is_plain: bool) -> None:
    cli("host", "add", "r1n1", "--mac", mac(1))
    environment = {"PROVISIONER_URL": cli.url, "PROVISIONER_TOKEN": cli.token, "NO_COLOR": asked}
    for words in (("host", "show", "r1n1"), ("host", "show", "r9n9")):
        done = CliRunner().invoke(main, words, env=environment, color=True)
        assert ("\x1b[" not in done.output) == is_plain


def test_the_newest_rows_are_shown_and_how_to_see_the_others(cli: Cli) -> None:
    for number in range(3):
        cli("host", "add", f"r1n{number}", "--mac", mac(number))
    every = [row["number"] for row in cli.json("audit", "list")]
    newest = cli("audit", "list", "--limit", "2", "-o", "json")
    assert [row["number"] for row in json.loads(newest.stdout)] == every[-2:]
    assert "--after 0" in newest.stderr
    first = cli("audit", "list", "--after", "0", "--limit", "2", "-o", "json")
    assert [row["number"] for row in json.loads(first.stdout)] == every[:2]
    assert f"--after {every[1]}" in first.stderr
    assert cli("audit", "list").stderr == ""


def on_a_terminal(cli: Cli, columns: int, *words: str) -> list[str]:
    """Return the lines that a command prints on a terminal of that width. It holds more than
    these few, but does not hand all of them out at once."""
    ours, theirs = pty.openpty()
    printed = b""
    with open(ours, "rb", buffering=0) as terminal:
        environment = {"PROVISIONER_URL": cli.url, "PROVISIONER_TOKEN": cli.token}
        subprocess.run(
            [sys.executable, "-m", "provisioner", *words],
            cwd=ROOT,
            stdout=theirs,
            env={**os.environ, **environment, "COLUMNS": str(columns), "TERM": "dumb"},
            check=True,
            timeout=180,
        )
        os.close(theirs)
        with suppress(OSError):  # so ends what nobody has open at the other end any more
            while piece := terminal.read(65536):
                printed += piece
    return printed.decode().splitlines()


def test_a_narrow_terminal_gets_lines_that_can_be_read_and_copied(cli: Cli) -> None:
    """Folded, fifteen columns in sixty characters are three letters each, one below the other."""
    name = "rack-1-host-with-a-long-name"
    cli("host", "add", name, "--mac", mac(1))
    for columns, words in ((60, ("-o", "wide")), (200, ()), (80, ())):
        lines = on_a_terminal(cli, columns, "host", "list", *words)
        assert [name, "enrolled"] in [line.split()[:2] for line in lines]
