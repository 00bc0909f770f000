"""HTTP: what is spoken at the daemon's door. Parses, authenticates, answers; decides nothing.

A request passes :mod:`mica.api.gate` (request id, who asks, one log line), then a route of :mod:`mica.api.routes`,
which calls the engine behind :mod:`mica.api.facade`. Every error leaves as RFC 9457 problem details
(:mod:`mica.api.problems`).
"""
