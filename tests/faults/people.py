"""
People who use the service all the time, each of them one act after the other, and know what must be true for them.

An act whose answer is not sure is repeated until it is, as a client would, wherever repeating does no harm; where it
would (a sign-in, a new API key), what may have come of it is counted. So at the end everything is known.
"""

import asyncio
import random
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, final

from tests.faults.asking import Line
from tests.faults.ledger import Account, Key, Ledger, Session, Told
from tests.support.service import Registered
from tests.support.tokens import parts_of

API_KEY_TYPE: Final = "urn:identity-service:params:oauth:token-type:api-key"
_EXCHANGE: Final = "urn:ietf:params:oauth:grant-type:token-exchange"
_MOST_SESSIONS: Final = 4
_MOST_KEYS: Final = 3
_NEARLY_OVER: Final = 90.0  # seconds before an access token's end in which nobody relies on it
_TRIES: Final = 100
_PAUSE: Final = 0.3  # seconds

HABITS: Final[Mapping[str, float]] = {
    "refresh": 24,
    "refresh_without_key": 8,
    "refresh_and_hang_up": 8,
    "look": 8,
    "introspect": 8,
    "rename": 8,
    "sign_in": 4,
    "revoke": 4,
    "make_key": 4,
    "use_key": 8,
    "end_key": 4,
    "be_disabled": 4,
    "change_password": 2,
}
"""How often people do what, in relation to each other."""


@dataclass(frozen=True)
class Clients:
    """The registered clients that people and machines come through."""

    app: Registered
    """Public: people sign in through it."""
    machine: Registered
    """Acts for itself, for siblings."""
    operator: Registered
    """Acts for itself at our own API: disables people and enables them."""
    exchanger: Registered
    """A sibling that takes API keys."""
    asker: Registered
    """A sibling that introspects."""


@final
class Operator:
    """A service of the operators, which disables people and enables them."""

    def __init__(self, client: Registered, line: Line, ledger: Ledger) -> None:
        self._client = client
        self._line = line
        self._ledger = ledger
        self._token = ""
        self._expires_at = 0.0

    async def tell(self, act: str, account: Account) -> bool:
        """Do `disable` or `enable` to somebody; return whether it was done, which it must be."""
        headers = {"authorization": f"Bearer {await self._fresh()}"}
        told, _ = await self._line.insist(act, "POST", f"/v1/admin/users/{account.id}/{act}", headers=headers)
        if not told.done:
            self._ledger.complain(f"an operator could not {act} somebody: {told.status} {told.body}")
        return told.done

    async def _fresh(self) -> str:
        if time.time() > self._expires_at - _NEARLY_OVER:
            form = {"grant_type": "client_credentials"}
            told, _ = await self._line.insist("client_credentials", "POST", "/token", data=form, auth=self._client.auth)
            self._token = told.body["access_token"]
            self._expires_at = parts_of(self._token)[1]["exp"]
        return self._token


@final
class Person:
    """Somebody with an account, from a network of their own."""

    def __init__(
        self, account: Account, clients: Clients, line: Line, ledger: Ledger, chance: random.Random, operator: Operator
    ) -> None:
        self.account = account
        self._clients = clients
        self._line = line
        self._ledger = ledger
        self._chance = chance
        self._operator = operator

    async def act(self, habits: Mapping[str, float]) -> None:
        """Do one thing; which one, chance and what there is decide."""
        if not self.account.live:
            await self.sign_in()
            return
        acts = list(habits)
        (name,) = self._chance.choices(acts, [habits[act] for act in acts])
        act: Callable[[], Awaitable[None]] = getattr(self, name)
        await act()

    # -- sessions -------------------------------------------------------------------------------------------------

    async def sign_in(self) -> None:
        """Sign in once more, if there are not too many sessions; who gets no answer tries again later."""
        if len(self.account.live) >= _MOST_SESSIONS:
            return
        told = await self._try_password(self.account.password)
        if told.sure and not told.done:
            self._complain(f"the right password was refused: {told.status} {told.body}")

    async def _try_password(self, password: str) -> Told:
        form = {"grant_type": "password", "username": self.account.username, "password": password}
        told = await self._line.ask("sign_in", "POST", "/token", data=form | self._clients.app.form)
        if told.done:
            token = self._token(told)
            session_id = uuid.UUID(parts_of(token)[1]["sid"])
            if any(session.id == session_id for session in self.account.sessions):
                self._complain("a sign-in gave a session that was there before")
            self.account.sessions.append(
                Session(session_id, [told.body["refresh_token"]], token, parts_of(token)[1]["exp"])
            )
            self.account.done["grant.password"] += 1
        elif not told.sure:
            self.account.unknown["grant.password"] += 1
        return told

    async def refresh(self) -> None:
        """Refresh as the documentation advises: with a key for this rotation, again until there is an answer."""
        await self._refresh(key=secrets.token_hex(16))

    async def refresh_without_key(self) -> None:
        """Refresh as a client does that has never heard of keys."""
        await self._refresh(key=None)

    async def refresh_and_hang_up(self) -> None:
        """Refresh, lose the answer on the way, and ask again with the same key."""
        await self._refresh(key=secrets.token_hex(16), leave_after=self._chance.uniform(0, 0.03))

    async def _refresh(self, *, key: str | None, leave_after: float | None = None) -> None:
        if (session := self._a_session()) is None:
            return
        form = {"grant_type": "refresh_token", "refresh_token": session.tokens[-1]} | self._clients.app.form
        headers = {"idempotency-key": key} if key is not None else None
        told, unsure = await self._line.insist(
            "refresh", "POST", "/token", data=form, headers=headers, leave_after=leave_after
        )
        if unsure:
            session.unsure_at = time.monotonic()
        if told.done:
            token = told.body["refresh_token"]
            if token in session.tokens:
                self._complain("a refresh gave a token that was handed out before")
            session.tokens.append(token)
            session.access_token = self._token(told)
            session.expires_at = parts_of(session.access_token)[1]["exp"]
        elif told.error == "invalid_grant" and key is None and unsure:
            # The first attempt was acted on, and without a key the second one is a replay: strict, and documented.
            session.over = "reuse"
            self.account.done["refresh.reuse_detected"] += 1
        elif told.status != 429:
            self._complain(f"a good refresh token was refused: {told.status} {told.body}")
            session.over = "refused"

    async def revoke(self) -> None:
        """Sign out of one session, and see that it is over everywhere."""
        if (session := self._a_session()) is None:
            return
        form = {"token": self._chance.choice(session.tokens)} | self._clients.app.form
        told, _ = await self._line.insist("revoke", "POST", "/revoke", data=form)
        if not told.done:
            self._complain(f"a revocation was refused: {told.status} {told.body}")
            return
        session.over = "revoked"
        self.account.done["token.revoked"] += 1
        await self._is_over(session)

    async def _is_over(self, session: Session) -> None:
        """See that a session that is surely over is refused, and its access token inactive."""
        form = {"grant_type": "refresh_token", "refresh_token": session.tokens[-1]} | self._clients.app.form
        told = await self._line.ask("refresh of what is over", "POST", "/token", data=form)
        if told.sure and told.error != "invalid_grant":
            self._complain(f"a session that is {session.over} was refreshed: {told.status}")
        told = await self._introspect(session.access_token)
        if told.done and told.body["active"]:
            self._complain(f"a token of a session that is {session.over} is still active")

    # -- looking --------------------------------------------------------------------------------------------------

    async def look(self) -> None:
        """See one's own profile: what was acknowledged last must be what it shows."""
        if (session := self._a_session(usable=True)) is None:
            return
        told = await self._line.ask("profile", "GET", "/v1/users/me", headers=_bearer(session))
        if told.done:
            if (told.body["id"], told.body["name"]) != (str(self.account.id), self.account.name):
                self._complain(f"the profile shows {told.body['name']!r}, not {self.account.name!r}")
        elif told.sure:
            self._complain(f"a good access token was refused: {told.status} {told.body}")

    async def introspect(self) -> None:
        """Let a sibling ask about one's newest token."""
        if (session := self._a_session(usable=True)) is None:
            return
        told = await self._introspect(session.access_token)
        if told.sure and not (told.done and told.body["active"]):
            self._complain(f"a good access token is said not to be active: {told.status}")

    async def _introspect(self, token: str) -> Told:
        return await self._line.ask(
            "introspect", "POST", "/introspect", data={"token": token}, auth=self._clients.asker.auth
        )

    # -- the account ----------------------------------------------------------------------------------------------

    async def rename(self) -> None:
        """Change the name that is shown."""
        if (session := self._a_session(usable=True)) is None:
            return
        name = f"Name {secrets.token_hex(6)}"
        told, _ = await self._line.insist(
            "rename", "PATCH", "/v1/users/me", json={"name": name}, headers=_bearer(session)
        )
        if told.done:
            self.account.name = name
            self.account.done["user.changed"] += 1
            if told.body["name"] != name:
                self._complain("a change of the name was acknowledged with another name")
        else:
            self._complain(f"a change of the name was refused: {told.status} {told.body}")

    async def change_password(self) -> None:
        """Choose a new password and keep this session; who hears nothing finds out which one is good."""
        if (session := self._a_session(usable=True)) is None:
            return
        new = f"Kanarienvogel-{secrets.token_hex(6)}"
        body = {"current_password": self.account.password, "new_password": new, "keep_current_session": True}
        told = await self._line.ask(
            "change_password", "POST", "/v1/users/me/password", json=body, headers=_bearer(session)
        )
        if told.sure and not told.done:
            if told.status != 429:
                self._complain(f"a change of the password was refused: {told.status} {told.body}")
            return
        before = len(self.account.sessions)
        if told.done or await self._find_out(new):
            self.account.password = new
            self.account.end_sessions("ended by a new password", but=[session, *self.account.sessions[before:]])
            self.account.done["password.changed"] += 1

    async def _find_out(self, new: str) -> bool:
        """Return whether a new password is the one that counts now, by signing in."""
        for _ in range(_TRIES):
            for password in (new, self.account.password):
                if (await self._try_password(password)).done:
                    return password == new
            await asyncio.sleep(_PAUSE)
        self._complain("after a change of the password neither the old nor the new one is good")
        return False

    async def be_disabled(self) -> None:
        """Be disabled by an operator, see that everything is over, and be enabled again: what ended stays ended."""
        ended = self.account.live
        if not all(map(self._ledger.rested, ended)) or not await self._operator.tell("disable", self.account):
            return
        self.account.end_sessions("disabled")
        self.account.done["user.disabled"] += 1
        for session in ended[:1]:
            await self._is_over(session)
        for key in [key for key in self.account.keys if not key.over][:1]:
            if (await self._exchange(key)).done:
                self._complain("an API key of somebody who is disabled was exchanged")
        if await self._operator.tell("enable", self.account):
            self.account.done["user.enabled"] += 1
        for session in ended[-1:]:
            await self._is_over(session)

    # -- API keys -------------------------------------------------------------------------------------------------

    async def make_key(self) -> None:
        """Make an API key."""
        session = self._a_session(usable=True)
        if session is None or len([key for key in self.account.keys if not key.over]) >= _MOST_KEYS:
            return
        body = {"name": "Script", "scope": ["account:read"]}
        told = await self._line.ask("make_key", "POST", "/v1/users/me/api-keys", json=body, headers=_bearer(session))
        if told.done:
            self.account.keys.append(Key(told.body["id"], told.body["key"]))
            self.account.done["api_key.created"] += 1
        elif not told.sure:
            self.account.unknown["api_key.created"] += 1
        elif told.status != 429:
            self._complain(f"an API key was not made: {told.status} {told.body}")

    async def use_key(self) -> None:
        """Let a sibling exchange a key, and use it at our own API."""
        if not (keys := [key for key in self.account.keys if not key.over]):
            return
        key = self._chance.choice(keys)
        told = await self._exchange(key)
        if told.done:
            self._token(told)
        elif told.sure:
            self._complain(f"a good API key was not exchanged: {told.status} {told.body}")
        told = await self._line.ask("use_key", "GET", "/v1/users/me", headers={"x-api-key": key.text})
        if told.sure and not told.done:
            self._complain(f"a good API key was refused: {told.status} {told.body}")

    async def end_key(self) -> None:
        """Revoke a key, and see that it is over everywhere."""
        session = self._a_session(usable=True)
        keys = [key for key in self.account.keys if not key.over]
        if session is None or not keys:
            return
        key = self._chance.choice(keys)
        told, unsure = await self._line.insist(
            "end_key", "DELETE", f"/v1/users/me/api-keys/{key.id}", headers=_bearer(session)
        )
        if not told.done and not (told.status == 404 and unsure):
            self._complain(f"an API key was not revoked: {told.status} {told.body}")
            return
        key.over = True
        self.account.done["api_key.revoked"] += 1
        told = await self._exchange(key)
        if told.sure and told.error not in ("invalid_grant", "temporarily_unavailable") and told.status != 429:
            self._complain(f"a revoked API key was exchanged: {told.status}")

    async def _exchange(self, key: Key) -> Told:
        form = {"grant_type": _EXCHANGE, "subject_token": key.text, "subject_token_type": API_KEY_TYPE}
        return await self._line.ask("exchange", "POST", "/token", data=form, auth=self._clients.exchanger.auth)

    # -- within ---------------------------------------------------------------------------------------------------

    def _a_session(self, *, usable: bool = False) -> Session | None:
        """Return a session that must be good; `usable`: whose access token will be for a while."""
        now = time.time()
        live = [session for session in self.account.live if self._ledger.rested(session)]
        live = [session for session in live if not usable or session.expires_at > now + _NEARLY_OVER]
        return self._chance.choice(live) if live else None

    def _token(self, told: Told) -> str:
        """Return the access token of an answer, and note the key that it names."""
        token: str = told.body["access_token"]
        self._ledger.kids[parts_of(token)[0]["kid"]] = time.monotonic()
        return token

    def _complain(self, sentence: str) -> None:
        self._ledger.complain(f"{self.account.username}: {sentence}")


def _bearer(session: Session) -> dict[str, str]:
    return {"authorization": f"Bearer {session.access_token}"}
