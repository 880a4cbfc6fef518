"""Where the service is run: manifests that were read, real servers, and a network that nobody else is in."""

import base64
import fcntl
import os
import secrets
import socket
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from tests.deploy.image.manifest import Container, Object, Pod, one, pod_of, read, target_port
from tests.deploy.image.report import require
from tests.support.addresses import plain
from tests.support.servers import own_postgres, own_redis

_NAME = "identity-service"


@dataclass(frozen=True, slots=True)
class Place:
    """What one run of the checks is about: an image, manifests, and the values of this place's secrets."""

    image: str
    server: Object
    pod: Pod
    job: Pod
    public: int
    management: int
    hidden: Sequence[str]
    administrator: str
    grants: str

    @property
    def container(self) -> Container:
        """The container that serves."""
        return self.pod.containers[0]

    @property
    def issuer(self) -> str:
        """The issuer that the manifest names."""
        return self.container.env["IDENTITY_ISSUER"]

    @property
    def host(self) -> str:
        """What clients put into the Host header."""
        return urlsplit(self.issuer).netloc

    def count(self, table: str) -> int:
        """Return how many rows a table has."""
        with psycopg.connect(self.administrator) as connection:
            row = connection.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608  # names of ours
        return int(row[0]) if row else -1


def prepare(stack: ExitStack, image: str, deploy: Path) -> Place:
    """Start the servers, make the roles, and read the manifests."""
    postgres, redis = stack.enter_context(own_postgres()), stack.enter_context(own_redis())
    administrator = plain(postgres.create_database("identity"))
    with psycopg.connect(administrator, autocommit=True) as connection:
        connection.execute((deploy / "postgresql/roles.sql").read_text("utf-8"))
    words = {role: secrets.token_urlsafe(24) for role in ("identity_service", "identity_migrator")}
    place = urlsplit(administrator)
    urls = {
        role: f"postgresql+psycopg://{role}:{word}@{place.hostname}:{place.port}/identity"
        for role, word in words.items()
    }
    master = base64.b64encode(os.urandom(32)).decode("ascii")
    smtp = secrets.token_urlsafe(24)
    known = {
        ("identity-database", "url"): urls["identity_service"],
        ("identity-database-migrator", "url"): urls["identity_migrator"],
        ("identity-redis", "url"): redis.url,
        ("identity-smtp", "password"): smtp,
        ("identity-master-key", "keys"): f"{master}\n",
    }

    def secret(name: str, key: str) -> str:
        require((name, key) in known, f"nobody knows of a Secret {name} with the key {key}")
        return known[name, key]

    rendered = deploy / "kubernetes/rendered"
    objects, jobs = read(rendered / "production.yaml"), read(rendered / "migrate.yaml")
    server = one(objects, "Deployment", _NAME)
    pod = pod_of(server, objects, secret)
    public, management = (
        target_port(one(objects, "Service", name), server, pod.containers[0]) for name in (_NAME, f"{_NAME}-management")
    )
    return Place(
        image=image,
        server=server,
        pod=pod,
        job=pod_of(one(jobs, "Job", f"{_NAME}-migrate"), jobs, secret),
        public=public,
        management=management,
        hidden=(*words.values(), master, smtp),
        administrator=administrator,
        grants=(deploy / "postgresql/grants.sql").read_text("utf-8"),
    )


def raise_loopback() -> None:
    """Bring up the loopback interface of a new network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh", b"lo", 0)
        flags = struct.unpack("16sh", fcntl.ioctl(control, 0x8913, request))[1]  # SIOCGIFFLAGS
        fcntl.ioctl(control, 0x8914, struct.pack("16sh", b"lo", flags | 1))  # SIOCSIFFLAGS, IFF_UP
