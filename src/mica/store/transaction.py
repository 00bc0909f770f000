"""What every store asks of a transaction before it looks at a row."""

from __future__ import annotations

from mica.ports.store import Transaction


def check_transaction(transaction: Transaction) -> None:
    """Raises :class:`ValueError` for a transaction that contradicts itself: that is a fault of the caller's code."""
    both = transaction.put.keys() & set(transaction.delete)
    if both:
        raise ValueError(f"a transaction puts and deletes the same rows: {sorted(both)}")
