"""Before anything else of verl is imported: a platform that its classes can run on without an accelerator."""

import os

os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"  # they would import verl's engines, which ask for the platform
os.environ |= {"VERL_ENGINE_DEVICE": "cpu", "VERL_ENGINE_VENDOR": "scsdpo"}

import torch
from verl.plugin.platform import set_platform
from verl.plugin.platform.platform_cuda import PlatformCUDA


class PlatformCPU(PlatformCUDA):
    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "none")
    device_module = property(lambda self: torch.cpu)

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def communication_backend_name(self):
        return "gloo"

    def empty_cache(self):
        pass


set_platform(PlatformCPU())
