# SPDX-License-Identifier: Apache-2.0
"""`jaxserve devices`: the devices that JAX sees, and which kernel backend runs on them."""

import json as json_module
from dataclasses import dataclass
from typing import Annotated, Any, cast

from jaxserve.errors import JaxserveError
from jaxserve.flags.setting import Setting
from jaxserve.flags.sizes import shown_size


@dataclass(frozen=True)
class Devices:
    """List the devices that JAX sees and the kernel backend."""

    json: Annotated[bool, Setting("Print one JSON object instead of a table.")] = False

    def run(self) -> None:
        import jax

        from pallas_kernels import dispatch

        try:
            devices = cast(Any, jax).devices()  # its stub is only partly typed
        except (RuntimeError, AssertionError) as error:
            # jax raises these if a platform in JAX_PLATFORMS fails to start, or if its plugin is not installed.
            why = str(error) or "a platform in JAX_PLATFORMS is not installed"
            raise JaxserveError(f"JAX found no device ({why})", "check JAX_PLATFORMS") from None
        rows = [_row(device) for device in devices]
        kernels = dispatch.implementation()
        if self.json:
            print(json_module.dumps({"kernels": kernels, "devices": rows}))
            return
        for row in rows:
            size = shown_size(row["memory_bytes"]) if row["memory_bytes"] else "memory unknown"
            print(f"{row['id']:4}  {row['platform']:5} {row['kind']:24} {size}")
        print(f"kernels: {kernels}")


def _row(device: Any) -> dict[str, Any]:
    # None on platforms without memory statistics, such as the CPU.
    stats: dict[str, Any] = device.memory_stats() or {}
    return {
        "id": device.id,
        "platform": device.platform,
        "kind": device.device_kind,
        "memory_bytes": stats.get("bytes_limit"),
    }
