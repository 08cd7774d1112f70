"""SC-SDPO and SDPO in trainers: what knows transformers, TRL and verl; the arithmetic is in ``scsdpo_kernels``."""
