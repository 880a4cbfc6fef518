"""Addresses of databases, as others than SQLAlchemy read them."""

from sqlalchemy.engine import URL, make_url


def plain(url: str | URL) -> str:
    """Return a URL as PostgreSQL's own programs, and its driver, take it."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
