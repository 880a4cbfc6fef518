"""What the service must hold for the good tokens to be good in every respect: keys, a person, a client, a session."""

import uuid
from datetime import timedelta

from cryptography.hazmat.primitives import serialization
from sqlalchemy import insert

from identity_service.infra.tables import clients, refresh_families, users
from identity_service.oauth.signing_keys import NewKey
from tests.contracts.torture import AUDIENCE, ISSUER
from tests.contracts.torture.forge import CLIENT, SCOPE, SESSION, SUBJECT
from tests.contracts.torture.keys import load
from tests.support.service import Registered, Service


async def settle(service: Service) -> Registered:
    """Give the service the keys and the rows that the tokens speak of; return a client that may ask about them."""
    now = service.clock.now()
    before = now - timedelta(days=1)
    client = {
        "name": "Torture",
        "first_party": True,
        "token_endpoint_auth_method": "none",
        "grant_types": ["password", "refresh_token"],
        "redirect_uris": [],
        "scope": SCOPE,
        "audiences": [ISSUER, AUDIENCE],
        "introspect": [],
        "cors_origins": [],
        "require_pkce": True,
        "refresh_retry_window": 0,
    }
    stamps = {"created_at": before, "updated_at": before}
    await service.execute(
        insert(users).values(
            id=uuid.UUID(SUBJECT),
            username="torture",
            email="torture@example.org",
            email_canonical="torture@example.org",
            password_form=1,
            role="user",
            enabled=True,
            epoch=0,
            **stamps,
        )
    )
    await service.execute(insert(clients).values(id=CLIENT, enabled=True, epoch=0, epoch_at=before, **client, **stamps))
    await service.execute(
        insert(refresh_families).values(
            id=uuid.UUID(SESSION),
            user_id=uuid.UUID(SUBJECT),
            client_id=CLIENT,
            user_epoch=0,
            client_epoch=0,
            generation=0,
            nonce=bytes(16),
            mac_kid="none",
            scope=SCOPE,
            audiences=[ISSUER, AUDIENCE],
            auth_time=before,
            amr="pwd",
            created_at=before,
            rotated_at=before,
            idle_expires_at=now + timedelta(days=1),
            absolute_expires_at=now + timedelta(days=1),
        )
    )
    signing_keys = service.services.signing_keys
    for key in (load().good, load().second):
        der = key.private.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        new = NewKey(key.kid, key.jwk, der)
        await service.within(
            lambda tx, new=new: signing_keys._insert(tx, new, published_at=before, activates_at=before)
        )
    await service.within(signing_keys.poll)
    return await service.a_client(introspect=(AUDIENCE,))
