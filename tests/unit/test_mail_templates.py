"""What mails say: the same in text and HTML, one link at most, nothing loaded, nothing run, nobody else's markup."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError

from identity_service.infra import mail
from identity_service.infra.mail import TEMPLATES, Letter, check, render
from identity_service.infra.runtime import Secret

ISSUER = "https://id.example.org"
SERVICE = "Example & Sons"
TOKEN = Secret("xx_0123456789abcdef")
AT = "2026-02-01T13:05:00+01:00"
VALUES = {"name": "deploy key", "expires_at": "2026-03-09T00:00:00+00:00"}
LINKED = sorted(name for name, template in TEMPLATES.items() if template.page)


def context_of(template: str) -> dict[str, str]:
    """Return what a mail must be told."""
    return {name: VALUES[name] for name in TEMPLATES[template].names}


def rendered(template: str, **changes: str) -> Letter:
    """Return a mail in words, with a token at hand whether it needs one or not."""
    context = {**context_of(template), "at": AT, **changes}
    return render(template, context, service_name=SERVICE, issuer=ISSUER, token=TOKEN)


class Page(HTMLParser):
    """What an HTML part shows, and what it would do."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.shown: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self._hidden = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._hidden = tag == "title"
        for name, value in attrs:
            self.attributes.add(name)
            if name == "href":
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.shown.append(data)

    @property
    def words(self) -> list[str]:
        return " ".join(self.shown).split()


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_html_part_says_what_the_text_part_says(template: str) -> None:
    """Word for word, but for the heading, which the text has as its subject (and the button once more)."""
    letter = rendered(template)
    assert letter.subject.startswith(f"{SERVICE}: ")
    heading = letter.subject.removeprefix(f"{SERVICE}: ").split()
    page = Page(letter.html)
    assert page.words[: len(heading)] == heading
    rest = " ".join(page.words[len(heading) :])
    if TEMPLATES[template].page:
        rest = rest.replace(" ".join(heading) + " ", "", 1)
    assert rest == " ".join(letter.text.split())
    assert SERVICE in letter.text


@pytest.mark.case("SEC-14")
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_mail_loads_nothing_and_runs_nothing(template: str) -> None:
    """Opening it tells nobody that it was opened."""
    letter = rendered(template)
    page = Page(letter.html)
    assert page.tags <= {"html", "head", "meta", "title", "body", "div", "h1", "p", "a"}
    assert page.attributes <= {"lang", "charset", "name", "content", "style", "href"}
    assert "url(" not in letter.html
    assert "@import" not in letter.html


@pytest.mark.case("SEC-14")
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_mail_holds_one_link_at_most_and_no_other_secret(template: str) -> None:
    """A notice holds none, also when there is a token at hand."""
    letter, page = rendered(template), TEMPLATES[template].page
    expected = [f"{ISSUER}{page}?token={TOKEN.reveal()}"] if page else []
    assert Page(letter.html).links == expected
    for part in (letter.text, " ".join(Page(letter.html).words)):
        assert re.findall(r"\S*://\S*", part) == expected
        assert part.count(TOKEN.reveal()) == len(expected)
    assert TOKEN.reveal() not in letter.subject


@pytest.mark.case("ACC-22")
@pytest.mark.parametrize("template", LINKED)
def test_a_link_begins_with_the_issuer_and_stands_on_a_line_of_its_own(template: str) -> None:
    """However long it is, the text part does not break it."""
    token = Secret("x" * 200)
    letter = render(template, {"at": AT}, service_name=SERVICE, issuer=ISSUER, token=token)
    lines = [line for line in letter.text.splitlines() if "://" in line]
    assert lines == [f"{ISSUER}{TEMPLATES[template].page}?token={token.reveal()}"]


def test_every_purpose_has_a_page_of_its_own() -> None:
    """These are the paths that the pages answer at."""
    pages = {name: TEMPLATES[name].page for name in LINKED}
    assert pages == {
        "change_email": "/change-email",
        "reset_password": "/reset-password",
        "verify_email": "/verify-email",
    }


def test_every_template_is_known_and_written() -> None:
    """No file without a mail, no mail without a file."""
    folder = Path(mail.__file__).with_name("templates")
    assert {path.name for path in folder.iterdir()} == {*(f"{name}.txt" for name in TEMPLATES), "layout.html"}


def test_the_mails_of_a_taken_address_and_of_a_new_one_differ() -> None:
    """What the answer to a registration does not tell, the mail tells to whom the address belongs."""
    assert rendered("account_exists").text != rendered("verify_email").text
    assert "already" in rendered("account_exists").text


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["api_key_created", "api_key_expiring"])
@pytest.mark.parametrize(
    "name",
    ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</p><a href='https://evil.example'>x</a>", "&lt;"],
    ids=["script", "attribute", "link", "entity"],
)
def test_a_value_is_never_markup(template: str, name: str) -> None:
    """It is shown as it was typed."""
    letter = rendered(template, name=name)
    page = Page(letter.html)
    assert page.tags.isdisjoint({"script", "img", "a"})
    assert page.links == []
    assert f"“{name}”" in " ".join(page.words)
    assert f"“{name}”" in " ".join(letter.text.split())


def test_the_name_of_the_service_is_never_markup() -> None:
    """It comes from the settings, and is still only a name."""
    letter = render("account_exists", {"at": AT}, service_name="<b>Bold</b>\nCo", issuer=ISSUER)
    assert "b" not in Page(letter.html).tags
    assert letter.subject.startswith("<b>Bold</b> Co: ")


@pytest.mark.case("ADM-21")
@pytest.mark.parametrize("name", ["{{ 7 * 7 }}", "{% include 'layout.html' %}", "{{ link }}", "{# x #}"])
def test_a_value_is_never_a_template(name: str) -> None:
    """Braces are letters."""
    letter = rendered("api_key_created", name=name)
    assert name in " ".join(letter.text.split())
    assert "49" not in letter.text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("one\r\n\r\nhttps://evil.example", "one https://evil.example"),
        ("a\u2028b\u2029c\x0bd\x85e", "a b c d e"),
        ("abc\u202edef\u2066", "abc def"),
        ("\x00\x1b[31mred", "[31mred"),
        ("x" * 1000, "x" * 200),
    ],
    ids=["lines", "other lines", "reversed writing", "control", "long"],
)
def test_a_value_is_one_line_of_visible_letters(name: str, shown: str) -> None:
    """Nobody writes a paragraph of their own into our mail."""
    letter = rendered("api_key_created", name=name)
    usual = rendered("api_key_created", name="usual")
    assert f"“{shown}”" in " ".join(letter.text.split())
    assert letter.text.count("\n\n") == usual.text.count("\n\n")
    assert Page(letter.html).links == []


@pytest.mark.parametrize("missing", ["name", "expires_at", "at"])
def test_a_value_that_is_missing_is_a_fault(missing: str) -> None:
    """Not an empty place in somebody's mail."""
    template = "api_key_created" if missing == "at" else "api_key_expiring"
    context = {**context_of(template), "at": AT}
    del context[missing]
    with pytest.raises(UndefinedError, match=missing):
        render(template, context, service_name=SERVICE, issuer=ISSUER)


@pytest.mark.parametrize("template", LINKED)
def test_a_link_that_is_missing_is_a_fault(template: str) -> None:
    """As any other value."""
    with pytest.raises(UndefinedError, match="link"):
        render(template, {"at": AT}, service_name=SERVICE, issuer=ISSUER)


def test_instants_are_told_in_utc() -> None:
    """With the zone, since nobody knows the reader's."""
    letter = rendered("api_key_expiring")
    assert "9 March 2026, 00:00 UTC" in " ".join(letter.text.split())
    assert "1 February 2026, 12:05 UTC" in " ".join(rendered("password_changed").text.split())


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_may_be_ordered_can_be_written(template: str) -> None:
    """`check` and the templates agree about what a mail must be told."""
    check(template, context_of(template), linked=TEMPLATES[template].page is not None)
    rendered(template)


# -- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["jinja2", "aiosmtplib"])
def test_a_server_that_writes_no_mail_does_not_load_what_writes_them(library: str) -> None:
    """They take time to load and memory to keep."""
    program = f"import sys, identity_service.main; sys.exit({library!r} in sys.modules)"
    done: Any = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    assert done.returncode == 0
