"""Where people are signed in, and signing out there."""

import uuid
from datetime import timedelta

import pytest
from sqlalchemy import update

from identity_service.infra.tables import refresh_families
from identity_service.web.account.device import device_of
from tests.support.people import Person, an_app, signed_in, with_key
from tests.support.races import blocked, held
from tests.support.service import PASSWORD, Service, running, test_settings

FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:131.0) Gecko/20100101 Firefox/131.0"


async def session_ids(person: Person) -> list[str]:
    """Return the ids of a person's sessions as they are listed."""
    return [found["id"] for found in (await person("GET", "/sessions")).json()["items"]]


async def over(person: Person, client: object) -> bool:
    """Tell whether a session is of no use any more; it fails if it is of use in one way and not in the other."""
    by_token = (await person("GET")).status_code == 401
    by_refresh = (await person.service.refresh(client, person.refresh_token)).status_code == 400  # type: ignore[arg-type]
    assert by_token == by_refresh
    return by_token


async def test_people_see_where_they_are_signed_in(anywhere: Service) -> None:
    """By the application, the program, the network and the time; which one asks is marked."""
    user, app = await anywhere.a_user("mika"), await an_app(anywhere)
    first = await signed_in(anywhere, user, app, user_agent=FIREFOX)
    anywhere.clock.advance(60)
    second = await signed_in(anywhere, user, app, user_agent="unheard-of/1.0")
    anywhere.clock.advance(60)
    await anywhere.refresh(app, first.refresh_token)
    await signed_in(anywhere, await anywhere.a_user("ada"), app)
    answer = await second("GET", "/sessions")
    assert answer.headers["cache-control"] == "no-store"
    seen = [
        (found["device"], found["current"], found["created_at"], found["last_used_at"])
        for found in answer.json()["items"]
    ]
    assert seen == [
        ("Firefox on Linux", False, "2026-01-01T00:00:00Z", "2026-01-01T00:02:00Z"),
        (None, True, "2026-01-01T00:01:00Z", "2026-01-01T00:01:00Z"),
    ]
    newest = answer.json()["items"][0]
    assert (newest["client_id"], newest["client_name"], newest["network"]) == (app.id, "The app", "127.0.0.1")
    assert newest["expires_at"] == "2026-01-15T00:02:00Z"
    assert newest.keys() == {
        *("id", "client_id", "client_name", "device", "network", "created_at", "last_used_at", "expires_at", "current")
    }


async def test_sessions_that_are_over_are_not_listed(anywhere: Service) -> None:
    """Ended, given back, outdated, or of an application that is off."""
    user, app, other = await anywhere.a_user("mika"), await an_app(anywhere), await an_app(anywhere)
    stale = await signed_in(anywhere, user, app)
    anywhere.clock.advance(timedelta(days=14))
    mika = await signed_in(anywhere, user, app)
    given_back, disabled = await signed_in(anywhere, user, app), await signed_in(anywhere, user, other)
    assert len(await session_ids(mika)) == 3
    await anywhere.revoke(app, given_back.refresh_token)
    await anywhere.within(lambda tx: anywhere.services.clients.set_enabled(tx, other.id, False))
    anywhere.clock.advance(2)
    assert len(await session_ids(mika)) == 1
    assert (await disabled("GET")).status_code == 401
    assert (await anywhere.refresh(app, stale.refresh_token)).status_code == 400


async def test_a_session_is_ended_at_once(anywhere: Service) -> None:
    """Its token and its refresh token are refused from then on; the others stay."""
    user, app = await anywhere.a_user("mika"), await an_app(anywhere)
    mika, lost = await signed_in(anywhere, user, app), await signed_in(anywhere, user, app)
    [lost_id] = set(await session_ids(mika)) - {
        found["id"] for found in (await mika("GET", "/sessions")).json()["items"] if found["current"]
    }
    assert (await mika("DELETE", f"/sessions/{lost_id}")).status_code == 204
    assert await over(lost, app)
    assert not await over(mika, app)
    assert (await mika("DELETE", f"/sessions/{lost_id}")).status_code == 404
    [event] = await anywhere.events("session.ended")
    assert (event.actor, event.target, event.detail) == (str(user.id), str(user.id), {"session": lost_id})


async def test_signing_out_everywhere_meets_a_deletion(service: Service) -> None:
    """Whoever comes second finds nobody there, and no fault."""
    mika = await signed_in(service, await service.a_user("mika"))
    async with held(service) as deletion:
        await service.services.users.delete(deletion.tx, mika.user.id)
        ending = await blocked(service, mika("DELETE", "/sessions"))
        await deletion.commit()
        assert (await ending).status_code == 404


async def test_nobody_ends_the_session_of_somebody_else(anywhere: Service) -> None:
    """404, as for one that never was; an operator's role makes no difference here."""
    app = await an_app(anywhere)
    mika = await signed_in(anywhere, await anywhere.a_user("mika"), app)
    root = await signed_in(anywhere, await anywhere.a_user("root", role="super_admin"), app)
    [target] = await session_ids(mika)
    answers = [await root("DELETE", f"/sessions/{session}") for session in (target, uuid.uuid4())]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].content == answers[1].content
    assert not await over(mika, app)
    assert await anywhere.events("session.ended") == []


@pytest.mark.case("REF-26")
async def test_signing_out_everywhere_ends_every_session(anywhere: Service) -> None:
    """Also the one it was asked for in; others' sessions and the own keys stay."""
    user, app = await anywhere.a_user("mika"), await an_app(anywhere)
    mika, elsewhere = await signed_in(anywhere, user, app), await signed_in(anywhere, user, await an_app(anywhere))
    ada, script = await signed_in(anywhere, await anywhere.a_user("ada"), app), await with_key(anywhere, user)
    assert (await mika("DELETE", "/sessions")).status_code == 204
    assert await over(mika, app)
    assert (await elsewhere("GET")).status_code == 401
    assert not await over(ada, app)
    assert (await script("GET")).status_code == 200
    assert await session_ids(script) == []
    [event] = await anywhere.events("sessions.ended")
    assert event.detail == {"current_kept": False}


@pytest.mark.case("REF-26")
async def test_signing_out_everywhere_else_leaves_the_one_that_asks(anywhere: Service) -> None:
    """It can be refreshed, and it is listed as the only one."""
    user, app = await anywhere.a_user("mika"), await an_app(anywhere)
    mika, elsewhere = await signed_in(anywhere, user, app), await signed_in(anywhere, user, app)
    assert (await mika("DELETE", "/sessions?except_current=true")).status_code == 204
    assert await over(elsewhere, app)
    assert len(await session_ids(mika)) == 1
    assert not await over(mika, app)


async def test_a_sign_in_on_its_way_does_not_outlive_signing_out_everywhere(database_url: str) -> None:
    """Its password was looked at before, so it belongs to what was ended."""
    async with running(test_settings(database_url)) as service:
        user, app = await service.a_user("mika"), await an_app(service)
        async with held(service) as signing_out:
            await service.services.users.end_sessions(signing_out.tx, user.id)
            late = await blocked(service, service.token(app, grant_type="password", username="mika", password=PASSWORD))
            await signing_out.commit()
            assert (await late).status_code == 400


async def test_a_key_sees_and_ends_sessions(anywhere: Service) -> None:
    """As far as its scope goes; none of them is its own, so it keeps none."""
    user, app = await anywhere.a_user("mika"), await an_app(anywhere)
    mika, script = await signed_in(anywhere, user, app), await with_key(anywhere, user)
    assert [found["current"] for found in (await script("GET", "/sessions")).json()["items"]] == [False]
    assert (await script("DELETE", "/sessions?except_current=true")).status_code == 204
    assert await over(mika, app)
    reader = await with_key(anywhere, user, ["account:read"])
    assert (await reader("DELETE", "/sessions")).status_code == 403


async def test_sessions_come_in_pages(anywhere: Service) -> None:
    """Each once, in one order; a cursor is good for its own list only."""
    user, app = await anywhere.a_user("mika"), await an_app(anywhere)
    for _ in range(5):
        mika = await signed_in(anywhere, user, app)
    anywhere.clock.advance(60)
    mika = await signed_in(anywhere, user, app)
    everything = await session_ids(mika)
    assert len(everything) == 6
    pages, cursor = [], ""
    while cursor is not None:
        answer = (await mika("GET", f"/sessions?limit=4{f'&cursor={cursor}' if cursor else ''}")).json()
        pages.append([found["id"] for found in answer["items"]])
        first, cursor = cursor or answer["next_cursor"], answer["next_cursor"]
    assert pages == [everything[:4], everything[4:]]
    ada = await signed_in(anywhere, await anywhere.a_user("ada"), app)
    assert (await ada("GET", f"/sessions?cursor={first}")).status_code == 422
    assert (await mika("GET", "/sessions?limit=101")).status_code == 422
    assert (await mika("GET", f"/sessions?cursor={first[:-2]}AA")).status_code == 422


@pytest.mark.parametrize("path", ["/sessions/nonsense", "/sessions/..", "/sessions?except_current=perhaps"])
async def test_a_malformed_request_ends_nothing(anywhere: Service, path: str) -> None:
    """It is refused."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    assert (await mika("DELETE", path)).status_code in (404, 405, 422)
    assert (await mika("GET")).status_code == 200


# -- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user_agent", "device"),
    [
        (FIREFOX, "Firefox on Linux"),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko)"
            " Version/17.5 Mobile/15E148 Safari/604.1",
            "Mobile Safari on iOS",
        ),
        (
            "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/130.0.0.0 "
            "Safari/537.36",
            "Chrome on Windows",
        ),
        ("curl/8.5.0", "curl"),
        ("unheard-of/1.0", None),
        ("", None),
        (None, None),
        ("\x1b[31m\u202e<script>", None),
        ("x" * 100_000 + FIREFOX, None),
    ],
    ids=["firefox", "iphone", "windows", "curl", "unknown", "empty", "none", "steering", "long"],
)
def test_a_device_is_shown_in_words(user_agent: str | None, device: str | None) -> None:
    """What is not recognised has none; nothing of a user agent is shown as it was sent."""
    assert device_of(user_agent) == device


async def test_a_session_without_a_user_agent_is_listed(anywhere: Service) -> None:
    """As those are that began before it was kept."""
    mika = await signed_in(anywhere, await anywhere.a_user("mika"))
    await anywhere.execute(update(refresh_families).values(user_agent=None, network=None))
    [found] = (await mika("GET", "/sessions")).json()["items"]
    assert (found["device"], found["network"]) == (None, None)
