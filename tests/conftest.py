"""Before torch is imported: compile afresh, since torch.compile's cache on disk does not see an operator's backward."""

import os

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
