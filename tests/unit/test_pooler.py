"""What a session must be like behind a pooler, and the lines that make it so."""

import psycopg
import pytest

from identity_service.infra.database.pooler import (
    SESSION_SETTINGS,
    defaults_fault,
    has_nothing_to_lend,
    startup_options,
)

GOOD = {**SESSION_SETTINGS}


def fault(**changes: str) -> str | None:
    return defaults_fault({**GOOD, **changes}, role="identity_service", database="identity")


def test_nothing_is_said_about_good_defaults() -> None:
    assert fault() is None


@pytest.mark.parametrize("name", SESSION_SETTINGS)
@pytest.mark.parametrize("found", ["", "on", "0", "-1", "10001", "Europe/Vienna"])
def test_each_setting_that_is_missing_or_wrong_has_its_line(name: str, found: str) -> None:
    """One line for it, and none for the others. 0 is no timeout at all."""
    said = fault(**{name: found})
    assert said is not None
    lines = [line.strip() for line in said.splitlines() if "ALTER ROLE" in line]
    assert lines == [f'ALTER ROLE "identity_service" IN DATABASE "identity" SET {name} = \'{SESSION_SETTINGS[name]}\';']


@pytest.mark.parametrize("name", [name for name in SESSION_SETTINGS if name.endswith("timeout")])
def test_a_timeout_may_be_shorter_than_ours(name: str) -> None:
    assert fault(**{name: "1"}) is None


def test_a_setting_that_is_not_told_at_all_is_missing() -> None:
    said = defaults_fault({}, role="identity_service", database="identity")
    assert said is not None
    assert said.count("ALTER ROLE") == len(SESSION_SETTINGS)


def test_names_are_quoted() -> None:
    said = defaults_fault({}, role='od"d', database="two words")
    assert said is not None
    assert 'ALTER ROLE "od""d" IN DATABASE "two words" SET ' in said


def test_options_are_told_as_postgresql_reads_them() -> None:
    assert startup_options({"jit": "off", "lock_timeout": "5"}) == "-c jit=off -c lock_timeout=5"


def test_a_pooler_that_is_busy_is_told_from_one_that_lost_its_server() -> None:
    assert has_nothing_to_lend(psycopg.errors.ProtocolViolation("query_wait_timeout"))
    assert not has_nothing_to_lend(psycopg.errors.ProtocolViolation("server conn crashed?"))
    assert not has_nothing_to_lend(ValueError("query_wait_timeout"))
    assert not has_nothing_to_lend(None)
