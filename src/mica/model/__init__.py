"""What things are: immutable values, units, ids, states and their transitions, errors.

Nothing in this room does I/O, awaits, or reads a clock. Every other room may import it; it imports none.
"""
