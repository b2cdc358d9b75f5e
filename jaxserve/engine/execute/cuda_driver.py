# SPDX-License-Identifier: Apache-2.0
"""Asks CUDA's driver about a GPU's memory: jax knows only the share of it that it manages itself."""

import ctypes
from ctypes import byref, c_int, c_size_t, c_void_p
from typing import Any, NamedTuple

LIBRARY = "libcuda.so.1"


class DriverMemory(NamedTuple):
    total: int
    free: int  # for any process


def memory(device: Any) -> DriverMemory | None:
    """The memory of this device of jax's; None if it is no NVIDIA GPU, or if the driver does not answer."""
    ordinal = getattr(device, "local_hardware_id", None)
    if device.platform != "gpu" or ordinal is None:
        return None
    try:
        driver = ctypes.CDLL(LIBRARY)
        return _ask(driver, ordinal)
    except (OSError, AttributeError):  # no driver, or one without these functions
        return None


def _ask(driver: Any, ordinal: int) -> DriverMemory | None:
    gpu, context, free, total = c_int(), c_void_p(), c_size_t(), c_size_t()
    # jax has made the primary context, in which memory is asked about.
    if driver.cuInit(0) or driver.cuDeviceGet(byref(gpu), c_int(ordinal)):
        return None
    if driver.cuDevicePrimaryCtxRetain(byref(context), gpu):
        return None
    try:
        if driver.cuCtxPushCurrent_v2(context):
            return None
        failed = driver.cuMemGetInfo_v2(byref(free), byref(total))
        driver.cuCtxPopCurrent_v2(byref(c_void_p()))
        return None if failed else DriverMemory(total.value, free.value)
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(gpu)
