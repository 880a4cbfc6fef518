"""Reads, authenticates and changes clients and their secrets."""

import hashlib
import hmac
import re
import secrets
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import fields
from datetime import timedelta
from typing import Any, final

from sqlalchemy import delete, insert, or_, select, update

from identity_service.accounts.clients.metadata import (
    NO_AUTHENTICATION,
    Client,
    NewClient,
    NewSecret,
    SecretRecord,
    demand,
)
from identity_service.infra.database import Transaction
from identity_service.infra.parts import in_parts
from identity_service.infra.runtime import Clock, Secret, new_id
from identity_service.infra.runtime.cache import RowCache
from identity_service.infra.runtime.ids import encode_token
from identity_service.infra.tables import client_secrets, clients

_MOST_SECRETS = 2
_SECRET_BYTES = 32
_CLIENT_ID = re.compile(r"cl_[0-9A-Za-z]{22}")


def _row(client: NewClient) -> dict[str, Any]:
    """Return what a registration is stored as."""
    return {
        "name": client.name,
        "first_party": client.first_party,
        "token_endpoint_auth_method": client.token_endpoint_auth_method,
        "grant_types": sorted(set(client.grant_types)),
        "redirect_uris": list(client.redirect_uris),
        "scope": " ".join(dict.fromkeys(client.scope)),
        "audiences": list(dict.fromkeys(client.audiences)),
        "introspect": list(dict.fromkeys(client.introspect)),
        "cors_origins": list(client.cors_origins),
        "exchange_audiences": list(dict.fromkeys(client.exchange_audiences)),
        "require_pkce": client.require_pkce,
        "access_token_ttl": client.access_token_ttl,
        "refresh_idle_ttl": client.refresh_idle_ttl,
        "refresh_absolute_ttl": client.refresh_absolute_ttl,
        "refresh_retry_window": client.refresh_retry_window,
    }


def _digest(secret: str) -> bytes:
    # A generated secret carries 256 bits: there is nothing to guess, so a fast digest serves, and a slow one would
    # let anybody make the token endpoint work hard.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


@final
class Clients:
    """Reads, authenticates and changes clients."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._cache: RowCache[str, Client | None] = RowCache(clock)

    async def find(self, tx: Transaction, client_id: str) -> Client | None:
        """Return the client of that id, enabled or not, at most a second old; None if there is none."""
        if not _CLIENT_ID.fullmatch(client_id):
            return None  # not one of ours; the database need not be asked
        return await self._cache.get(client_id, lambda: self._load(tx, client_id))

    def proves(self, client: Client, secret: Secret) -> bool:
        """Return whether `secret` is one of the client's live secrets, in a time that does not depend on it."""
        presented, now, right = _digest(secret.reveal()), self._clock.now(), False
        for digest, expires_at in client.secrets:
            live = expires_at is None or expires_at > now
            right |= hmac.compare_digest(digest, presented) and live
        return right

    async def register(self, tx: Transaction, new: NewClient) -> tuple[Client, Secret | None]:
        """
        Store a client under a generated id; return it with its secret, which is never shown again.

        Ids are never chosen, so none can be made to equal a user's `sub` (RFC 9700 §4.15). Raises
        InvalidClientMetadata.
        """
        new.check()
        now = self._clock.now()
        client_id = "cl_" + encode_token("", secrets.token_bytes(16))[:22]
        await tx.execute(
            insert(clients).values(
                id=client_id,
                **_row(new),
                enabled=True,
                epoch=0,
                epoch_at=now,
                created_at=now,
                updated_at=now,
            )
        )
        public = new.token_endpoint_auth_method == NO_AUTHENTICATION
        secret = None if public else (await self._add_secret(tx, client_id)).text
        return await self._known(tx, client_id), secret

    async def rotate_secret(self, tx: Transaction, client_id: str, *, overlap: timedelta) -> NewSecret:
        """
        Add a new secret and let the others end after `overlap`; at most two are live, the oldest gives way.

        Raises LookupError for an unknown client, InvalidClientMetadata for one that has no secrets.
        """
        # One rotation at a time, or two at once would leave three secrets.
        await tx.execute(select(clients.c.id).where(clients.c.id == client_id).with_for_update())
        client = await self._known(tx, client_id)
        demand(not client.public, "token_endpoint_auth_method: a public client has no secret")
        now = self._clock.now()
        live = select(client_secrets.c.id).where(client_secrets.c.client_id == client_id)
        newest_first = (
            (await tx.execute(live.order_by(client_secrets.c.created_at.desc(), client_secrets.c.id.desc())))
            .scalars()
            .all()
        )
        await tx.execute(delete(client_secrets).where(client_secrets.c.id.in_(newest_first[_MOST_SECRETS - 1 :])))
        # Never later than it would have ended anyway: what was ended must not come back.
        ends = client_secrets.c.expires_at
        await tx.execute(
            update(client_secrets)
            .where(client_secrets.c.client_id == client_id, or_(ends.is_(None), ends > now + overlap))
            .values(expires_at=now + overlap)
        )
        self._cache.forget(client_id)
        return await self._add_secret(tx, client_id)

    async def set_enabled(self, tx: Transaction, client_id: str, enabled: bool) -> bool:
        """
        Enable or disable a client; return False if there is none.

        Disabling moves its epoch on: its families and its own tokens die with it, and enabling does not revive them.
        """
        values: dict[str, Any] = {"enabled": enabled, "updated_at": self._clock.now()}
        if not enabled:
            values |= {"epoch": clients.c.epoch + 1, "epoch_at": self._clock.now()}
        changed = await tx.execute(
            update(clients).where(clients.c.id == client_id).values(values).returning(clients.c.id)
        )
        self._cache.forget(client_id)
        return changed.first() is not None

    async def end_all_sessions(self, tx: Transaction, epoch: int) -> int:
        """
        End every session and every token of all clients by an epoch far ahead of all; return how many there are.

        For a restored database; see `Users.end_all_sessions`. Raises ValueError if a client's epoch is as far.
        """
        c = clients.c
        if (await tx.execute(select(c.id).where(c.epoch >= epoch).limit(1))).first() is not None:
            raise ValueError("a client's epoch has come as far already")
        moved = 0
        async for part in in_parts(tx, c.id):
            changed = update(clients).where(part).values(epoch=epoch, epoch_at=self._clock.now())
            moved += (await tx.execute(changed)).rowcount
        self._cache.forget_all()
        return moved

    async def update(self, tx: Transaction, client: Client, changes: Mapping[str, Any]) -> Client:
        """
        Change what a client is registered with: `changes` by the names of NewClient's fields; return it as it is now.

        Tokens that were issued stay good until they expire; refreshed ones are cut to the new scope. Whether it can
        keep a secret cannot change: that is another client. Raises InvalidClientMetadata.
        """
        known = {name.name: getattr(client, name.name) for name in fields(NewClient)}
        changed = NewClient(**{**known, **changes})
        changed.check()
        public = changed.token_endpoint_auth_method == NO_AUTHENTICATION
        demand(public == client.public, "token_endpoint_auth_method: who has a secret keeps having one")
        await tx.execute(
            update(clients).where(clients.c.id == client.id).values(**_row(changed), updated_at=self._clock.now())
        )
        self._cache.forget(client.id)
        return await self._known(tx, client.id)

    async def locked(self, tx: Transaction, client_id: str) -> Client | None:
        """Return a client as stored, holding its row until the transaction ends; None if there is none."""
        if not _CLIENT_ID.fullmatch(client_id):
            return None
        await tx.execute(select(clients.c.id).where(clients.c.id == client_id).with_for_update())
        return await self._load(tx, client_id)

    async def listed(self, tx: Transaction, *, after: str | None, limit: int) -> list[Client]:
        """Return at most `limit` clients by id, those after `after`."""
        statement = select(clients).order_by(clients.c.id).limit(limit)
        if after is not None:
            statement = statement.where(clients.c.id > after)
        return [self._client(row, ()) for row in (await tx.execute(statement)).all()]

    async def secrets_of(self, tx: Transaction, client_id: str) -> list[SecretRecord]:
        """Return when a client's secrets were made and end, newest first; never the secrets."""
        c = client_secrets.c
        statement = select(c.id, c.created_at, c.expires_at).where(c.client_id == client_id)
        rows = (await tx.execute(statement.order_by(c.created_at.desc(), c.id.desc()))).all()
        return [SecretRecord(row.id, row.created_at, row.expires_at) for row in rows]

    async def delete_secret(self, tx: Transaction, client_id: str, secret_id: uuid.UUID) -> bool:
        """End one secret at once; return False if the client has no such secret."""
        c = client_secrets.c
        gone = await tx.execute(
            delete(client_secrets).where(c.id == secret_id, c.client_id == client_id).returning(c.id)
        )
        self._cache.forget(client_id)
        return gone.first() is not None

    async def delete(self, tx: Transaction, client_id: str) -> bool:
        """Forget a client with all its families, keys and secrets; return False if there is none."""
        gone = await tx.execute(delete(clients).where(clients.c.id == client_id).returning(clients.c.id))
        self._cache.forget(client_id)
        return gone.first() is not None

    async def all(self, tx: Transaction) -> list[Client]:
        """Return every client, oldest first."""
        rows = (await tx.execute(select(clients).order_by(clients.c.created_at, clients.c.id))).all()
        return [self._client(row, ()) for row in rows]

    async def cors_origins(self, tx: Transaction) -> frozenset[str]:
        """Return every origin that some enabled client has named as one of its own."""
        lists = await tx.execute(select(clients.c.cors_origins).where(clients.c.enabled).distinct())
        return frozenset(origin for origins in lists.scalars() for origin in origins)

    async def _add_secret(self, tx: Transaction, client_id: str) -> NewSecret:
        secret = NewSecret(new_id(), Secret(encode_token("cs_", secrets.token_bytes(_SECRET_BYTES))))
        await tx.execute(
            insert(client_secrets).values(
                id=secret.id,
                client_id=client_id,
                digest=_digest(secret.text.reveal()),
                created_at=self._clock.now(),
            )
        )
        return secret

    async def _known(self, tx: Transaction, client_id: str) -> Client:
        client = await self._load(tx, client_id)
        if client is None:
            raise LookupError(client_id)
        return client

    async def _load(self, tx: Transaction, client_id: str) -> Client | None:
        row = (await tx.execute(select(clients).where(clients.c.id == client_id))).first()
        if row is None:
            return None
        held = await tx.execute(
            select(client_secrets.c.digest, client_secrets.c.expires_at).where(client_secrets.c.client_id == client_id)
        )
        return self._client(row, held.all())

    @staticmethod
    def _client(row: Any, held: Iterable[Any]) -> Client:
        return Client(
            id=row.id,
            name=row.name,
            first_party=row.first_party,
            token_endpoint_auth_method=row.token_endpoint_auth_method,
            grant_types=frozenset(row.grant_types),
            redirect_uris=tuple(row.redirect_uris),
            scope=tuple(row.scope.split()),
            audiences=tuple(row.audiences),
            introspect=tuple(row.introspect),
            cors_origins=tuple(row.cors_origins),
            exchange_audiences=tuple(row.exchange_audiences),
            require_pkce=row.require_pkce,
            access_token_ttl=row.access_token_ttl,
            refresh_idle_ttl=row.refresh_idle_ttl,
            refresh_absolute_ttl=row.refresh_absolute_ttl,
            refresh_retry_window=row.refresh_retry_window,
            enabled=row.enabled,
            epoch=row.epoch,
            secrets=tuple((secret.digest, secret.expires_at) for secret in held),
        )
