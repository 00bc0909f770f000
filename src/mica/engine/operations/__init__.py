"""The verbs, one file each: parameters, what accepting one checks and writes, and its ordered steps."""
