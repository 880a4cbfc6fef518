"""
Every event the service writes into its audit trail.

The trail refuses a name that is not here, so the list is complete: who searches the trail, or builds an alarm on it,
need not read the code.
"""

from collections.abc import Mapping
from types import MappingProxyType

SCHEDULE = "schedule"
"""Who did what falls due by itself."""

RESTORED = "database.restored"
"""What begins the chain anew behind the places that a restore has lost."""

EVENTS: Mapping[str, str] = MappingProxyType(
    {
        # Signing in, and what a sign-in gave
        "grant.password": "somebody signed in with a password, and a session began",
        "sign_in.failed": "a sign-in was refused; the detail says why",
        "sign_in.throttled": "sign-ins were refused unseen, after too many failures; the target is the limit",
        "reauthentication.failed": "somebody who is signed in gave a wrong password for an act that asks for it again",
        "refresh.reuse_detected": "a refresh token was used twice, and its session was ended",
        "refresh.foreign_client": "a refresh token came from another client than its own, and its session was ended",
        "refresh.ahead_of_record": "a refresh token was newer than the database knows, and its session was ended",
        "token.revoked": "a client ended a token, and with a refresh token its session",
        "session.ended": "a session was ended by its owner or by an operator",
        "sessions.ended": "all sessions of a user were ended, save perhaps the one that asked for it",
        "limit.hit": "callers were refused for coming too often; the target is the limit",
        # People
        "user.registered": "somebody registered an account",
        "registration.declined": "a registration was refused because the username or the address is taken",
        "user.created": "an operator created an account",
        "user.changed": "what is stored about a user was changed",
        "user.role_changed": "a user was given another role",
        "user.enabled": "a user may sign in again",
        "user.disabled": "a user was disabled, and all their sessions ended",
        "user.deleted": "an account was deleted; it can be restored until it is purged",
        "user.restored": "a deleted account was restored",
        "user.purged": "what was left of a deleted account was removed for good",
        "user.password_set": "an operator set a user's password",
        "user.password_reset_forced": "an operator made a user choose a new password",
        "password.changed": "a user changed their password",
        "password_reset.requested": "a mail with a link to choose a new password was asked for",
        "password.reset": "a user chose a new password by a mailed link",
        "email_verification.requested": "a mail with a link to prove an address was asked for",
        "email.verified": "a user proved that an address is theirs",
        "email_change.requested": "a user asked for another address",
        "email.changed": "a user's address was replaced by one that they proved",
        "account.exported": "a user's data was handed out to them",
        "users.import_started": "users are being imported; without `users.imported` the import was interrupted",
        "users.imported": "users were imported",
        "users.exported": "users were exported",
        "demo.created": "the development server made its demo user and client",
        # API keys
        "api_key.created": "an API key was made",
        "api_key.rotated": "an API key was given a new secret; the old one works for a while",
        "api_key.revoked": "an API key was ended",
        "api_key.confirmed": "an API key that a restore had suspended was given back",
        "api_key.refused": "an API key was presented and refused; the detail says why",
        # Clients, roles, scopes
        "client.authentication_failed": "a client could not prove who it is",
        "client.created": "a client was registered",
        "client.updated": "a client's registration was changed",
        "client.enabled": "a client may act again",
        "client.disabled": "a client was disabled; its sessions and tokens ended",
        "client.deleted": "a client was deleted; its sessions and tokens ended",
        "client.secret_rotated": "a client was given a new secret; the old one works for a while",
        "client.secret_deleted": "a secret of a client was ended before its time",
        "role.created": "a role was made",
        "role.updated": "a role's description was changed",
        "role.deleted": "a role was deleted",
        "role.granted": "a role was given scopes",
        "role.withdrawn": "scopes were taken from a role",
        "scope.created": "a scope was defined",
        "scope.updated": "a scope's description was changed",
        "scope.deleted": "a scope was deleted",
        # Keys
        "key.created": "a signing key was made and published",
        "key.rotation_scheduled": "the next signing key was told to sign as early as is safe",
        "key.retired": "a signing key gave way to its successor",
        "key.compromised": "a signing key was taken out of use because it can no longer be trusted",
        "key.rewrapped": "every key was wrapped anew with the first master key",
        "data_key.created": "a data key was made",
        # The service itself
        "bootstrap.spent": "the bootstrap secret made the first administrator, and is used up",
        RESTORED: "a restored database was put right; the detail says what ended, and which rows are lost",
        "database.moved": "the database was moved while nothing was served, as an operator says",
        "mail.given_up": "a mail could not be delivered, and is no longer tried",
        "audit.exported": "audit rows were exported",
        "audit.pruned": "sealed audit rows that were older than the retention period were removed",
    }
)
"""Name → what it means, in one line."""


def check_known(event: str) -> None:
    """Raise ValueError for an event that is not in `EVENTS`."""
    if event not in EVENTS:
        raise ValueError(f"{event} is no event of the audit trail; describe it in EVENTS")
