"""Run every kernel of attention, forward and backward, on small shapes: `python -m bench.small_run`.

The sizes N_q, N_k, r and d are not multiples of 16, so tiles are only partly filled. `bench/gpu.sh` runs this command
three times: first alone, then under the tool memcheck of compute-sanitizer, and then under its tool racecheck. The test
suite does not run under these tools: under racecheck, a launch takes a second or more, so the suite would take hours.
"""

from __future__ import annotations

import torch

from srm_kernels import backends, nystrom_attention
from srm_kernels.attention import attention_with_scale, launch_rules

# Values of (MOST_KEYS_OF_ONE_PROGRAM, MOST_HELD). The first pair gives one launch, the second divides the keys among
# programs, and the third also reads K̃ and X in pieces.
LIMITS = ((1024, 64 * 64), (16, 64 * 64), (16, 0))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METHODS = (
    ("leverage", "cholesky"),
    ("uniform", "cholesky"),
    ("pivoted_cholesky", "cholesky"),
    ("leverage", "lu"),
)


def run(device: str) -> None:
    """Launch every kernel and check that all gradients are finite."""
    launch_rules.LEAST_KEYS_OF_A_PART = launch_rules.LEAST_QUERIES_OF_A_PART = 32
    launch_rules.LEAST_QUERIES_OF_A_GRADIENT = 32
    for most_keys, most_held in LIMITS:
        launch_rules.MOST_KEYS_OF_ONE_PROGRAM, launch_rules.MOST_HELD = most_keys, most_held
        for dtype in DTYPES:
            tokens = [torch.randn(1, 2, 70, 40, device=device, dtype=dtype) for _ in range(3)]
            inputs = [x.requires_grad_() for x in (*tokens, torch.ones(2, device=device))]
            *tokens, tau = inputs
            options = {"qk_norm": "both", "tau": tau, "backend": "triton"}
            results = [nystrom_attention(*tokens, 20, method=m, solver=s, **options) for m, s in METHODS]
            results.append(attention_with_scale(*tokens, 20, **options)[0])
            sum(y.float().square().sum() for y in results).backward()
            assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


def main() -> None:
    """Run on the GPU; exit with a message if there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("bench.small_run needs a CUDA device: " + backends()["triton"].reason)
    run("cuda")
    torch.cuda.synchronize()
    print("every kernel of attention ran")


if __name__ == "__main__":
    main()
