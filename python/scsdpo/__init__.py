"""SC-SDPO and SDPO in trainers: what knows transformers, TRL and verl; the arithmetic is in ``scsdpo_kernels``.

Its public names are here, too. Trainers are imported where they are asked for: scsdpo.head, scsdpo.trl, scsdpo.verl.
"""

from scsdpo_kernels import *  # noqa: F403
from scsdpo_kernels import __all__ as __all__
