"""Builds every object once and wires it together; runs the background jobs of a server."""

from identity_service.main.app import Application, create_app
from identity_service.main.jobs import correct_clock, load_keys, step_keys
from identity_service.main.services import (
    NoMasterKeyYet,
    Services,
    build_services,
    development_key_file,
    load_master_keys,
)

__all__ = [
    "Application",
    "NoMasterKeyYet",
    "Services",
    "build_services",
    "correct_clock",
    "create_app",
    "development_key_file",
    "load_keys",
    "load_master_keys",
    "step_keys",
]
