"""What an exported trail comes to: the last word about each counts."""

from datetime import UTC, datetime, timedelta
from itertools import count

import pytest

from identity_service.cli.lost_trail import DONE_AGAIN, TO_LOOK_AT, Act, Since, sum_up
from identity_service.infra.audit import EVENTS


def acts(*said: str) -> list[Act]:
    """Return acts, one a second, each spelled `event target`."""
    times = count()
    return [
        Act(number, datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number), *words.split())
        for number, words in zip(times, said, strict=False)
    ]


def users(since: Since) -> tuple[list[str], list[str], list[str]]:
    return since.disabled_users, since.deleted_users, since.purged_users


@pytest.mark.parametrize(
    ("said", "disabled", "deleted", "purged"),
    [
        (["disabled"], ["u"], [], []),
        (["disabled", "enabled"], [], [], []),
        (["enabled"], [], [], []),
        (["enabled", "disabled"], ["u"], [], []),
        (["deleted"], [], ["u"], []),
        (["disabled", "deleted"], [], ["u"], []),
        (["deleted", "restored"], [], [], []),
        (["disabled", "deleted", "restored"], ["u"], [], []),
        (["deleted", "restored", "disabled"], ["u"], [], []),
        (["deleted", "purged"], [], [], ["u"]),
        (["purged"], [], [], ["u"]),
        (["restored"], [], [], []),
    ],
)
def test_the_last_word_about_a_user_counts(
    said: list[str], disabled: list[str], deleted: list[str], purged: list[str]
) -> None:
    """Being disabled and being deleted are two things: who is restored is as disabled as before."""
    found = sum_up(acts("user.disabled v", *(f"user.{word} u" for word in said), "user.enabled v"))
    assert users(found) == (disabled, deleted, purged)


@pytest.mark.parametrize(
    ("said", "disabled"),
    [(["disabled"], ["c"]), (["disabled", "enabled"], []), (["deleted"], ["c"]), (["enabled", "disabled"], ["c"])],
)
def test_the_last_word_about_a_client_counts(said: list[str], disabled: list[str]) -> None:
    """A deleted one is disabled: to forget it for good is for somebody to decide."""
    assert sum_up(acts(*(f"client.{word} c" for word in said))).disabled_clients == disabled


def test_what_has_ended_for_good_is_listed_in_its_order() -> None:
    """A compromised key, and an API key that was revoked or whose secret was replaced."""
    found = sum_up(acts("key.compromised k", "api_key.revoked a", "key.compromised l", "api_key.rotated b"))
    assert (found.compromised, found.ended_keys) == (["k", "l"], ["a", "b"])
    assert (found.to_look_at, users(found)) == ([], ([], [], []))


def test_everything_to_look_at_is_an_event_that_there_is() -> None:
    """And is handed on as it is."""
    assert EVENTS.keys() >= TO_LOOK_AT
    every = acts(*(f"{event} t" for event in sorted(TO_LOOK_AT)))
    assert sum_up(every).to_look_at == every


LEFT_ALONE = frozenset(
    (
        # What was given since the backup is gone, and somebody gives it anew.
        *("user.created", "user.registered", "client.created", "role.created", "role.granted", "scope.created"),
        *("api_key.created", "api_key.confirmed", "key.created", "data_key.created", "demo.created", "email.verified"),
        *("users.import_started", "users.imported"),
        # What was ended since then ends for everybody: sessions, tokens, links, signing keys, the bootstrap secret.
        *("session.ended", "sessions.ended", "token.revoked", "grant.password", "bootstrap.spent"),
        *("refresh.reuse_detected", "refresh.foreign_client", "refresh.ahead_of_record"),
        *("email_change.requested", "email_verification.requested", "password_reset.requested"),
        *("key.retired", "key.rotation_scheduled"),
        # What changed no rights.
        *("account.exported", "users.exported", "audit.exported", "audit.pruned", "scope.updated", "mail.given_up"),
        *("sign_in.failed", "sign_in.throttled", "limit.hit", "reauthentication.failed", "registration.declined"),
        *("client.authentication_failed", "api_key.refused", "database.moved", "database.restored"),
    )
)


def test_of_every_event_somebody_has_said_what_a_restore_makes_of_it() -> None:
    """Or a new way of taking something away would be forgotten here, and come back with the next restore."""
    assert EVENTS.keys() == DONE_AGAIN | TO_LOOK_AT | LEFT_ALONE
    assert not LEFT_ALONE & (DONE_AGAIN | TO_LOOK_AT)
