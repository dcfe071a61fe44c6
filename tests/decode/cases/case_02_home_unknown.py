"""A uid without a passwd entry and no HOME (Kubernetes runAsUser, OpenShift): opening a decoder must fall back, not crash."""
import os, sys
os.environ["OMP_NUM_THREADS"] = "1"; os.environ.pop("TELLTALE_CACHE", None); os.environ.pop("XDG_CACHE_HOME", None)
import torch, transformers as T
import telltale.decode, telltale.models.backends.native.step, telltale.models.backends.fused, telltale.models.agreement, telltale.models.backends.module
from telltale.decode import Autoregressive
m = T.LlamaForCausalLM(T.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)).eval()
os.environ.pop("HOME", None)
os.setgid(54321); os.setuid(54321)
try:
    d = Autoregressive(m)
    print(f"ok: backend {d.decoder.backend}, {d.decoder.backend_reason}"); sys.exit(0)
except Exception as e:
    print(f"crash: {type(e).__name__}: {e}"); sys.exit(1)
