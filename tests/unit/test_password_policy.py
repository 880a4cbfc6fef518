"""What a password must be, and that one password has one form whatever keyboard it was typed on."""

import unicodedata

import pytest

from identity_service.accounts.password_policy import LONGEST_PASSWORD, PasswordPolicy, PasswordRefused
from identity_service.infra.runtime import Secret
from identity_service.infra.runtime.hashing import normalise_password

NAMES = ("marie.curie", "Sklodowska@Sorbonne.example")
GOOD = "correct horse battery staple"


def wide(text: str) -> str:
    """Return the text in the full-width letters of East Asian keyboards."""
    return "".join("\u3000" if letter == " " else chr(ord(letter) + 0xFEE0) for letter in text)


def accepted(text: str, policy: PasswordPolicy | None = None) -> str:
    return (policy or PasswordPolicy()).accept(Secret(text), names=NAMES).reveal()


def refused(text: str, policy: PasswordPolicy | None = None) -> str:
    """Return what the person is told, which never repeats the password."""
    with pytest.raises(PasswordRefused) as caught:
        accepted(text, policy)
    message = str(caught.value)
    assert not text or text not in message.removeprefix("The password")
    return message


def test_a_long_phrase_of_small_letters_is_good() -> None:
    """No composition rules by default."""
    assert accepted(GOOD) == GOOD


@pytest.mark.case("ACC-17")
@pytest.mark.parametrize("text", ["short77", "a" * 3 + "ü" * 4, "x" * 129, "ﬁve"])
def test_too_short_and_too_long_are_told_with_the_limits(text: str) -> None:
    """Lengths are characters, not bytes."""
    assert "8 to 128 characters" in refused(text)


@pytest.mark.parametrize("text", ["zä漢🙂!7qw", "ab " * 42 + "qp", "q🙂" * 64])
def test_lengths_count_characters(text: str) -> None:
    """Eight characters of four bytes are eight, 128 are allowed."""
    assert accepted(text) == text
    assert len(accepted("q🙂" * 64)) == LONGEST_PASSWORD


def test_the_length_is_that_after_normalisation() -> None:
    """One ligature of eighteen letters makes a password longer, half-width voicing marks shorter."""
    assert len(accepted("ab-" + "\ufdfa")) == 21
    assert "8 to 128" in refused("\uff76\uff9e" * 4)


@pytest.mark.parametrize("shortest", [8, 12, 64])
def test_an_installation_chooses_the_least_length(shortest: int) -> None:
    """And the message names it."""
    policy = PasswordPolicy(shortest=shortest)
    pattern = "qZ7-" * 32
    assert accepted(pattern[:shortest], policy)
    assert f"{shortest} to 128" in refused(pattern[: shortest - 1], policy)


@pytest.mark.case("ACC-17")
@pytest.mark.parametrize(
    "text",
    [
        *("password", "Password", "PASSWORD", "12345678", "qwertyui", "iloveyou", "sunshine", "football"),
        *("password1", "princess", "superman", "baseball", "trustno1", "11111111", wide("password")),
        *("🙂🙂🙂🙂🙂🙂🙂🙂", "zzzzzzzzzzzzzz"),
    ],
)
@pytest.mark.case("OPS-28")
def test_passwords_that_are_tried_first_are_refused(text: str) -> None:
    """Whatever their case or width; and so is one letter all the way. The list is here: nobody else can be down."""
    assert "tried first" in refused(text)


@pytest.mark.case("ACC-17")
@pytest.mark.parametrize(
    "text", ["marie.curie", "MARIE.CURIE", "sklodowska@sorbonne.example", "Sklodowska", wide("marie.curie")]
)
def test_the_own_name_is_no_password(text: str) -> None:
    """Neither the username, nor the address, nor its first half."""
    assert "must not be the name or the address" in refused(text)


SERVICE = PasswordPolicy(service_name="Lab Portal")


@pytest.mark.case("ACC-17")
@pytest.mark.parametrize(
    "text",
    [
        *(
            "labportal",
            "LabPortal2026",
            "2026labportal",
            "Lab Portal 2026!",
            "lab-portal-01.12.2026",
            "labportallabportal",
        ),
        *("~lab~portal~", "Lab_Portal", wide("LabPortal2026"), "labportal\u0662\u0660\u0662\u0666"),
    ],
)
def test_the_name_of_the_service_is_no_password(text: str) -> None:
    """With a year, a date or signs about it, in any case and width: it is what is tried next."""
    assert "this service's name" in refused(text, SERVICE)


@pytest.mark.parametrize(
    "text", ["labportal is not it", "labportal-123456789", "my labportal password", "lab 2026 port", "Portal-2026-Lab"]
)
def test_a_password_may_hold_the_name_of_the_service(text: str) -> None:
    """Beside enough of something else; and an installation without a name has none to look for."""
    assert accepted(text, SERVICE) == text
    assert accepted("labportal2026") == "labportal2026"
    assert accepted("qwertz-2026", PasswordPolicy(service_name="!?"))


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("correct horse 7", "upper"),
        ("CORRECT HORSE 7", "lower"),
        ("Correct Horse x", "digit"),
        ("CorrectHorse7xx", "symbol"),
        ("correcthorsebattery", "upper, digit, symbol"),
    ],
)
def test_an_installation_can_demand_classes(text: str, missing: str) -> None:
    """What is missing is named."""
    policy = PasswordPolicy(classes=("upper", "lower", "digit", "symbol"))
    assert refused(text, policy).endswith(f"at least one of each: {missing}.")
    assert accepted("Correct Horse 7", policy)


def test_letters_of_other_scripts_count_as_letters() -> None:
    """Greek and Cyrillic have upper and lower case; Arabic digits are digits."""
    assert accepted("Ολυμπία-\u0667\u0667", PasswordPolicy(classes=("upper", "lower", "digit", "symbol")))


# -- one form ---------------------------------------------------------------------------------------------------------


@pytest.mark.case("ACC-12")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ångström-Überfluß", unicodedata.normalize("NFD", "Ångström-Überfluß")),
        ("Ångström", "\u212bngström"),  # the ångström sign
        ("correct horse", wide("correct horse")),
        ("five-finger", "\ufb01ve-\ufb01nger"),
        ("x²=4 stays", "x2=4 stays"),
        ("한국어비밀번호", unicodedata.normalize("NFD", "한국어비밀번호")),
    ],
)
def test_one_password_has_one_form(one: str, other: str) -> None:
    """Composed, decomposed, full-width and ligatures come out alike (NFKC)."""
    first, second = normalise_password(Secret(one)), normalise_password(Secret(other))
    assert first is not None
    assert second is not None
    assert first.reveal() == second.reveal() == unicodedata.normalize("NFKC", one)


def test_case_and_spaces_are_part_of_a_password() -> None:
    """Normalising is not folding."""
    forms = {
        normal.reveal()
        for text in ("Correct horse", "correct horse", " correct horse", "correct horse ", "correct  horse")
        if (normal := normalise_password(Secret(text)))
    }
    assert len(forms) == 5


@pytest.mark.case("ACC-15")
@pytest.mark.parametrize(
    "text",
    [
        "abcdefgh\0",
        "abc\0defgh",
        "\ud800abcdefgh",
        "abcdefgh\udfff",
        "abcdefgh\U000e0fff",
        "abcdefgh\uffff",
        "",
        "x" * 1025,
    ],
)
def test_characters_that_nobody_can_type_are_refused(text: str) -> None:
    """NUL, surrogates and unassigned code points, which libraries and later Unicode versions disagree about."""
    assert normalise_password(Secret(text)) is None
    assert "cannot be used" in refused(text)
