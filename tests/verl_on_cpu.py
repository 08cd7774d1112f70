"""Before anything else of verl is imported: a platform that its classes can run on without an accelerator.

verl's own workers import it by VERL_USE_EXTERNAL_MODULES; a test imports it first.
"""

import os

if "VERL_USE_EXTERNAL_MODULES" not in os.environ:
    os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"  # they would import verl's engines, which ask for the platform
    os.environ |= {"VERL_ENGINE_DEVICE": "cpu", "VERL_ENGINE_VENDOR": "scsdpo"}

import torch
from verl.plugin.platform import set_platform
from verl.plugin.platform.platform_cuda import PlatformCUDA


class DeviceModule:
    """torch.cpu, with what verl asks torch.cuda for beside that; no memory is counted."""

    def __getattr__(self, name):
        if hasattr(torch.cpu, name):
            return getattr(torch.cpu, name)
        if name.startswith(("memory", "max_memory", "reset", "empty", "manual_seed", "set_", "ipc", "get_rng")):
            return lambda *_, **__: 0
        if name in ("get_device_name", "mem_get_info"):
            return lambda *_: {"get_device_name": "CPU", "mem_get_info": (0, 1)}[name]
        raise AttributeError(name)


class PlatformCPU(PlatformCUDA):
    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "none")
    device_module = property(lambda self: DeviceModule())

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return 1

    def communication_backend_name(self):
        return "gloo"

    def is_ipc_supported(self):
        return False

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def nothing(self, *_, **__):
        pass

    set_device = synchronize = empty_cache = set_allocator_settings = nothing


set_platform(PlatformCPU())

# verl asks for "cpu:gloo,cpu:gloo" where the device is the CPU, which torch refuses.
_init_process_group = torch.distributed.init_process_group


def init_process_group(backend=None, *args, **kwargs):
    return _init_process_group("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)


torch.distributed.init_process_group = init_process_group
