"""What the commands about clients and roles say beside what they were asked for, and how clients are listed."""

import pytest

from tests.support.commands import Cli

EXCHANGE = ("--grant", "token_exchange")
STOCK = "https://stock.example"


def told(cli: Cli, *words: str) -> list[str]:
    """Return what a command that does its work says on standard error."""
    done = cli.run(*words)
    assert done.code == 0, done.err
    return done.err.splitlines()


def test_a_scope_that_did_not_exist_is_said_to_be_new(cli: Cli) -> None:
    """Once, by whichever command defines it: a misspelt one is seen before it grants nothing."""
    created = told(cli, "clients", "create", "X", "--scope", "stock:read,stock:raed", "--scope", "account:read")
    assert created == ["defined new scope stock:read", "defined new scope stock:raed"]
    [client] = cli.json("clients", "list")
    update = ("clients", "update", client["client_id"], "--scope")
    assert told(cli, *update, "stock:read stock:write") == ["defined new scope stock:write"]
    assert told(cli, *update, "stock:read stock:write") == []
    grant = ("roles", "grant", "user")
    assert told(cli, *grant, "stock:count", "stock:read") == ["defined new scope stock:count"]
    assert told(cli, *grant, "stock:count") == []
    assert told(cli, "roles", "withdraw", "user", "stock:count", "stock:none") == []


def test_a_scope_that_is_not_stored_is_not_said_to_be_new(cli: Cli) -> None:
    """A refused command defines nothing."""
    assert "new scope" not in cli.run("clients", "create", "X", "--scope", "a", "--audience", "x").refused()
    assert "new scope" not in cli.run("roles", "grant", "emperor", "a").refused()
    assert told(cli, "roles", "grant", "user", "a") == ["defined new scope a"]


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (EXCHANGE, "token_exchange is of no use without an --exchange-audience"),
        (("--exchange-audience", STOCK), "--exchange-audience is of no use without --grant token_exchange"),
        (("--grant", "refresh_token"), "refresh_token is of no use without a grant that a person signs in by"),
        (
            ("--grant", "authorization_code", "--redirect-uri", "https://stock.example/cb"),
            "this service does not have the grant authorization_code",
        ),
        (("--grant", "authorization_code"), "authorization_code is of no use without a --redirect-uri"),
        (("--grant", "device_code"), "this service does not have the grant device_code"),
    ],
    ids=["exchange", "exchange-audience", "refresh", "not-served", "no-redirect", "device"],
)
def test_what_cannot_work_is_registered_with_a_warning(cli: Cli, words: tuple[str, ...], warning: str) -> None:
    """On standard error, when it is registered and when a change leaves it so."""
    assert f"warning: {warning}" in told(cli, "clients", "create", "X", *words)
    [client] = cli.json("clients", "list")
    assert f"warning: {warning}" in told(cli, "clients", "update", client["client_id"], "--name", "Y")


@pytest.mark.parametrize(
    "words",
    [
        (*EXCHANGE, "--exchange-audience", STOCK),
        ("--grant", "password,refresh_token", "--first-party", "--public"),
        ("--grant", "client_credentials", "--audience", STOCK),
        ("--introspect", STOCK),
    ],
    ids=["exchange", "people", "machine", "resource"],
)
def test_what_can_work_is_registered_without_a_word(cli: Cli, words: tuple[str, ...]) -> None:
    """Or nobody would read the warnings."""
    assert told(cli, "clients", "create", "X", *words) == []


def test_a_grant_that_is_switched_off_is_warned_of(cli: Cli) -> None:
    """By the settings that the command itself is run with."""
    words = ("clients", "create", "X", "--grant", "password", "--first-party")
    assert cli.run(*words).err == ""
    off = cli.run(*words, IDENTITY_PASSWORD_GRANT="false")
    assert off.err == "warning: this service does not have the grant password\n"


def test_clients_are_listed_in_columns(cli: Cli) -> None:
    """Each with all that it may ask for; what it lacks is a hyphen."""
    assert cli.run("clients", "list").out == "\n"
    create = ("clients", "create")
    long = cli.json(
        *(*create, "Stock keeping", "--grant", "client_credentials", *EXCHANGE, "--exchange-audience", STOCK),
        *("--scope", "stock:read stock:write", "--audience", STOCK, "--audience", "https://two.example"),
    )["client_id"]
    short = cli.json(*create, "App", "--grant", "password", "--first-party", "--public")["client_id"]
    cli.json("clients", "disable", short)
    lines = {line.split()[0]: line for line in cli.run("clients", "list").out.splitlines()}
    assert lines.keys() == {long, short}
    assert lines[long].split()[1:] == [
        *("enabled", "confidential", "Stock", "keeping", "client_credentials,token_exchange"),
        *("stock:read,stock:write", f"{STOCK},https://two.example"),
    ]
    assert lines[short].split()[1:] == ["disabled", "public", "App", "password", "-", "-"]
    for one, other in (("enabled", "disabled"), ("confidential", "public"), ("Stock", "App"), ("client_", "password")):
        assert lines[long].index(one, len(long)) == lines[short].index(other, len(short))
    assert lines[long].index(STOCK) == lines[short].rindex("-")
    assert {client["client_id"]: client["enabled"] for client in cli.json("clients", "list")} == {
        long: True,
        short: False,
    }
