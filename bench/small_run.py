"""Every Triton kernel once, forward and backward, on small odd shapes: `python -m bench.small_run`.

For compute-sanitizer: with launches of a second and more under its racecheck, a test suite would take hours.
"""

from __future__ import annotations

import torch

from srm_kernels import backends, nystrom_attention
from srm_kernels.attention import configurations


def main() -> None:
    """Run on the GPU, or say why not."""
    if not torch.cuda.is_available():
        raise SystemExit("bench.small_run needs a CUDA device: " + backends()["triton"].reason)
    # one launch; divided among programs; and with K̃ and X a piece at a time
    for most_keys, most_held in ((1024, 64 * 64), (16, 64 * 64), (16, 0)):
        configurations.MOST_KEYS_OF_ONE_PROGRAM, configurations.MOST_HELD = most_keys, most_held
        configurations.LEAST_KEYS_OF_A_PART = configurations.LEAST_QUERIES_OF_A_PART = 32
        configurations.LEAST_QUERIES_OF_A_GRADIENT = 32
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for method, solver in (
                ("leverage", "cholesky"),
                ("pivoted_cholesky", "cholesky"),
                ("leverage", "lu"),
            ):
                query, key, value = (
                    torch.randn(1, 2, n, 40, device="cuda", dtype=dtype, requires_grad=True)
                    for n in (70, 70, 70)
                )
                tau = torch.ones(2, device="cuda", requires_grad=True)
                options = {
                    "method": method,
                    "solver": solver,
                    "qk_norm": "both",
                    "tau": tau,
                    "statistics": True,
                }
                y, _ = nystrom_attention(query, key, value, 20, backend="triton", **options)
                y.float().square().sum().backward()
                assert all(x.grad is not None and x.grad.isfinite().all() for x in (query, key, value, tau))
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
