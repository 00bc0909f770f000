"""Structured logs on stderr: lines for people on a terminal, JSON elsewhere."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import FilteringBoundLogger as Logger


def configure(level: str) -> Logger:
    """Set up logging for this process and return the logger of the API's request lines."""
    number = logging.getLevelNamesMapping()[level.upper()]
    pretty = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if pretty else [structlog.processors.format_exc_info]),
            structlog.dev.ConsoleRenderer() if pretty else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries that use the standard library's logging: warnings only, on the same stream.
    logging.basicConfig(
        level=max(number, logging.WARNING), stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
    )
    # QMP's own library tells each lost connection as an error; the engine says what it means.
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
    logger: Logger = structlog.get_logger()
    return logger


__all__ = ["Logger", "configure"]
