"""Tokens that are issued all the time, and kept and checked until they expire."""

import asyncio
import itertools
import random
import secrets
import time as real
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import httpx2

from identity_service.accounts.users import User
from tests.rotation.clock import Time
from tests.rotation.processes import Replica
from tests.rotation.record import Minted, Record
from tests.rotation.siblings import Sibling, Spawn
from tests.support.service import PASSWORD, Registered
from tests.support.tokens import parts_of

_SWEEP = 0.05  # real seconds
_NEAR_THE_END = 0.05  # share of a token's life
_SESSION = 400.0  # seconds before a user signs in anew: at most ten sessions whose tokens live; fifty would be too many


@dataclass(frozen=True, slots=True)
class Token:
    """A token and what it says about itself."""

    text: str
    kid: str
    issued_at: float
    expires_at: float
    at_home: bool
    """Whether it is for our own API, and not for a sibling."""

    def near_its_end(self, now: float) -> bool:
        """Tell whether it is in the last twentieth of its life."""
        return self.expires_at > now >= self.expires_at - _NEAR_THE_END * (self.expires_at - self.issued_at)


@final
class Pool:
    """The good tokens for one audience: neither expired nor of a key that was compromised."""

    def __init__(self, time: Time) -> None:
        self._time = time
        self.tokens: list[Token] = []
        """Those that were not swept away yet, the newest last."""
        self._dying: list[Token] = []
        self._newest: dict[str, Token] = {}
        self._withdrawn: set[str] = set()
        self.needed: dict[str, float] = {}
        """When the last token of each key expires."""

    def add(self, token: Token, replica: str) -> None:
        """Take in a token that a replica has issued, unless its key was withdrawn while it was on its way."""
        if token.kid in self._withdrawn:
            return
        self._newest[replica] = token
        self.tokens.append(token)
        self.needed[token.kid] = max(self.needed.get(token.kid, 0), token.expires_at)

    def withdraw(self, kid: str) -> list[Token]:
        """Regard no token of this key as good any more, also of those to come; return those there are."""
        self._withdrawn.add(kid)
        self.needed.pop(kid, None)
        return [token for token in self.tokens if token.kid == kid]

    def good(self, token: Token) -> bool:
        """Tell whether a token must be accepted now."""
        return token.expires_at > self._time.now and token.kid not in self._withdrawn

    def pick(self) -> list[Token]:
        """Return tokens to check: the newest of each replica, one about to expire, and any."""
        picked = list(self._newest.values())
        for choice in (self._dying, self.tokens):
            if choice:
                picked.append(random.choice(choice))  # noqa: S311  # nothing to guess here
        return [token for token in picked if self.good(token)]

    def sweep(self) -> None:
        """Let go of what has expired."""
        now = self._time.now
        self.tokens = [token for token in self.tokens if self.good(token)]
        self._dying = [token for token in self.tokens if token.near_its_end(now)]


@dataclass(frozen=True)
class Load:
    """What the tasks of the load share. `siblings` and `own` are tokens for siblings, and for our own API."""

    time: Time
    record: Record
    http: httpx2.AsyncClient
    siblings: Pool
    own: Pool
    issuer: str
    audience: str
    asker: Registered
    """Who may introspect the siblings' tokens."""
    spawn: Spawn
    """Starts a task that ends with the run."""
    pause: float
    """Real seconds between two requests of one task."""
    signing: dict[str, str] = field(default_factory=dict)
    """The key that each replica has last been seen to sign with."""

    async def sweep(self) -> None:
        """Keep the pools small until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP)
            self.siblings.sweep()
            self.own.sweep()

    async def ask(
        self, replica: Replica, form: Mapping[str, str], *, auth: tuple[str, str] | None = None, key: str | None = None
    ) -> dict[str, Any] | None:
        """
        Ask a replica for a token; put it into its pool and return the answer, or None when there was none.

        While somebody is being killed, no answer and 503 are nobody's fault; at any other time they are findings.
        """
        look, sent = self.record.weather.look(), real.monotonic()
        headers = {"idempotency-key": key} if key else {}
        try:
            answer = await self.http.post(f"{replica.url}/token", data=dict(form), auth=auth, headers=headers)
        except httpx2.TransportError as error:
            if self.record.weather.calm_since(look):
                self.record.not_issued.add(f"{replica.name}: {form['grant_type']}: {type(error).__name__}")
            return None
        if answer.status_code != 200:
            if answer.status_code != 503 or self.record.weather.calm_since(look):
                self.record.not_issued.add(f"{replica.name}: {form['grant_type']}: {answer.status_code} {answer.text}")
            return None
        body: dict[str, Any] = answer.json()
        self._keep(replica, body["access_token"], sent)
        return body

    def _keep(self, replica: Replica, text: str, sent: float) -> None:
        header, claims = parts_of(text)
        token = Token(text, header["kid"], claims["iat"], claims["exp"], at_home=claims["aud"] == self.issuer)
        self.record.minted.append(Minted(token.kid, token.issued_at, replica.name))
        self.record.minted_by[f"{replica.name}/{replica.life}"] += 1
        self.record.used("signed", replica.name, token.kid, sent)
        self.signing[replica.name] = token.kid
        (self.own if token.at_home else self.siblings).add(token, replica.name)

    async def keep_asking(self, replica: Replica, ask: Callable[[], Awaitable[None]]) -> None:
        """Call `ask` again and again while the replica serves, until cancelled."""
        while True:
            await asyncio.sleep(self.pause)
            if replica.serving:
                await ask()

    async def mint_for(self, replica: Replica, client: Registered) -> None:
        """Let a client that acts for itself ask for tokens."""
        form = {"grant_type": "client_credentials", "resource": self.audience}

        async def ask() -> None:
            await self.ask(replica, form, auth=client.auth)

        await self.keep_asking(replica, ask)

    async def mint_for_user(self, replica: Replica, client: Registered, user: User) -> None:
        """Let a user sign in and refresh, for the siblings and for our own API in turn."""
        resources = itertools.cycle((self.issuer, self.audience))
        refresh_token, key, signed_in_at = None, "", 0.0

        async def ask() -> None:
            nonlocal refresh_token, key, signed_in_at
            if refresh_token is None:
                signed_in_at = self.time.now
                form = {"grant_type": "password", "username": user.username, "password": PASSWORD, **client.form}
                body = await self.ask(replica, form)
            else:
                form = {"grant_type": "refresh_token", "refresh_token": refresh_token, **client.form}
                # The same key for the same token: when the answer is lost with the replica, asking again is safe.
                body = await self.ask(replica, form | {"resource": next(resources)}, key=key)
            if body is not None:
                over = self.time.now > signed_in_at + _SESSION
                refresh_token, key = (None if over else body["refresh_token"]), secrets.token_hex(16)

        await self.keep_asking(replica, ask)

    async def check_at(self, sibling: Sibling) -> None:
        """Let a sibling check tokens for it, until cancelled."""
        while True:
            await asyncio.sleep(self.pause)
            for token in self.siblings.pick():
                reason = await sibling.verdict(token.text)
                self._checked(sibling.name, self.siblings, token, reason, sibling.copy_age())

    async def check_at_home(self, replica: Replica) -> None:
        """Show a replica tokens, whoever issued them, until cancelled: to its own API, and to be introspected."""
        turns = itertools.cycle(((self.own, "own API"), (self.siblings, "introspection")))

        async def ask() -> None:
            pool, where = next(turns)
            for token in pool.pick():
                if not replica.serving:
                    return
                look = self.record.weather.look()
                good = await self.show(replica, token)
                if good is not None:
                    self._checked(f"{replica.name}'s {where}", pool, token, None if good else "refused", None)
                elif self.record.weather.calm_since(look):
                    self.record.refused.add(f"{replica.name}'s {where} had no answer")

        await self.keep_asking(replica, ask)

    async def show(self, replica: Replica, token: Token) -> bool | None:
        """Tell whether a replica accepts a token, at its own API or by introspection; None if it did not say."""
        sent = real.monotonic()
        try:
            if token.at_home:
                authorization = {"authorization": f"Bearer {token.text}"}
                answer = await self.http.get(f"{replica.url}/v1/users/me", headers=authorization)
                good = {200: True, 401: False}.get(answer.status_code)
            else:
                form = {"token": token.text}
                answer = await self.http.post(f"{replica.url}/introspect", data=form, auth=self.asker.auth)
                good = answer.json()["active"] if answer.status_code == 200 else None
        except httpx2.TransportError:
            return None
        if good:
            self.record.used("accepted" if token.at_home else "introspected", replica.name, token.kid, sent)
        return good

    def _checked(self, who: str, pool: Pool, token: Token, reason: str | None, copy_age: float | None) -> None:
        """Note a check; a refusal counts if the token was picked as good and is good still, after the answer."""
        checks = self.record.checks[who]
        checks.number += 1
        checks.near_the_end += token.near_its_end(self.time.now)
        if copy_age is not None:
            checks.oldest_copy = max(checks.oldest_copy or 0.0, copy_age)
        if reason is None:
            checks.kids.add(token.kid)
        elif pool.good(token):
            copy = "" if copy_age is None else f", with a copy {copy_age:.0f} s old"
            left = token.expires_at - self.time.now
            self.record.refused.add(f"{who}: {reason}, {left:.0f} s before the token's end{copy}")
