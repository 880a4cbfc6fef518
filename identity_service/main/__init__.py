"""Builds every object once and wires it together; runs the background jobs of a server."""

from identity_service.main.app import Application, create_app
from identity_service.main.jobs import correct_clock, load_data_keys, load_keys, step_keys
from identity_service.main.services import (
    NoMasterKeyYet,
    Services,
    build_services,
    development_key_file,
    load_master_keys,
    schema_fault,
)

__all__ = [
    "Application",
    "NoMasterKeyYet",
    "Services",
    "build_services",
    "correct_clock",
    "create_app",
    "development_key_file",
    "load_data_keys",
    "load_keys",
    "load_master_keys",
    "schema_fault",
    "step_keys",
]
