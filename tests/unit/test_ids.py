"""Identifiers and the spelling of opaque tokens."""

import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_service.infra.runtime import new_id
from identity_service.infra.runtime.ids import decode_token, encode_token

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

payloads = st.integers(min_value=0, max_value=6).flatmap(
    lambda words: st.binary(min_size=8 * words, max_size=8 * words)
)


@pytest.mark.rfc("9562", "5.7")
def test_an_id_is_a_uuid_of_version_7_that_begins_with_the_time() -> None:
    before = time.time_ns() // 1_000_000
    made = new_id()
    after = time.time_ns() // 1_000_000
    assert made.version == 7
    assert made.variant == uuid.RFC_4122
    assert before <= made.int >> 80 <= after


@pytest.mark.rfc("9562", "6.11")
def test_ids_of_later_milliseconds_sort_later() -> None:
    """In every form an index may keep: as a number, as bytes and as text."""
    earlier = new_id()
    while time.time_ns() // 1_000_000 == earlier.int >> 80:
        pass
    later = new_id()
    assert earlier < later
    assert earlier.bytes < later.bytes
    assert str(earlier) < str(later)


def test_the_rest_of_an_id_is_random() -> None:
    """Ids made in the same instant differ, and in every one of the 74 bits that are free."""
    made = [new_id().int for _ in range(500)]
    assert len(set(made)) == 500
    free = (1 << 80) - 1 & ~(0xF << 76) & ~(0x3 << 62)
    always_set, ever_set = free, 0
    for value in made:
        always_set &= value
        ever_set |= value
    assert always_set == 0
    assert ever_set & free == free


@given(payloads)
def test_what_was_encoded_is_read_back(payload: bytes) -> None:
    token = encode_token("rt_", payload)
    assert token.startswith("rt_")
    assert set(token[3:]) <= set(ALPHABET)
    assert decode_token("rt_", len(payload), token) == payload


@given(payloads.filter(bool), st.data())
def test_one_changed_letter_is_always_noticed(payload: bytes, data: st.DataObject) -> None:
    """A CRC32 finds every error within 32 bits, so a typo costs no query."""
    token = encode_token("rt_", payload)
    place = data.draw(st.integers(min_value=0, max_value=len(token) - 1))
    letter = data.draw(st.characters(max_codepoint=0x2FF).filter(lambda letter: letter != token[place]))
    assert decode_token("rt_", len(payload), token[:place] + letter + token[place + 1 :]) is None


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_and_never_raises(text: str) -> None:
    assert decode_token("rt_", 8, text) is None
    assert decode_token("rt_", 16, f"rt_{text}") is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda token: token[:-1],
        lambda token: token + "0",
        lambda token: token + "\n",
        lambda token: " " + token,
        lambda token: token.swapcase(),
        lambda token: "cs_" + token[3:],
        lambda token: token[:3] + token[4:] + "0",
        lambda token: token.replace("_", "-"),
        lambda token: token + token,
        lambda token: "",
    ],
)
def test_a_damaged_token_is_refused(spoil: object) -> None:
    token = encode_token("rt_", bytes(range(72, 88)))
    assert decode_token("rt_", 16, token) is not None
    assert callable(spoil)
    assert decode_token("rt_", 16, spoil(token)) is None


def test_a_token_is_not_read_in_another_size() -> None:
    assert decode_token("rt_", 8, encode_token("rt_", bytes(16))) is None
    assert decode_token("rt_", 24, encode_token("rt_", bytes(16))) is None


def test_letters_that_stand_for_more_than_eight_bytes_are_refused() -> None:
    """`z` eleven times is more than 64 bits: every payload has exactly one spelling, whatever its checksum says."""
    import zlib

    body = "rt_" + "z" * 11
    value, letters = zlib.crc32(body.encode()), ""
    for _ in range(6):
        value, digit = divmod(value, 62)
        letters = ALPHABET[digit] + letters
    assert decode_token("rt_", 8, body + letters) is None


def test_a_payload_that_is_no_whole_number_of_words_is_a_fault() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        encode_token("rt_", bytes(9))
