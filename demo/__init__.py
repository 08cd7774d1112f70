"""The demo: ``./dev demo``, or ``python -m demo`` in a checkout.

It has two parts. `learning` compares SC-SDPO with SDPO and with a hard filter on a task that a CPU learns in minutes
(`digits`), over several seeds; `comparison` has the statistics and the sentences. `kernel` compares the fused loss with
full logits on the hidden states of a real language model. `picture` draws both. What is measured, and how, is that of
`benchmarks/`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

COLUMNS = 96  # of a progress bar
