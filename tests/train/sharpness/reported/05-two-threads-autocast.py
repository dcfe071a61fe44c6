# fmt: off
# ruff: noqa
# Two monitors in two threads (say a sweep in a thread pool): afterwards autocast must still work.
import sys, threading, torch
from torch import nn
import torch.nn.functional as F
from telltale.train.sharpness import SharpnessMonitor
before = torch.autocast.__enter__
barrier = threading.Barrier(2)
def job(slow):
    torch.manual_seed(0)
    m = nn.Linear(6, 3); opt = torch.optim.SGD(m.parameters(), lr=.1)
    import time
    def loss(m, b):
        if gate.is_set(): time.sleep(slow)
        return m(b).pow(2).mean()
    gate = threading.Event()
    mon = SharpnessMonitor(m, loss, [torch.randn(4, 6)], optimizer=opt, every=1, budget=1.)
    gate.set(); barrier.wait()
    if slow > .2: time.sleep(.1)
    mon.check()
ts = [threading.Thread(target=job, args=(s,)) for s in (.2, .5)]
[t.start() for t in ts]; [t.join() for t in ts]
same = torch.autocast.__enter__ is before
print("torch.autocast.__enter__ restored:", same); sys.exit(not same)
