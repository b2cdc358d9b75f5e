# SPDX-License-Identifier: Apache-2.0
"""The server's log: one line per event, as text or JSON."""

import logging
import time
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from jaxserve.errors import one_line
from jaxserve.frontend import log_lines
from jaxserve.frontend.log_lines import Lines
from jaxserve.server.config import ServerConfig
from jaxserve.server.observe.request_record import RequestRecord
from jaxserve.types.metrics import EngineMetrics
from jaxserve.types.sampling_params import SamplingParams

LOG = logging.getLogger("jaxserve.server")
OTHERS = ("aiohttp", "asyncio", "opentelemetry")  # libraries whose warnings and errors are logged too
STATS_SECONDS = 10.0
SHORTEST = 0.02  # seconds from the first to the last token, for a rate


def configure(config: ServerConfig) -> None:
    if config.log_format == "json":
        log_lines.write_json(config.api_key)
    handler = log_lines.handler(config.log_format, config.api_key)
    for name, level in (("jaxserve", config.log_level.upper()), *((name, "WARNING") for name in OTHERS)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def mask(secrets: Collection[str]) -> None:
    """Mask these in all later lines."""
    for handler in LOG.parent.handlers if LOG.parent is not None else ():
        if isinstance(handler.formatter, Lines):
            handler.formatter.mask(secrets)


def request_line(
    record: RequestRecord, *, method: str, path: str, status: int, config: ServerConfig, level: int = logging.INFO
) -> None:
    """Log a finished HTTP request."""
    if not LOG.isEnabledFor(level):
        return
    now = time.monotonic()
    shown: dict[str, Any] = {"id": record.id, "status": status, "seconds": now - record.arrival, "error": record.error}
    shown["key"] = record.key
    if record.prepared:
        shown |= {
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "generated_tokens": record.generated_tokens,
            "ttft": None if record.first_token is None else record.first_token - record.arrival,
            "tokens_per_second": _pace(record),
            "finish": ",".join(sorted(set(record.finish_reasons))) or ("error" if record.error else "left"),
        }
        if config.enable_log_requests:
            shown["params"] = _differing(record.prepared[0].params)
        if config.enable_log_outputs:
            shown["prompt"] = repr((record.prepared[0].prompt or "")[: config.max_log_len])
            shown["answer"] = repr("".join(record.texts)[: config.max_log_len])
    LOG.log(level, "%s %s", method, one_line(path), extra={"fields": shown})


def _pace(record: RequestRecord) -> float | None:
    """Tokens per second after the first."""
    if record.first_token is None or record.last_token is None or record.last_token - record.first_token < SHORTEST:
        return None
    later = record.generated_tokens - len(record.finish_reasons or (1,))
    return later / (record.last_token - record.first_token) if later > 0 else None


def _differing(params: SamplingParams) -> str:
    """The parameters that differ from their defaults."""
    plain = SamplingParams()
    values = {field.name: getattr(params, field.name) for field in fields(params) if field.name != "output_kind"}
    return repr({name: value for name, value in values.items() if value != getattr(plain, name)})


class Throughput:
    """Logs throughput since the previous line, while the engine has work."""

    def __init__(self) -> None:
        self._last: tuple[float, int, int, int, int] | None = None

    def tell(self, stats: EngineMetrics | None) -> None:
        if stats is None:
            return
        now = time.monotonic()
        seen = (now, stats.prompt_tokens, stats.generated_tokens, stats.prefix_queries, stats.prefix_hits)
        last, self._last = self._last, seen
        if last is None or seen[1] < last[1] or seen[2] < last[2]:  # no previous sample, or the engine restarted
            return
        if not stats.running and not stats.waiting and seen[1:3] == last[1:3]:
            return
        seconds, prompt, generated, queries, hits = (after - before for after, before in zip(seen, last, strict=True))
        shown = {
            "prompt_tokens_per_second": round(prompt / seconds, 1),
            "generated_tokens_per_second": round(generated / seconds, 1),
            "running": stats.running,
            "waiting": stats.waiting,
            "kv_used": f"{stats.kv_usage:.1%}",
            "prefix_hits": f"{hits / queries:.1%}" if queries > 0 else None,
        }
        LOG.info("throughput", extra={"fields": shown})
