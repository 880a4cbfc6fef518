"""
Every limit of the service with its default: the one place to look.

`burst` at once, then one per `interval` seconds. A rule for credentials is kept at half its burst in each process while
Redis is away; the others then let everything through. `catalogue` returns them all, as the settings have them.
"""

from collections.abc import Mapping

from identity_service.infra.ratelimit.rules import Rule

_HOUR, _DAY = 3600.0, 86400.0

SIGN_IN_NETWORK = Rule(name="sign_in.network", burst=60, interval=2.0, memory=_HOUR, credential=True)
"""Failures from one network, whatever the names: spraying one password over many accounts."""
SIGN_IN_SITE = Rule(name="sign_in.site", burst=300, interval=0.4, memory=_HOUR, credential=True)
"""Failures from one IPv6 /56, what a household or a rented machine is given: 256 networks to change between."""
SIGN_IN_ACCOUNT_NETWORK = Rule(
    name="sign_in.account_network", burst=10, interval=1.0, growth=2.0, max_interval=900.0, memory=_DAY, credential=True
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
    credential=True,
)
"""Failures for one name from anywhere. A network that signed in before does not feel it, so its owner gets through."""
CLIENT_AUTHENTICATION = Rule(name="client_authentication", burst=30, interval=2.0, memory=300.0, credential=True)
"""Failed client authentications of one client (or one unknown name) from one network."""
TOKEN_GUESSING = Rule(name="token_guessing", burst=300, interval=0.2, memory=300.0, credential=True)
"""Texts that no key of ours has signed, unless they name a key we do not know; per client and network."""
API_KEY_GUESSING = Rule(name="api_key_guessing", burst=30, interval=2.0, memory=300.0, credential=True)
"""API keys that are none, or no longer; per network, and at the token endpoint per client and network."""
PASSWORD_CHANGE = Rule(name="password_change", burst=10, interval=60.0, memory=_HOUR, credential=True)
"""Wrong current passwords of a signed-in person: who holds a stolen session must not guess on."""
API_KEY_CREATION = Rule(name="api_key_creation", burst=20, interval=600.0, memory=12000.0, credential=True)
"""API keys that one person makes; each is told to them by mail."""
USERNAME_CHANGE = Rule(name="username_change", burst=10, interval=3600.0, memory=_DAY, credential=True)
"""Usernames that one person tries for themselves: each refusal says that somebody has that name."""
REGISTRATION_NETWORK = Rule(name="registration.network", burst=20, interval=180.0, memory=_DAY, credential=True)
"""Registrations from one network."""
MAIL_NETWORK = Rule(name="mail.network", burst=30, interval=60.0, memory=_DAY, credential=True)
"""Requests for a mail (verification, reset) from one network."""
MAIL_ADDRESS = Rule(name="mail.address", burst=3, interval=1200.0, memory=_DAY, credential=True)
"""Requests for a mail to one address, known or not: three at once, then three an hour."""
LINK_GUESSING = Rule(name="link_guessing", burst=30, interval=10.0, memory=_HOUR, credential=True)
"""Tokens of mailed links that are none; per network."""
BOOTSTRAP = Rule(name="bootstrap", burst=5, interval=60.0, memory=_HOUR, credential=True)
"""Tries at the bootstrap secret; per network."""
_MEMORY = 60.0  # seconds


def client_rule(per_second: int) -> Rule:
    """Return the general limit of one client (or person, or network) at the token endpoint and the JSON API."""
    interval = 1 / per_second
    burst = 5 * per_second
    return Rule(name="client", burst=burst, interval=interval, memory=max(_MEMORY, burst * interval), credential=False)


def api_key_rule(per_minute: int) -> Rule:
    """Return the limit of one API key: half a minute's worth at once."""
    interval, burst = 60 / per_minute, max(1, per_minute // 2)
    return Rule(name="api_key", burst=burst, interval=interval, memory=max(_MEMORY, burst * interval), credential=False)


def catalogue(*, client_rate: int, api_key_rate: int) -> Mapping[str, Rule]:
    """Return every limit by its name."""
    rules = (
        *(SIGN_IN_NETWORK, SIGN_IN_SITE, SIGN_IN_ACCOUNT_NETWORK, SIGN_IN_ACCOUNT, CLIENT_AUTHENTICATION),
        *(TOKEN_GUESSING, API_KEY_GUESSING, PASSWORD_CHANGE, API_KEY_CREATION, USERNAME_CHANGE, REGISTRATION_NETWORK),
        *(MAIL_NETWORK, MAIL_ADDRESS, LINK_GUESSING, BOOTSTRAP, client_rule(client_rate), api_key_rule(api_key_rate)),
    )
    return {rule.name: rule for rule in rules}
