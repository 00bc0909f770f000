"""Prove accelerators by execution: what runs a small 64-bit guest rightly and quickly works, and nothing else does.

Import :class:`~mica.qemu.accelerators.prover.Accelerators` and
:func:`~mica.qemu.accelerators.platforms.provers` from their modules: this package itself imports nothing, because
the probe's own process starts through it.
"""
