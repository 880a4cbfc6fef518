"""What reads as a refresh token: exactly what was handed out, letter by letter, and nothing that resembles it."""

import hmac
import struct
import uuid
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity_service.accounts.refresh_families import TOKEN_PREFIX, GenuineToken, Lifetimes, RefreshFamilies
from identity_service.infra.data_keys import DataKey
from identity_service.infra.runtime import Secret
from identity_service.infra.runtime.ids import encode_token
from tests.support.clock import FrozenClock

LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
OLD, NEW, RETRY = b"\x01" * 32, b"\x02" * 32, b"\x03" * 32
CLAIM = GenuineToken(uuid.UUID("0198c0de-0000-7000-8000-00000000beef"), 41, bytes(range(8)))

families = RefreshFamilies(
    FrozenClock(),
    {"refresh": DataKey("new", {"old": OLD, "new": NEW}), "retry": DataKey("retry", {"retry": RETRY})},
    Lifetimes(),
)


def payload(claim: GenuineToken = CLAIM, key: bytes = NEW) -> bytes:
    packed = struct.pack(">16sQ8s", claim.family_id.bytes, claim.generation, claim.nonce)
    return packed + hmac.digest(key, packed, "sha256")


def checked(text: str) -> str:
    """Give `text`, a prefix and letters, the checksum that belongs to it."""
    value, letters = zlib.crc32(text.encode()), ""
    for _ in range(6):
        value, digit = divmod(value, 62)
        letters = LETTERS[digit] + letters
    return text + letters


def read(text: str) -> GenuineToken | None:
    return families.read(Secret(text))


TOKEN = encode_token("rt_", payload())
BODY = TOKEN[:-6]


def test_what_was_handed_out_reads_as_itself() -> None:
    """Prefix, base62, checksum: the format that scanners and this file rely on."""
    assert TOKEN_PREFIX == "rt_"
    assert checked(BODY) == TOKEN
    assert read(TOKEN) == CLAIM


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    claim=st.builds(GenuineToken, st.uuids(), st.integers(0, 2**64 - 1), st.binary(min_size=8, max_size=8)),
    key=st.sampled_from((OLD, NEW)),
)
def test_every_claim_survives_the_spelling(claim: GenuineToken, key: bytes) -> None:
    """Under any data key that is known, the older ones included."""
    assert read(encode_token("rt_", payload(claim, key))) == claim


@pytest.mark.case("REF-29")
def test_no_single_letter_may_differ() -> None:
    """Every position, every other letter of the alphabet and some of none."""
    for position, right in enumerate(TOKEN):
        for letter in LETTERS + "_-. \n\0é\uff10":
            if letter != right:
                assert read(TOKEN[:position] + letter + TOKEN[position + 1 :]) is None


@pytest.mark.case("REF-29")
def test_no_bit_of_the_payload_may_differ_even_with_a_right_checksum() -> None:
    """Whoever can compute a CRC meets the MAC: family, generation, nonce and every bit of the MAC itself count."""
    whole = payload()
    for bit in range(len(whole) * 8):
        forged = bytearray(whole)
        forged[bit // 8] ^= 1 << bit % 8
        assert read(encode_token("rt_", bytes(forged))) is None


@pytest.mark.case("REF-29")
def test_a_truncated_or_longer_token_is_none() -> None:
    """Neither any beginning, nor any end, nor a letter or a chunk more, with a right checksum or without."""
    for length in range(len(TOKEN)):
        assert read(TOKEN[:length]) is None
        assert read(TOKEN[length + 1 :]) is None
        assert read(TOKEN[:length] + TOKEN[length + 1 :]) is None
    for length in range(len(BODY)):
        assert read(checked(BODY[:length])) is None
    for extra in ("0", "A", " ", "\n", "\0", "=", "_", "00000000000"):
        assert read(TOKEN + extra) is None
        assert read(extra + TOKEN) is None
        assert read(checked(BODY + extra)) is None


@pytest.mark.case("REF-29")
@pytest.mark.parametrize("spaced", [f" {TOKEN}", f"{TOKEN} ", f"\t{TOKEN}", f"{TOKEN}\r\n", f"rt_ {TOKEN[3:]}"])
def test_white_space_is_not_forgiven(spaced: str) -> None:
    """A token is compared as it is; stripping it would give it a second spelling."""
    assert read(spaced) is None


@pytest.mark.case("REF-29")
def test_case_matters_everywhere() -> None:
    """As a whole and in each letter, checksum repaired or not."""
    assert read(TOKEN.swapcase()) is None
    assert read(TOKEN.lower()) is None
    assert read(TOKEN.upper()) is None
    for position, letter in enumerate(BODY):
        if letter.swapcase() != letter:
            swapped = BODY[:position] + letter.swapcase() + BODY[position + 1 :]
            assert read(swapped + TOKEN[-6:]) is None
            assert read(checked(swapped)) is None


@pytest.mark.case("REF-29")
@pytest.mark.parametrize("prefix", ["", "rt", "RT_", "rt-", "at_", "cs_", "idk_", "rt_rt_", "ac_"])
def test_the_same_payload_under_another_prefix_is_another_kind_of_thing(prefix: str) -> None:
    """A code, a key or a secret cannot pass for a refresh token, nor the reverse."""
    assert read(encode_token(prefix, payload())) is None


def test_a_payload_has_one_spelling() -> None:
    """Eleven letters hold more than eight bytes; what lies beyond is refused, not wrapped around."""
    whole = payload()
    for chunk in range(len(whole) // 8):
        value, letters = int.from_bytes(whole[chunk * 8 : chunk * 8 + 8], "big") + 2**64, ""
        for _ in range(11):
            value, digit = divmod(value, 62)
            letters = LETTERS[digit] + letters
        start = 3 + chunk * 11
        assert value == 0
        assert read(checked(BODY[:start] + letters + BODY[start + 11 :])) is None


@pytest.mark.parametrize("key", [RETRY, bytes(32), b"\x04" * 32], ids=["retry key", "zeros", "unknown"])
def test_a_mac_under_another_key_is_not_ours(key: bytes) -> None:
    """Nor is one under a key of another purpose."""
    assert read(encode_token("rt_", payload(key=key))) is None


@pytest.mark.case("REF-29")
@pytest.mark.parametrize(
    "text",
    ["", "rt_", "null", "undefined", "eyJhbGciOiJSUzI1NiJ9.e30.c2ln", "rt_" + "0" * 94, "rt_" + "z" * 94, "é" * 97],
)
def test_garbage_is_none(text: str) -> None:
    """And raises nothing."""
    assert read(text) is None


@settings(max_examples=300, derandomize=True, deadline=None)
@given(text=st.text(max_size=120))
def test_no_text_is_genuine_by_accident(text: str) -> None:
    """Whatever Unicode somebody types."""
    assert read(text) is None


@settings(max_examples=300, derandomize=True, deadline=None)
@given(letters=st.text(LETTERS, min_size=88, max_size=88))
def test_no_well_formed_token_is_genuine_by_accident(letters: str) -> None:
    """The right shape and the right checksum, by somebody who read our source."""
    assert read(checked("rt_" + letters)) is None
