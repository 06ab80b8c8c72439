"""Three products of D, as query, key and value are, against one of 3 D: forward and backward, interleaved pairs.

`python -m tests.benchmarks.fused_qkv` prints a table and a JSON line. Above 1 the one product is faster.

Legend: M tokens of a micro-batch, D hidden.
"""

import json
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS, TOKENS, PAIRS = (128, 768, 2560), 512, 31


def seconds(work: Callable[[], None]) -> float:
    """Of the GPU, or of this process on its one CPU thread, so that what else runs here does not count."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    work()
    return time.process_time() - start


def ratios(width: int, device: str) -> list[float]:
    """Time of three products over time of one, for each pair."""
    x_MD = torch.randn(TOKENS, width, device=device, requires_grad=True)
    gradient_MD = torch.randn(TOKENS, width, device=device)
    three = [(torch.randn(width, width, device=device), torch.zeros(width, device=device)) for _ in range(3)]
    weight, bias = (torch.cat(parts) for parts in zip(*three, strict=True))
    parameters: list[Tensor] = [x_MD, weight, bias, *(tensor for pair in three for tensor in pair)]
    for parameter in parameters:
        parameter.requires_grad_()

    def apart() -> None:
        outputs = [F.linear(x_MD, *pair) for pair in three]
        torch.autograd.grad(outputs, [x_MD, *(t for pair in three for t in pair)], [gradient_MD] * 3)

    def fused() -> None:
        outputs = F.linear(x_MD, weight, bias).chunk(3, -1)
        torch.autograd.grad(outputs, [x_MD, weight, bias], [gradient_MD] * 3)

    for work in (apart, fused):
        work()
    return [seconds(apart) / seconds(fused) for _ in range(PAIRS)]


def main() -> None:
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {width: ratios(width, device) for width in WIDTHS}
    print(f"{'D':>6}  {'min':>6}  {'median':>6}  {'max':>6}   three products / one")
    rows = {}
    for width, values in found.items():
        rows[width] = [round(f(values), 3) for f in (min, statistics.median, max)]
        print(f"{width:>6}  " + "  ".join(f"{value:>6.3f}" for value in rows[width]))
    where = {"device": device, "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps({"tokens": TOKENS, "pairs": PAIRS, "min_median_max": rows, **where}))


if __name__ == "__main__":
    main()
