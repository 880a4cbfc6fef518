"""Envelope encryption: what a master key wrapped, only the same row under the same key gives back."""

import base64
import dataclasses
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_service.infra.runtime.envelope import MasterKeyError, MasterKeys, Wrapped, new_master_key

OLD, NEW = (hashlib.sha256(name).digest() for name in (b"old", b"new"))
PLAIN = b"what must stay secret"


def keys(*raw: bytes) -> MasterKeys:
    return MasterKeys(raw)


def test_what_was_wrapped_is_unwrapped() -> None:
    wrapped = keys(OLD).wrap(PLAIN, context="refresh|1")
    assert PLAIN not in wrapped.blob
    assert keys(OLD).unwrap(wrapped, context="refresh|1") == PLAIN


def test_the_same_value_never_looks_the_same_twice() -> None:
    """A repeated nonce would give away the key stream of AES-GCM."""
    blobs = {keys(OLD).wrap(PLAIN, context="refresh|1").blob for _ in range(100)}
    assert len({blob[:12] for blob in blobs}) == 100


@pytest.mark.case("JWT-24")
@pytest.mark.parametrize("context", ["refresh|2", "retry|1", "refresh|1 ", "", "refresh|1|"])
def test_a_value_taken_to_another_row_is_refused(context: str) -> None:
    wrapped = keys(OLD).wrap(PLAIN, context="refresh|1")
    with pytest.raises(MasterKeyError, match="altered or swapped"):
        keys(OLD).unwrap(wrapped, context=context)


@given(st.data())
def test_any_changed_bit_is_refused(data: st.DataObject) -> None:
    wrapped = keys(OLD).wrap(PLAIN, context="refresh|1")
    bit = data.draw(st.integers(min_value=0, max_value=8 * len(wrapped.blob) - 1))
    spoilt = bytearray(wrapped.blob)
    spoilt[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MasterKeyError):
        keys(OLD).unwrap(dataclasses.replace(wrapped, blob=bytes(spoilt)), context="refresh|1")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 11, 12, 13, 27, 28])
def test_a_row_that_was_cut_short_is_refused_like_any_other(length: int) -> None:
    """Down to nothing at all: whoever reads rows expects one kind of error and goes on with the next row."""
    wrapped = keys(OLD).wrap(PLAIN, context="refresh|1")
    with pytest.raises(MasterKeyError):
        keys(OLD).unwrap(dataclasses.replace(wrapped, blob=wrapped.blob[:length]), context="refresh|1")


def test_a_row_labelled_with_another_key_that_we_hold_is_refused() -> None:
    wrapped = keys(OLD).wrap(PLAIN, context="refresh|1")
    relabelled = Wrapped(keys(NEW).first_id, wrapped.blob)
    with pytest.raises(MasterKeyError):
        keys(OLD, NEW).unwrap(relabelled, context="refresh|1")


@pytest.mark.case("JWT-25")
def test_a_missing_key_is_named() -> None:
    wrapped = keys(OLD).wrap(PLAIN, context="refresh|1")
    with pytest.raises(MasterKeyError) as refused:
        keys(NEW).unwrap(wrapped, context="refresh|1")
    assert f"master key {keys(OLD).first_id} is wanted" in str(refused.value)
    assert keys(NEW).first_id in str(refused.value)


def test_the_first_key_wraps_and_all_unwrap() -> None:
    both = keys(NEW, OLD)
    assert both.wrap(PLAIN, context="c").kek_id == keys(NEW).first_id == both.first_id
    assert both.unwrap(keys(OLD).wrap(PLAIN, context="c"), context="c") == PLAIN
    assert both.unwrap(keys(NEW).wrap(PLAIN, context="c"), context="c") == PLAIN
    assert both.ids == (*keys(NEW).ids, *keys(OLD).ids)


def test_the_id_of_a_key_depends_on_nothing_but_the_key() -> None:
    assert keys(OLD).first_id == keys(NEW, OLD).ids[1]
    assert keys(OLD).first_id != keys(NEW).first_id
    assert OLD.hex()[:12] != keys(OLD).first_id


def test_without_any_key_there_is_nothing_to_work_with() -> None:
    with pytest.raises(MasterKeyError, match="no master key"):
        MasterKeys([])


# -- the file ---------------------------------------------------------------------------------------------------------


def text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


@pytest.mark.parametrize(
    "file",
    [
        f"{text(OLD)}\n{text(NEW)}\n",
        f"{text(OLD)},{text(NEW)}",
        f"# first\n\n  {text(OLD)}  \r\n# second\n{text(NEW)}",
        f",{text(OLD)},\n,{text(NEW)}",
    ],
)
def test_a_file_holds_one_key_per_line_in_order(file: str) -> None:
    assert MasterKeys.parse(file).ids == keys(OLD, NEW).ids


@pytest.mark.case("OPS-31")
@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("", "no master key is set"),
        ("# nothing but words\n\n", "no master key is set"),
        ("changeme", "master key 1 has 6 bytes; 32 are needed"),
        ("change-me-please!", "master key 1 is not base64"),
        ("<paste the key here>", "master key 1 is not base64"),
        (text(OLD[:16]), "master key 1 has 16 bytes; 32 are needed"),
        (text(OLD[:24]), "master key 1 has 24 bytes; 32 are needed"),
        (text(OLD[:31]), "master key 1 has 31 bytes; 32 are needed"),
        (text(OLD + b"x"), "master key 1 has 33 bytes; 32 are needed"),
        (OLD.hex(), "master key 1 has 48 bytes; 32 are needed"),
        (text(bytes(32)), "master key 1 is not random"),
        (text(b"a" * 32), "master key 1 is not random"),
        (text(b"0123456789" * 3 + b"01"), "master key 1 is not random"),
        (text(b"changeme" * 4), "master key 1 is not random"),
        (f"{text(OLD)}\n{text(OLD)[:-4]}", "master key 2 has"),
        (f"{text(OLD)}\n\n{text(NEW)} x", "master key 3 is not base64"),
        ("пароль", "master key 1 is not base64"),
    ],
)
def test_a_file_that_holds_anything_else_is_refused_and_not_repeated(file: str, said: str) -> None:
    with pytest.raises(MasterKeyError) as refused:
        MasterKeys.parse(file)
    assert str(refused.value).startswith(said)
    for line in file.split():
        assert len(line) < 8 or line not in str(refused.value)


def test_a_new_key_is_one_that_a_file_may_hold() -> None:
    made = {new_master_key() for _ in range(100)}
    assert len(made) == 100
    for key in made:
        assert len(MasterKeys.parse(key).ids) == 1
