"""
Every limit of the service with its default: the one place to look.

`burst` at once, then one per `interval` seconds. While Redis is away all limits but the last four are kept at half
their burst in each process. `api_key` then lets everything through; the general ones are counted per process anyway.
"""

from identity_service.infra.ratelimit.rules import Rule

_HOUR, _DAY = 3600.0, 86400.0

SIGN_IN_NETWORK = Rule(name="sign_in.network", burst=60, interval=2.0, memory=_HOUR)
"""Failures from one network, whatever the names: spraying one password over many accounts."""
SIGN_IN_SITE = Rule(name="sign_in.site", burst=300, interval=0.4, memory=_HOUR)
"""Failures from one IPv6 /56, what a household or a rented machine is given: 256 networks to change between."""
SIGN_IN_ACCOUNT_NETWORK = Rule(
    name="sign_in.account_network", burst=10, interval=1.0, growth=2.0, max_interval=900.0, memory=_DAY
)
"""Failures for one name from one network."""
SIGN_IN_ACCOUNT = Rule(
    name="sign_in.account",
    burst=30,
    interval=1.0,
    growth=1.3,
    max_interval=900.0,
    closed_after=100,
    memory=_DAY,
)
"""Failures for one name from anywhere. A network that signed in before does not feel it, so its owner gets through."""
CLIENT_AUTHENTICATION = Rule(name="client_authentication", burst=30, interval=2.0, memory=300.0)
"""Failed client authentications of one client (or one unknown name) from one network."""
TOKEN_GUESSING = Rule(name="token_guessing", burst=300, interval=0.2, memory=300.0)
"""Texts that no key of ours has signed, unless they name a key we do not know; per client and network."""
API_KEY_GUESSING = Rule(name="api_key_guessing", burst=30, interval=2.0, memory=300.0)
"""API keys that are none, or no longer; per network, and at the token endpoint per client and network."""
PASSWORD_CHANGE = Rule(name="password_change", burst=10, interval=60.0, memory=_HOUR)
"""Wrong current passwords of a signed-in person: who holds a stolen session must not guess on."""
PASSWORD_CHANGE_DONE = Rule(name="password_change.done", burst=5, interval=600.0, memory=_HOUR)
"""Passwords that one person chooses, knowing the old one: each costs two hashes and a mail."""
API_KEY_CREATION = Rule(name="api_key_creation", burst=20, interval=600.0, memory=12000.0)
"""API keys that one person makes; each is told to them by mail."""
EMAIL_CHANGE = Rule(name="email_change", burst=5, interval=1200.0, memory=_DAY)
"""Other addresses that one person asks for: each is told to the address that they have."""
USERNAME_CHANGE = Rule(name="username_change", burst=10, interval=3600.0, memory=_DAY)
"""Usernames that one person tries for themselves: each refusal says that somebody has that name."""
EXPORT = Rule(name="export", burst=10, interval=360.0, memory=_HOUR)
"""Exports of all that is held about one person: the dearest thing that they can read."""
REGISTRATION_NETWORK = Rule(name="registration.network", burst=20, interval=180.0, memory=_DAY)
"""Registrations from one network."""
MAIL_NETWORK = Rule(name="mail.network", burst=30, interval=60.0, memory=_DAY)
"""Requests for a mail (verification, reset) from one network."""
MAIL_ADDRESS = Rule(name="mail.address", burst=3, interval=1200.0, memory=_DAY)
"""Mails of one kind to one address: three at once, then three an hour."""
LINK_GUESSING = Rule(name="link_guessing", burst=30, interval=10.0, memory=_HOUR)
"""Tokens of mailed links that are none; per network."""
BOOTSTRAP = Rule(name="bootstrap", burst=5, interval=60.0, memory=_HOUR)
"""Tries at the bootstrap secret; per network."""
_MEMORY = 60.0  # seconds


def client_rule(per_second: int) -> Rule:
    """Return the general limit of one client at the protocol's endpoints, from one network."""
    return _general("client", per_second)


def caller_rule(per_second: int) -> Rule:
    """Return the general limit of one person or service at the JSON API."""
    return _general("caller", per_second)


def network_rule(per_second: int) -> Rule:
    """
    Return the general limit of one network at the JSON API, for requests without a token.

    A rule of its own: who comes from more networks than can be counted must not crowd out those who are known.
    """
    return _general("network", per_second)


def _general(name: str, per_second: int) -> Rule:
    interval = 1 / per_second
    burst = 5 * per_second
    memory = max(_MEMORY, burst * interval)
    return Rule(name=name, burst=burst, interval=interval, memory=memory, kept_without_redis=False)


def api_key_rule(per_minute: int) -> Rule:
    """Return the limit of one API key: half a minute's worth at once."""
    interval, burst = 60 / per_minute, max(1, per_minute // 2)
    memory = max(_MEMORY, burst * interval)
    return Rule(name="api_key", burst=burst, interval=interval, memory=memory, kept_without_redis=False)
