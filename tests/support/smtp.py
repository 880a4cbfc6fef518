"""A real SMTP server that does what it is told: refuse, be slow, vanish, offer TLS or keep quiet about it."""

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any, Literal, final

from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support.servers import kept_port
from tests.support.waiting import until

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, as files; it is its own authority."""

    certificate: Path
    key: Path

    def server_context(self) -> ssl.SSLContext:
        """Return what a server needs to show it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context


def throw_away_certificate(folder: Path, *, address: str = HOST) -> Certificate:
    """Make a certificate for an IP address, good for an hour of real time."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"test {address}")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = Certificate(folder / f"{address}.crt", folder / f"{address}.key")
    files.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


@dataclass(frozen=True)
class Received:
    """A message as it arrived; `user` is who authenticated, `encrypted` whether the connection was."""

    sender: str
    recipients: tuple[str, ...]
    content: bytes
    user: str | None
    encrypted: bool

    @property
    def message(self) -> EmailMessage:
        """The message, read by the rules of RFC 5322."""
        parsed = message_from_bytes(self.content, policy=policy.default)
        assert isinstance(parsed, EmailMessage)
        return parsed

    @property
    def message_id(self) -> str:
        """Its Message-ID."""
        return str(self.message["Message-ID"])

    def part(self, kind: Literal["plain", "html"]) -> str:
        """Return its text, or its HTML."""
        body = self.message.get_body((kind,))
        assert body is not None
        text: str = body.get_content()
        return text


@dataclass
class Behaviour:
    """What the server does; a test changes it as it goes."""

    recipient_reply: str | None = None
    """What RCPT is answered with, instead of 250."""
    data_reply: str | None = None
    """What the message is answered with, instead of 250; it is not kept then."""
    drops: int = 0
    """How many messages are kept but not answered: the connection breaks off."""
    gate: asyncio.Event | None = None
    """What the answer to a message waits for."""
    credentials: tuple[str, str] | None = None
    """Who must authenticate, and how."""


@final
class _Session(SMTP):
    """One connection; what comes in before there is TLS is noted."""

    def __init__(self, server: "SmtpServer", handler: Any, *, tls: ssl.SSLContext | None, implicit: bool) -> None:
        behaviour = server.behaviour
        super().__init__(
            handler,
            hostname="mail.test",
            tls_context=tls,
            authenticator=_authenticator(behaviour) if behaviour.credentials else None,
            auth_required=behaviour.credentials is not None and not implicit,
            auth_require_tls=not implicit,  # the library knows no other TLS than STARTTLS
            loop=asyncio.get_running_loop(),
        )
        self._server = server
        self._implicit = implicit

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._server.connections.add(transport)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self._handler_coroutine is not None:
            self._server.tasks.add(self._handler_coroutine)

    def data_received(self, data: bytes) -> None:
        if not self._implicit and self._tls_protocol is None:
            self._server.heard_in_clear += data
        super().data_received(data)


def _authenticator(behaviour: Behaviour) -> Any:
    def check(_server: Any, _session: Any, _envelope: Any, _mechanism: str, given: LoginPassword) -> AuthResult:
        right = (given.login.decode(), given.password.decode()) == behaviour.credentials
        return AuthResult(success=right, handled=False, auth_data=given)

    return check


@dataclass
class SmtpServer:
    """A server on a free port of 127.0.0.1, and what it received."""

    port: int = 0
    behaviour: Behaviour = field(default_factory=Behaviour)
    received: list[Received] = field(default_factory=list)
    heard_in_clear: bytearray = field(default_factory=bytearray)
    connections: set[asyncio.BaseTransport] = field(default_factory=set)
    tasks: set["asyncio.Task[None]"] = field(default_factory=set)
    holding: int = 0
    """How many messages have arrived whose answers wait for the gate."""
    tls: ssl.SSLContext | None = None
    implicit: bool = False
    _listener: asyncio.Server | None = None
    _place: socket.socket | None = None

    async def start(self) -> None:
        """Listen; at the same port as before, if it listened before."""
        loop = asyncio.get_running_loop()

        def session() -> _Session:
            return _Session(self, self, tls=None if self.implicit else self.tls, implicit=self.implicit)

        if self._place is None:
            self._place = kept_port(self.port)
            self.port = self._place.getsockname()[1]
        self._listener = await loop.create_server(
            session, HOST, self.port, ssl=self.tls if self.implicit else None, reuse_address=True, reuse_port=True
        )

    async def stop(self) -> None:
        """Listen no more and break off every connection."""
        assert self._listener is not None
        self._listener.close()
        await self._listener.wait_closed()
        for transport in self.connections:
            if isinstance(transport, asyncio.Transport):
                transport.abort()
        for _ in range(3):  # for the loop to tell every session that it is over
            await asyncio.sleep(0)
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.connections.clear()
        self.tasks.clear()

    async def close(self) -> None:
        """Stop, if it still listens, and give the port back."""
        await self.stop()
        if self._place is not None:
            self._place.close()

    async def holds(self, messages: int) -> None:
        """Return once so many messages wait for the gate."""
        await until(lambda: self.holding == messages)

    # -- what aiosmtpd asks -------------------------------------------------------------------------------------------

    async def handle_RCPT(self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any) -> str:  # noqa: N802
        """Accept or refuse a recipient."""
        if self.behaviour.recipient_reply is not None:
            return self.behaviour.recipient_reply
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        """Keep a message, unless told otherwise."""
        if self.behaviour.gate is not None:
            self.holding += 1
            try:
                await self.behaviour.gate.wait()
            finally:  # or whoever gave up would be counted for ever
                self.holding -= 1
        if self.behaviour.data_reply is not None:
            return self.behaviour.data_reply
        login = session.auth_data.login.decode() if session.authenticated else None
        self.received.append(
            Received(
                envelope.mail_from,
                tuple(envelope.rcpt_tos),
                bytes(envelope.content),
                login,
                self.implicit or session.ssl is not None,
            )
        )
        if self.behaviour.drops > 0:
            self.behaviour.drops -= 1
            server.transport.abort()
        return "250 OK"


@asynccontextmanager
async def smtp_server(
    certificate: Certificate | None = None, *, implicit: bool = False, behaviour: Behaviour | None = None
) -> AsyncIterator[SmtpServer]:
    """Run a server; with a certificate it offers STARTTLS, or speaks nothing but TLS."""
    server = SmtpServer(
        behaviour=behaviour or Behaviour(),
        tls=certificate.server_context() if certificate else None,
        implicit=implicit,
    )
    await server.start()
    try:
        yield server
    finally:
        await server.close()


@asynccontextmanager
async def conversation(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """Listen with a server that says what `talk` says, and nothing by itself; the port it listens at."""
    talks: set[asyncio.Task[Any] | None] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError):
            await talk(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    listener = await asyncio.start_server(handle, HOST, 0)
    async with listener:
        yield listener.sockets[0].getsockname()[1]
        await asyncio.gather(*(task for task in talks if task is not None))
