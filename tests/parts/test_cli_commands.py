"""The command line against a real API: what it prints, where, and how it ends."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import Result

from provisioner.core.model import Phase, WeakLogin
from provisioner.service.worker import Worker
from tests.parts.command_line import Cli, commands_of
from tests.parts.fake_bmc import FakeBmc
from tests.parts.service_site import ACTOR, BMC_PASSWORD, Agent, Site, mac

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cli(site: Site) -> Iterator[Cli]:
    with commands_of(site) as cli:
        yield cli


# --- hosts --------------------------------------------------------------------------------


def add(cli: Cli, number: int = 1, *more: str) -> Result:
    bmc = ("--bmc", f"127.0.1.{number}", "--bmc-user", "admin", "--bmc-password-file", "-")
    words = ("host", "add", f"r1n{number}", "--mac", mac(number), *bmc, "--profile", "web", *more)
    return cli(*words, stdin=BMC_PASSWORD + "\n")


def test_a_host_is_added_with_a_password_from_standard_input(cli: Cli, site: Site) -> None:
    done = add(cli, 1, "--label", "rack=r1", "--local-boot", "sanboot")
    assert BMC_PASSWORD not in done.stdout
    host = site.hosts.show("r1n1")
    assert host.bmc is not None
    assert host.bmc.password.reveal() == BMC_PASSWORD
    assert (host.local_boot, dict(host.labels)) == ("sanboot", {"rack": "r1"})


def test_a_bmc_that_needs_no_password_is_warned_of(cli: Cli, site: Site) -> None:
    assert add(cli).stderr == ""
    for address in ("127.0.1.2", "127.0.1.3"):
        site.weak_bmcs[address] = (WeakLogin.CIPHER_ZERO, WeakLogin.ANONYMOUS)
    for done in (
        add(cli, 2),
        cli(
            *("host", "change", "r1n1", "--bmc", "127.0.1.3", "--bmc-user", "admin"),
            *("--bmc-password-file", "-"),
            stdin=BMC_PASSWORD + "\n",
        ),
    ):
        assert "accepts cipher suite 0" in done.stderr
        assert done.stderr.count("hint: ") == 2
    assert "warning: the BMC accepts cipher suite 0" in cli("host", "events", "r1n2").stdout


def test_without_a_terminal_no_password_is_asked_for(cli: Cli) -> None:
    words = ("host", "add", "r1n1", "--mac", mac(1), "--bmc", "127.0.1.1", "--bmc-user", "admin")
    assert "--bmc-password-file" in cli(*words, exit_code=2).stderr


def test_credentials_are_changed_as_the_hint_of_a_refused_login_says(
    cli: Cli, site: Site, tmp_path: Path
) -> None:
    add(cli)
    site.pool.bmcs["127.0.1.1"] = FakeBmc(refuses_login=True)
    operation = site.deploy("r1n1")
    site.perform()
    hint = (site.at(operation).error or {})["hint"].split(";")[0]
    (tmp_path / "F").write_text("another\n")
    words = hint.replace(" U ", " root ").replace(" F", f" {tmp_path / 'F'}").split()
    cli(*words[1:])
    bmc = site.hosts.show("r1n1").bmc
    assert bmc is not None
    assert (bmc.address, bmc.port, bmc.user) == ("127.0.1.1", 623, "root")
    assert bmc.password.reveal() == "another"

    cli("host", "change", "r1n1", "--bmc-password-file", "-", stdin="third\n")
    bmc = site.hosts.show("r1n1").bmc
    assert bmc is not None
    assert (bmc.user, bmc.password.reveal()) == ("root", "third")

    cli("host", "add", "r1n9", "--mac", mac(9))
    words = ["host", "change", "r1n9", "--bmc-user", "U", "--bmc-password-file", "-"]
    assert "--bmc ADDRESS" in cli(*words, stdin="x\n", exit_code=2).stderr


BAD_BMCS = (
    *("bmc.example", "127.0.1.1:0", "127.0.1.1:99999", "127.0.1"),
    *("[::1]x", "[::1]x:623", "127.0.1.1:623#x", "u@127.0.1.1", "[127.0.1.1]"),
)


@pytest.mark.parametrize("bad", BAD_BMCS)
def test_a_bmc_address_that_is_none_is_refused(cli: Cli, bad: str) -> None:
    words = ("host", "add", "r1n1", "--mac", mac(1), "--bmc", bad, "--bmc-user", "admin")
    done = cli(*words, "--bmc-password-file", "-", stdin="x\n", exit_code=2)
    assert bad in done.stderr


@pytest.mark.parametrize(
    ("given", "address", "port"),
    [
        ("127.0.1.1", "127.0.1.1", 623),
        ("127.0.1.1:6230", "127.0.1.1", 6230),
        ("fd00::a", "fd00::a", 623),
        ("[fd00::A]", "fd00::a", 623),
        ("[fd00::a]:6230", "fd00::a", 6230),
    ],
)
def test_what_is_saved_is_printed_as_one_thing(
    cli: Cli, given: str, address: str, port: int
) -> None:
    words = ("host", "add", "r1n1", "--mac", mac(1), "--bmc", given, "--bmc-user", "admin")
    done = cli(*words, "--bmc-password-file", "-", "-o", "json", stdin="x\n")
    added = json.loads(done.stdout)
    assert (added["name"], added["bmc"]["address"], added["bmc"]["port"]) == ("r1n1", address, port)
    changed = cli("host", "change", "r1n1", "--profile", "web", "-o", "yaml")
    assert yaml.safe_load(changed.stdout)["profile"] == "web"
    assert cli("host", "change", "r1n1", "--profile", "web", "-o", "name").stdout == "r1n1\n"


def test_hosts_are_imported_from_a_file_with_passwords_beside_it(
    cli: Cli, site: Site, tmp_path: Path
) -> None:
    (tmp_path / "bmc.password").write_text("from a file\n")
    hosts = [
        {
            "name": f"r1n{number}",
            "macs": [mac(number)],
            "profile": "web",
            "bmc": {
                "address": f"127.0.1.{number}",
                "user": "admin",
                "password_file": "bmc.password",
            },
        }
        for number in (1, 2)
    ]
    (tmp_path / "rack.yaml").write_text(yaml.safe_dump({"hosts": hosts}))
    done = cli("host", "import", str(tmp_path / "rack.yaml"), "-o", "name")
    assert done.stdout.split() == ["r1n1", "r1n2"]
    bmc = site.hosts.show("r1n2").bmc
    assert bmc is not None
    assert bmc.password.reveal() == "from a file"
    again = cli("host", "import", str(tmp_path / "rack.yaml"), exit_code=2)
    assert "r1n1" in again.stderr


def test_every_format_shows_the_hosts(cli: Cli, site: Site) -> None:
    site.add_host(1)
    site.add_host(2)
    table = cli("host", "list").stdout.splitlines()
    assert table[0].split()[:2] == ["NAME", "STATE"]
    assert table[1].split()[:2] == ["r1n1", "enrolled"]
    assert "127.0.1.1" in cli("host", "list", "-o", "wide").stdout
    assert cli("host", "list", "-o", "name").stdout == "r1n1\nr1n2\n"
    assert [host["name"] for host in cli.json("host", "list")] == ["r1n1", "r1n2"]
    shown = yaml.safe_load(cli("host", "show", "r1n1", "-o", "yaml").stdout)
    assert shown["macs"] == [mac(1)]
    assert "name:" in cli("host", "show", "r1n1").stdout


def test_flags_power_and_timeline(cli: Cli, site: Site) -> None:
    site.add_host()
    cli("host", "protect", "r1n1")
    cli("host", "maintenance", "r1n1", "--on")
    assert cli.json("host", "list")[0]["flags"] == ["protected", "maintenance"]
    assert "maintenance" in cli("reimage", "r1n1", "--release", "tiny@1", exit_code=2).stderr
    cli("host", "unprotect", "r1n1")
    cli("host", "maintenance", "r1n1", "--off")
    cli("host", "maintenance", "r1n1", exit_code=2)
    assert cli("host", "power", "r1n1", "status").stdout == "on\n"
    cli("host", "power", "r1n1", "off")
    assert "power off by token:admin" in cli("host", "events", "r1n1").stdout
    cli("host", "delete", "r1n1")
    assert cli.json("host", "list") == []


def test_an_unreachable_bmc_is_worth_another_try_and_a_wrong_password_is_not(
    cli: Cli, site: Site
) -> None:
    site.add_host()
    site.pool.bmcs["127.0.1.1"] = FakeBmc(is_silent=True)
    cli("host", "power", "r1n1", "status", exit_code=3)
    site.pool.bmcs["127.0.1.1"] = FakeBmc(refuses_login=True)
    cli("host", "power", "r1n1", "status", exit_code=4)


# --- reimage and operations ---------------------------------------------------------------


def test_reimage_needs_hosts_and_a_release(cli: Cli, site: Site) -> None:
    """There is no default and no "all"."""
    site.add_host()
    cli("reimage", "--release", "tiny@1", exit_code=2)
    cli("reimage", "r1n1", exit_code=2)
    cli("reimage", "all", "--release", "tiny@1", exit_code=2)
    assert site.operations.list() == []


def test_reimage_queues_and_says_what(cli: Cli, site: Site) -> None:
    site.add_host(1)
    site.add_host(2)
    queued = cli("reimage", "r1n1", "r1n2", "--release", "tiny@1", "--hard", "-o", "name")
    assert len(queued.stdout.split()) == 2
    assert site.operations.list()[0].options == {"soft_shutdown": False, "full": False}
    identity = queued.stdout.split()[0]
    cli("operation", "cancel", identity)
    assert cli.json("operation", "show", identity)["phase"] == "cancelled"
    assert len(cli.json("operation", "list", "--open")) == 1
    assert "r1n2" in cli("operation", "list").stdout


def meanwhile(site: Site, happen: Callable[[Worker], None]) -> threading.Thread:
    """Let something happen as soon as an operation is there."""

    def wait_and_go() -> None:
        for _ in range(12_000):
            if site.operations.list(only_open=True):
                happen(site.worker)
                return
            threading.Event().wait(0.01)

    thread = threading.Thread(target=wait_and_go)
    thread.start()
    return thread


def test_waiting_tells_every_phase_and_why_it_failed(cli: Cli, site: Site) -> None:
    site.add_host()
    site.pool.bmcs["127.0.1.1"] = FakeBmc(refuses_login=True)

    def go(worker: Worker) -> None:
        worker.start_queued()
        site.perform()

    thread = meanwhile(site, go)
    once = ("--attempts", "1", "--wait")
    done = cli("reimage", "r1n1", "--release", "tiny@1", *once, exit_code=4)
    thread.join()
    assert "r1n1 failed: " in done.stderr
    assert "provisioner why r1n1" in done.stderr
    assert done.stdout.splitlines()[0].split()[:2] == ["HOST", "RELEASE"]
    assert "failed" in done.stdout.splitlines()[1]


def test_watching_ends_with_the_worst_outcome(cli: Cli, site: Site) -> None:
    site.add_host(1)
    site.add_host(2)
    one, two = site.operations.request_deployment(
        ["r1n1", "r1n2"], "tiny@1", options={"attempts": 1}, actor=ACTOR
    )
    site.operations.cancel(one.id, actor=ACTOR)
    site.worker.start_queued()
    site.perform()
    Agent(site, 2).until(Phase.WRITING)
    site.pass_(site.transitions.limits.phase[Phase.WRITING])
    done = cli("operation", "watch", one.id, two.id, exit_code=4)
    assert "r1n1 cancelled" in done.stderr
    assert "r1n2 failed" in done.stderr
    assert "way out:  provisioner host release r1n2" in done.stderr


def test_typos_are_met_with_what_was_meant(cli: Cli, site: Site) -> None:
    site.add_host()
    assert "Did you mean host?" in cli("hots", "list", exit_code=2).stderr
    assert "list" in cli("host", "lst", exit_code=2).stderr
    assert "did you mean r1n1?" in cli("host", "show", "r1m1", exit_code=2).stderr
    assert "did you mean tiny@1" in cli("reimage", "r1n1", "--release", "tny@1", exit_code=2).stderr


# --- profiles, tokens, audit --------------------------------------------------------------


def test_profiles_are_saved_from_files(cli: Cli, tmp_path: Path) -> None:
    document = cli.json("profile", "show", "web")["document"]
    (tmp_path / "db.yaml").write_text(yaml.safe_dump(document))
    assert cli("profile", "save", str(tmp_path / "db.yaml"), "-o", "name").stdout == "db\n"
    assert "soak_s" in cli("profile", "show", "db").stdout
    assert cli("profile", "list", "-o", "name").stdout.split() == ["db", "web"]
    (tmp_path / "bad.yaml").write_text("a: [")
    assert "is not YAML" in cli("profile", "save", str(tmp_path / "bad.yaml"), exit_code=2).stderr
    cli("profile", "delete", "db")


def test_a_profile_may_not_make_python_objects(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text("!!python/object/apply:os.system ['true']")
    cli("profile", "save", str(tmp_path / "evil.yaml"), exit_code=2)


def test_a_token_is_made_used_and_revoked(cli: Cli) -> None:
    secret = cli("token", "create", "ci", "--role", "viewer").stdout.strip()
    viewer = Cli(cli.url, secret)
    viewer("host", "list")
    refused = viewer("host", "delete", "r1n1", exit_code=5)
    assert "may not do this" in refused.stderr
    assert secret not in cli("token", "list", "-o", "json").stdout
    cli("token", "revoke", "ci")
    viewer("host", "list", exit_code=5)


def test_the_audit_log_is_shown_and_verified(cli: Cli) -> None:
    assert "profile.saved" in cli("audit", "list").stdout
    assert "hold together" in cli("audit", "verify").stdout


# --- connections --------------------------------------------------------------------------


def in_folder(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the program as a person would, with nothing in its environment."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "provisioner", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_a_context_names_the_service(cli: Cli, tmp_path: Path) -> None:
    nowhere = in_folder(tmp_path, "host", "list")
    assert nowhere.returncode == 78
    assert "no service is named" in nowhere.stderr
    context = tmp_path / "client.toml"
    context.write_text(f'url = "{cli.url}"\ntoken = "{cli.token}"\n')
    context.chmod(0o644)
    assert "others may read it" in in_folder(tmp_path, "host", "list").stderr
    context.chmod(0o600)
    assert in_folder(tmp_path, "host", "list").returncode == 0
    contexts = tmp_path / ".config" / "provisioner" / "contexts.toml"
    contexts.parent.mkdir(parents=True)
    contexts.write_text(f'current = "lab"\n[lab]\nurl = "{cli.url}"\ntoken = "{cli.token}"\n')
    contexts.chmod(0o600)
    context.unlink()
    assert in_folder(tmp_path, "host", "list").returncode == 0
    assert in_folder(tmp_path, "host", "list", "--context", "lab").returncode == 0
    unknown = in_folder(tmp_path, "host", "list", "--context", "lap")
    assert (unknown.returncode, "lap" in unknown.stderr) == (78, True)


def test_a_token_comes_from_a_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(cli.token + "\n")
    words = ("host", "list", "--url", cli.url, "--token-file", "token")
    assert in_folder(tmp_path, *words).returncode == 0


def test_no_service_is_worth_another_try(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x")
    words = ("host", "list", "--url", "http://127.0.0.1:1", "--token-file", "token")
    done = in_folder(tmp_path, *words)
    assert done.returncode == 3
    assert "does not answer" in done.stderr


def test_completion_knows_the_commands(tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "_PROVISIONER_COMPLETE": "bash_complete",
        "COMP_WORDS": "provisioner ho",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from provisioner.cli.main import main; main(prog_name='provisioner')",
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert "host" in done.stdout


def test_help_comes_at_once() -> None:
    """Under 0.2 s on an idle machine: here, that nothing slow is imported."""
    code = (
        "import sys\n"
        "from provisioner.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted(set(sys.modules) & {'httpx', 'rich', 'yaml', 'flask', 'pydantic',\n"
        "      'sqlalchemy', 'cryptography', 'structlog', 'asyncio', 'provisioner.client'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
