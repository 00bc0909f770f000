"""Adapters for :mod:`mica.ports.store`: in memory, and in SQLite (the default)."""
