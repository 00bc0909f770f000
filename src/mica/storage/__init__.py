"""Adapters for :mod:`mica.ports.volumes`: a directory of qcow2 and raw files."""
