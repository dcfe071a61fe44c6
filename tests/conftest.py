"""One thread for all tests: the machine may be shared, and tiny models gain nothing from more."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
