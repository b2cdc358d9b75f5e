# SPDX-License-Identifier: Apache-2.0
"""XLA flags with which small programs compile soon, for tests and the processes that they start.

Most of a test's time goes into compiling: LLVM's passes cost more than they bring, and the older of XLA's two ways to
write a fusion takes half the time of the newer.
"""

XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
