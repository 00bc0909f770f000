"""One file for each device: its options, its defaults, what it can do while the machine runs.

A device returns :class:`~mica.qemu.arguments.Arguments`; it knows no other device. ``tests/golden`` holds what they
make of typical specs, and a test fails when an option that is built here was never exercised there.
"""
