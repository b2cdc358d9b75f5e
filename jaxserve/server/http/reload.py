# SPDX-License-Identifier: Apache-2.0
"""Reloads key files and the TLS certificate on SIGHUP. What cannot be used is logged, and the old one stays in use."""

import logging
import ssl

from jaxserve.config import ConfigError
from jaxserve.server.config import ServerConfig
from jaxserve.server.http import listening
from jaxserve.server.http.api_keys import KeyRing
from jaxserve.server.observe import logs

LOG = logging.getLogger("jaxserve.server")


def reloads(config: ServerConfig) -> bool:
    """Whether there is a file to reload."""
    return bool(config.api_key_file or config.admin_api_key_file or config.ssl_certfile)


def reload(config: ServerConfig, context: ssl.SSLContext | None, keys: KeyRing) -> None:
    if config.api_key_file or config.admin_api_key_file:
        try:
            keys.read()
        except ConfigError as error:
            LOG.error("API keys were not reloaded: %s", error)
        else:
            logs.mask(keys.secrets)
            LOG.info("reloaded %d API keys", len(keys.keys))
    if context is not None:
        try:
            listening.renew(context, config)
        except ConfigError as error:
            LOG.error("the TLS certificate was not reloaded: %s", error)
        else:
            LOG.info("reloaded the TLS certificate")
