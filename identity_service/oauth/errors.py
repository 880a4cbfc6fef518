"""
One class per OAuth error code. The description is for the client, the reason a fixed word for logs and metrics.

Descriptions are constants in ASCII (RFC 6749 §5.2) and never repeat what was sent.
"""

from typing import ClassVar


class OAuthError(Exception):
    """A refusal that the protocol has a word for."""

    code: ClassVar[str]
    status: ClassVar[int] = 400

    def __init__(self, description: str, *, reason: str) -> None:
        super().__init__(reason)
        self.description = description
        self.reason = reason


class InvalidRequest(OAuthError):
    """The request lacks a parameter, repeats one or is malformed (RFC 6749 §5.2)."""

    code = "invalid_request"


class RequestTooLarge(InvalidRequest):
    """The body is larger than any legitimate request."""

    status = 413


class InvalidClient(OAuthError):
    """Client authentication failed; the same words for an unknown client and a wrong secret (RFC 6749 §5.2)."""

    code = "invalid_client"
    status = 401

    def __init__(self, *, reason: str) -> None:
        super().__init__("Client authentication failed.", reason=reason)


class InvalidGrant(OAuthError):
    """The credentials or the token presented are not, or no longer, good for anything (RFC 6749 §5.2)."""

    code = "invalid_grant"


class UnauthorizedClient(OAuthError):
    """The client may not use this grant (RFC 6749 §5.2)."""

    code = "unauthorized_client"


class IntrospectionNotAllowed(UnauthorizedClient):
    """The client may introspect nothing (RFC 7662 §2.1, §4)."""

    status = 403


class UnsupportedGrantType(OAuthError):
    """This server does not know the grant (RFC 6749 §5.2)."""

    code = "unsupported_grant_type"


class InvalidScope(OAuthError):
    """The scope is malformed, unknown or more than may be had (RFC 6749 §5.2)."""

    code = "invalid_scope"


class InvalidTarget(OAuthError):
    """The resource is none that may be asked for (RFC 8707 §2)."""

    code = "invalid_target"


class Unavailable(OAuthError):
    """Something behind us cannot answer now; nothing the client holds has become worse. `retry_after` in seconds."""

    code = "temporarily_unavailable"
    status = 503

    def __init__(self, *, reason: str, retry_after: int = 1) -> None:
        super().__init__("The service cannot answer now. Try again.", reason=reason)
        self.retry_after = retry_after


class TooManyRequests(Unavailable):
    """A limit was reached; `retry_after` in seconds."""

    status = 429

    def __init__(self, *, limit: str, retry_after: int) -> None:
        super().__init__(reason="limited", retry_after=retry_after)
        self.description = "Too many attempts. Try again later."
        self.limit = limit
