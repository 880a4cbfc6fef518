"""A service beside the token service: it checks the tokens of its callers by itself, with the issuer's public keys."""

import os
from typing import Annotated

from fastapi import FastAPI
from pydantic import BaseModel

from identity_service.verifier import VerifiedClaims
from identity_service.verifier.fastapi import Protect

ISSUER = os.environ.get("ORDERS_ISSUER", "http://127.0.0.1:8000")  # exactly what tokens say in `iss`
AUDIENCE = os.environ.get("ORDERS_AUDIENCE", "https://orders.example")  # this service's own name, `aud`

app = FastAPI(title="orders")
protect = Protect(ISSUER, AUDIENCE)
Reader = Annotated[VerifiedClaims, protect.require("orders:read")]
Writer = Annotated[VerifiedClaims, protect.require("orders:write")]


class Order(BaseModel):
    """What somebody wants."""

    item: str


orders: dict[str, list[Order]] = {}  # by `sub`; a real service has a database


@app.get("/orders")
async def list_orders(caller: Reader) -> list[Order]:
    """Return the caller's own orders."""
    return orders.get(caller.subject, [])


@app.post("/orders", status_code=201)
async def create_order(order: Order, caller: Writer) -> Order:
    """Take an order."""
    orders.setdefault(caller.subject, []).append(order)
    return order
