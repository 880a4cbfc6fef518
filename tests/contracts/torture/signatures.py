"""Signatures that are not quite right: of something else, of the right thing padded wrongly, or written wrongly."""

import hashlib
import itertools
from collections.abc import Iterator

from cryptography.hazmat.primitives import hashes

from tests.contracts.torture.forge import Draft, Forge, bad, dumped, good, sealed
from tests.contracts.torture.primitives import SHA256_INFO, padded, rsa_private
from tests.support.tokens import b64, unb64


def signature(forge: Forge) -> Iterator[Draft]:
    """All of them under a header that is good, and next to a payload that would be."""
    yield from _bytes(forge)
    yield from _messages(forge)
    yield from _paddings(forge)
    yield from _numbers(forge)


def _bytes(forge: Forge) -> Iterator[Draft]:
    signed = forge.unsigned()
    right = forge.signature(signed.encode())

    def flipped(position: int, bit: int) -> bytes:
        return right[:position] + bytes((right[position] ^ bit,)) + right[position + 1 :]

    values: tuple[tuple[str, str, bytes], ...] = (
        ("empty", "is empty", b""),
        ("zero-byte", "is one zero byte", b"\0"),
        ("first-bit", "differs in its first bit", flipped(0, 0x80)),
        ("middle-bit", "differs in a bit in the middle", flipped(128, 0x10)),
        ("last-bit", "differs in its last bit", flipped(255, 1)),
        ("first-byte-zero", "differs in its first byte, which is zero", b"\0" + right[1:]),
        ("half", "is the first half of the right one", right[:128]),
        ("shortened", "lacks its last byte", right[:-1]),
        ("shortened-before", "lacks its first byte", right[1:]),
        ("lengthened", "has one byte more", right + b"\0"),
        ("lengthened-before", "has a zero byte before it", b"\0" + right),
        ("doubled", "stands there twice", right + right),
        ("backwards", "is written backwards", right[::-1]),
        ("random", "is of the right length and of random bytes", hashlib.shake_128(b"random").digest(256)),
        ("encoded-twice", "is base64url of base64url", b64(right).encode()),
        ("hexadecimal", "is written in hexadecimal", right.hex().encode()),
        ("digest", "is the SHA-256 digest of what should be signed", hashlib.sha256(signed.encode()).digest()),
    )
    for slug, name, value in values:
        yield bad(slug, f"The signature {name} (RFC 8017 §8.2.2).", sealed(signed, value), "signature_wrong")
    for number in itertools.count():
        signed = forge.unsigned(claims={"jti": f"torture-{number}"})
        right = forge.signature(signed.encode())
        if right[0] == 0:
            break
    what = "The signature begins with a zero byte, as one in 256 does, and is as long as the key."
    yield good("leading-zero", what, sealed(signed, right))
    what = "The signature's leading zero byte is left out, so that it is shorter than the key (RFC 8017 §8.2.2 step 1)."
    yield bad("leading-zero-left-out", what, sealed(signed, right[1:]), "signature_wrong")


def _messages(forge: Forge) -> Iterator[Draft]:
    signed = forge.unsigned()
    header, payload = signed.split(".")
    right = forge.signature(signed.encode())
    plain_header, plain_payload = (dumped(part).encode() for part in (forge.header, forge.claims))
    for slug, name, message in (
        ("of-payload", "of the payload alone", payload.encode()),
        ("of-header", "of the header alone", header.encode()),
        ("of-both-joined", "of header and payload without the dot", (header + payload).encode()),
        ("of-one-dot-more", "of header, payload and one dot more", f"{signed}.".encode()),
        ("of-decoded", "of header and payload before they were encoded", plain_header + b"." + plain_payload),
        ("of-decoded-payload", "of the payload before it was encoded", plain_payload),
        ("of-the-other-order", "of payload and header", f"{payload}.{header}".encode()),
        ("of-upper-case", "of the text in upper case", signed.upper().encode()),
        ("of-utf-16", "of the text in UTF-16", signed.encode("utf-16-le")),
        ("of-padded", "of the text with base64's padding", f"{header}==.{payload}==".encode()),
        ("of-digest", "of the text's digest in hexadecimal", hashlib.sha256(signed.encode()).hexdigest().encode()),
        ("of-nothing", "of nothing", b""),
    ):
        what = f"The signature is {name}, not of what JWS says is signed (RFC 7515 §5.2 step 8)."
        yield bad(slug, what, sealed(signed, forge.signature(message)), "signature_wrong")
    more = forge.unsigned(claims={"scope": forge.claims["scope"] + " admin:write"})
    yield bad(
        "moved",
        "The signature is that of another token: the payload grants more.",
        sealed(more, right),
        "signature_wrong",
    )
    later = forge.unsigned(claims={"exp": forge.now + 10**6})
    yield bad(
        "moved-later",
        "The signature is that of another token: this one lasts longer.",
        sealed(later, right),
        "signature_wrong",
    )
    spaced = b64(plain_header.replace(b",", b", ")) + "." + payload
    what = "The header says the same in other bytes, and the signature is of those that were signed."
    yield bad("header-respelt", what, sealed(spaced, right), "signature_wrong")
    ordered = header + "." + b64(dumped(dict(sorted(forge.claims.items()))).encode())
    what = "The payload says the same in another order, and the signature is of the one that was signed."
    yield bad("payload-reordered", what, sealed(ordered, right), "signature_wrong")
    swapped = forge.unsigned({"kid": forge.keys.second.kid})
    yield bad(
        "header-changed",
        "The header names another key than the one that was signed.",
        sealed(swapped, right),
        "signature_wrong",
    )
    yield bad(
        "parts-swapped",
        "Header and payload have changed places.",
        f"{payload}.{header}.{b64(right)}",
        "alg_not_allowed",
    )


def _paddings(forge: Forge) -> Iterator[Draft]:
    """Really made with the private key; who reads the padding instead of comparing it takes some of them for right."""
    private = forge.keys.good.private
    signed = forge.unsigned()
    digest = hashlib.sha256(signed.encode()).digest()
    info = SHA256_INFO + digest
    without_null = bytes.fromhex("302f300b0609608648016503040201") + b"\x04\x20" + digest
    long_form = bytes.fromhex("308131300d060960864801650304020105000420") + digest
    indefinite = bytes.fromhex("3080300d060960864801650304020105000420") + digest + bytes(2)
    other_oid = bytes.fromhex("3031300d060960864801650304020305000420") + digest
    sha1 = bytes.fromhex("3021300906052b0e03021a05000414") + hashlib.sha1(signed.encode()).digest()  # noqa: S324
    md5 = bytes.fromhex("3020300c06082a864886f70d020505000410") + hashlib.md5(signed.encode()).digest()  # noqa: S324
    parameters = bytes.fromhex("3041301d0609608648016503040201") + b"\x04\x10" + bytes(16) + b"\x04\x20" + digest
    blocks: tuple[tuple[str, str, bytes], ...] = (
        ("garbage-behind", "there are other bytes behind the digest (CVE-2006-4339)", padded(info + bytes(100))),
        (
            "short-filler",
            "only eight bytes fill it and the rest is garbage",
            b"\0\1" + b"\xff" * 8 + b"\0" + info + bytes(194),
        ),
        ("no-filler", "nothing fills it and the rest is garbage", b"\0\1\0" + info + bytes(202)),
        ("other-filler", "it is filled with other bytes than FF", padded(info, filler=b"\xfe")),
        ("zero-filler", "it is filled with zeros", padded(info, filler=b"\0")),
        ("no-end-of-filler", "no zero ends the filler", b"\0\1" + b"\xff" * (254 - len(info)) + info),
        ("kind-0", "its block type is 0", padded(info, kind=0)),
        ("kind-2", "its block type is that of an encryption", padded(info, kind=2)),
        ("first-byte", "its first byte is not zero", b"\1" + padded(info)[1:]),
        ("no-info", "it holds the digest alone, as TLS once had it", padded(digest)),
        ("no-null", "the parameters of the digest's name are left out, and we never do that", padded(without_null)),
        ("long-form", "a length is written in two bytes where one does (BER)", padded(long_form)),
        ("indefinite", "a length is left open (BER)", padded(indefinite)),
        ("garbage-within", "there are other bytes in the parameters of the digest's name", padded(parameters)),
        ("other-name", "it says SHA-512 and holds a SHA-256 digest", padded(other_oid)),
        ("digest-cut", "the digest lacks its last byte", padded(info[:-1])),
        ("digest-differs", "the digest differs in its last bit", padded(info[:-1] + bytes((info[-1] ^ 1,)))),
        ("sha-1", "the digest is SHA-1", padded(sha1)),
        ("md5", "the digest is MD5", padded(md5)),
        ("not-padded", "there is no padding at all", info),
        ("padded-behind", "the padding stands behind", info + b"\0" + b"\xff" * 204),
    )
    for slug, name, block in blocks:
        what = f"Made with the right key, but the signed block is not the one it must be: {name} (RFC 8017 §8.2.2)."
        yield bad(f"block-{slug}", what, sealed(signed, rsa_private(private, block[:256])), "signature_wrong")
    for slug, digest_used in (("sha-224", hashes.SHA224()), ("sha3-256", hashes.SHA3_256())):
        what = f"Made with the right key and {slug.upper()}, which is not the digest of RS256 (RFC 7518 §3.3)."
        token = sealed(signed, forge.signature(signed.encode(), digest=digest_used))
        yield bad(f"block-{slug}", what, token, "signature_wrong")


def _numbers(forge: Forge) -> Iterator[Draft]:
    """Signatures as numbers: out of range, or such that the public operation does nothing."""
    modulus = forge.keys.good.private.public_key().public_numbers().n
    signed = forge.unsigned()
    block = padded(SHA256_INFO + hashlib.sha256(signed.encode()).digest())
    for slug, name, number in (
        ("zero", "zero", 0),
        ("one", "one", 1),
        ("modulus", "the modulus", modulus),
        ("modulus-less-one", "the modulus less one", modulus - 1),
        ("largest", "the largest of its length", 2**2048 - 1),
        ("block", "the padded digest itself, right for a key whose exponent is 1", int.from_bytes(block, "big")),
    ):
        what = f"The signature, as a number, is {name} (RFC 8017 §5.2.2)."
        yield bad(f"number-{slug}", what, sealed(signed, number.to_bytes(256, "big")), "signature_wrong")
    for number in itertools.count():
        signed = forge.unsigned(claims={"jti": f"torture-{number}"})
        larger = int.from_bytes(forge.signature(signed.encode()), "big") + modulus
        if larger < 2**2048:
            break
    what = (
        "The signature is the right number plus the modulus: a second spelling of it, out of range (RFC 8017 §5.2.2)."
    )
    yield bad("number-plus-modulus", what, sealed(signed, larger.to_bytes(256, "big")), "signature_wrong")
    header, payload, right = forge.token().split(".")
    respelt = b64(unb64(right) + unb64(right)[:1])
    what = "The signature is followed by a byte of its own."
    yield bad("number-continued", what, f"{header}.{payload}.{respelt}", "signature_wrong")
