"""What lives as long as one application: whether it is closing, and its numbers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from litestar.di import NamedDependency
from litestar.params import SkipValidation

from mica.api.metrics import Metrics


@dataclass
class Lifetime:
    """``closing`` is set when the server begins to stop: whatever waits or streams ends then."""

    closing: asyncio.Event = field(default_factory=asyncio.Event)
    metrics: Metrics = field(default_factory=Metrics)


LifetimeDep = NamedDependency[SkipValidation[Lifetime]]
