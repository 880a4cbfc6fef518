"""Changing a whole table in one transaction, by statements that each take no longer than one may."""

from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy import Column, ColumnElement, and_, select, true

from identity_service.infra.database import Transaction


async def in_parts(tx: Transaction, key: Column[Any], size: int = 5000) -> AsyncIterator[ColumnElement[bool]]:
    """
    Yield conditions on a table's key: each holds for at most `size` rows, and all together for every row.

    A statement has seconds, and a table may have millions of rows.
    """
    begins: ColumnElement[bool] = true()
    while True:
        ordered = select(key).where(begins).order_by(key)
        last = (await tx.execute(ordered.offset(size - 1).limit(1))).scalar()
        if last is None:
            yield begins
            return
        yield and_(begins, key <= last)
        begins = key > last
