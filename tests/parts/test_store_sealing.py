"""Profiles lie sealed in the database, also those that an earlier version kept in clear."""

import pytest
from sqlalchemy import Engine, text

from provisioner.core.model import Profile
from provisioner.core.profile import ProfileUnreadable, text_of
from provisioner.store.engine import open_engine
from tests.parts.stores import KEY, NOW, opened

OTHER_KEY = bytes(reversed(KEY))
SECRET = "canary-in-a-profile"
WEB = Profile("web", "d1", text_of({"variables": {"password": SECRET}, "umlaut": "ü"}), NOW)


@pytest.fixture
def engine(migrated_url: str) -> Engine:
    return open_engine(migrated_url)


def kept(engine: Engine) -> str:
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT * FROM profile_revisions")).all()
    return "".join(
        "".join(
            bytes(cell).decode("latin-1") if isinstance(cell, bytes) else str(cell) for cell in row
        )
        for row in rows
    )


def test_field_20_a_profile_is_not_kept_in_clear(engine: Engine) -> None:
    with opened(engine) as store:
        with store.begin() as tx:
            tx.save_profile(WEB)
        assert SECRET not in kept(engine)
        with store.read() as tx:
            assert tx.profile("web") == WEB
            assert tx.profile_revision("d1") == WEB


def test_what_an_earlier_version_kept_in_clear_is_read_and_then_sealed(engine: Engine) -> None:
    with opened(engine) as store:
        with store.begin() as tx:
            tx.save_profile(WEB)
        with engine.begin() as connection:
            change = text("UPDATE profile_revisions SET sealed = NULL, document = :document")
            connection.execute(change, {"document": f'{{"password": "{SECRET}"}}'})
        assert SECRET in kept(engine)
        with store.begin() as tx:
            before = tx.profile("web")
            assert before is not None
            assert before.document == {"password": SECRET}
            assert tx.seal_profiles() == 1
            assert tx.seal_profiles() == 0
            assert tx.profile("web") == before
        assert SECRET not in kept(engine)


def refused(engine: Engine, key: bytes = KEY) -> None:
    """See that the profile is found and named, and that only what it says is refused."""
    with opened(engine, key) as store, store.read() as tx:
        found = tx.profile("web")
        assert found is not None
        assert tx.profiles() == [found]
        assert SECRET not in repr(found)
        with pytest.raises(ProfileUnreadable, match="profile web does not open") as caught:
            assert found.document
        assert "profile save" in (caught.value.hint or "")


def test_another_key_or_another_revisions_row_does_not_open_it(engine: Engine) -> None:
    with opened(engine) as store, store.begin() as tx:
        tx.save_profile(WEB)
    refused(engine, OTHER_KEY)
    with engine.begin() as connection:
        connection.execute(text("UPDATE profile_revisions SET digest = 'd2'"))
        connection.execute(text("UPDATE profiles SET digest = 'd2'"))
    refused(engine)


def test_what_does_not_open_is_replaced_when_it_is_saved_again(engine: Engine) -> None:
    for key in (KEY, OTHER_KEY):
        with opened(engine, key) as store, store.begin() as tx:
            tx.save_profile(WEB)
            assert tx.profile("web") == WEB
            assert tx.profile_revision("d1") == WEB
    refused(engine)


def test_one_that_opens_stays_as_it_is_when_it_is_saved_again(engine: Engine) -> None:
    with opened(engine) as store:
        with store.begin() as tx:
            tx.save_profile(WEB)
        before = kept(engine)
        with store.begin() as tx:
            tx.save_profile(WEB)
        assert kept(engine) == before
