"""Liger's fused linear losses (Triton) at the shapes of loss.py, on the same device: a peer's time and memory for the same products.

`jsd beta=0` is the forward KL with both heads fused, as the KD part of our loss; `cross entropy` is the LM part. Needs torch with CUDA and
liger-kernel, e.g. as wheels; without them the part says so.
"""

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.device.sizes import Size


def cases(size: Size) -> dict[str, Callable[[], dict]]:
  missing = [name for name in ('torch', 'liger_kernel') if importlib.util.find_spec(name) is None]
  if missing:
    return {'not installed': lambda: {'missing': missing}}
  import torch

  if not torch.cuda.is_available():
    return {'not installed': lambda: {'missing': ['a CUDA device for torch']}}
  return {name: lambda n=name: measure(size, n) for name in ('cross entropy', 'jsd beta=0', 'dense torch')}


def measure(size: Size, name: str) -> dict:
  """Median milliseconds of loss and gradients, and the peak of allocated memory beyond the inputs."""
  import torch

  n, d, v = size.loss
  torch.manual_seed(0)
  draw: Any = lambda *shape: torch.randn(*shape, device='cuda', dtype=torch.bfloat16)
  x, w = draw(n, d).requires_grad_(), (draw(v, d) * d**-0.5).requires_grad_()
  xt, wt = draw(n, d), draw(v, d) * d**-0.5
  labels = torch.randint(0, v, (n,), device='cuda')
  loss = losses()[name]
  torch.cuda.synchronize()
  held = torch.cuda.memory_allocated()
  torch.cuda.reset_peak_memory_stats()
  times = []
  for _ in range(3 + size.calls):
    x.grad = w.grad = None
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    loss(x, w, xt, wt, labels).backward()
    end.record()
    torch.cuda.synchronize()
    times.append(begin.elapsed_time(end))
  return {
    'n': n,
    'd': d,
    'v': v,
    'milliseconds': statistics.median(times[3:]),
    'temporary bytes': torch.cuda.max_memory_allocated() - held,
    'torch': torch.__version__,
  }


def losses() -> dict[str, Callable]:
  import torch.nn.functional as F
  from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

  cross_entropy, jsd = LigerFusedLinearCrossEntropyLoss(), LigerFusedLinearJSD(jsd_beta=0.0)

  def dense(x, w, xt, wt, labels):
    """CE and forward KL on whole logits, mixed by 0.4."""
    student, teacher = (x @ w.T).float(), (xt @ wt.T).float()
    kd = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction='batchmean')
    return 0.6 * F.cross_entropy(student, labels) + 0.4 * kd

  return {
    'cross entropy': lambda x, w, xt, wt, labels: cross_entropy(w, x, labels),
    'jsd beta=0': lambda x, w, xt, wt, labels: jsd(x, w, xt, wt, labels),
    'dense torch': dense,
  }
