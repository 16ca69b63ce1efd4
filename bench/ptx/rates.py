"""Rates of the units of GPUs, per clock and multiprocessor (SM).

Sources:
- Arithmetic lanes: CUDA C++ Programming Guide, "Arithmetic Instructions", table "Throughput of Native Arithmetic
  Instructions". Numbers are results per clock and SM on compute capabilities 8.0, 8.6, 8.9, 9.0 and 12.0:
  - fp32 add, multiply and fma: 64 on 8.0, and 128 on the others.
  - 32-bit integer add, compare, logic and shift: 64 on all.
  - 32-bit integer multiply-add: 64 on all.
  - Special functions: 16 on all.
- Tensor cores: NVIDIA's whitepapers. Numbers are fused multiply-adds (FMA) per clock and SM, for products of
  dense matrices with fp32 accumulation:
  - A100 whitepaper, table 2: 1,024 in bf16 and 512 in tf32.
  - H100 whitepaper: 2,048 in bf16 and 1,024 in tf32 with wgmma. mma.sync reaches about half of these rates.
  - Ampere GA102 and Ada whitepapers, appendix A: 256 in bf16 and 128 in tf32 on GeForce cards of compute
    capability 8.6 and 8.9. On these cards, products with fp32 accumulation have half of the rate of products
    with fp16 accumulation. The rate in bf16 is computed from the dense bf16 throughput: 71 TFLOPS for the RTX
    3090 and 165.2 TFLOPS for the RTX 4090.
  - Blackwell RTX whitepaper, appendix A: 256 in bf16 and 128 in tf32 on compute capability 12.0. The rate in
    bf16 is computed from the dense bf16 throughput of the RTX 5090, which is 209.5 TFLOPS.
- Number of SMs, boost clock and memory bandwidth: the specification tables of the same whitepapers. The A100
  is the SXM card with 80 GB.
"""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """A GPU.

    `sms` is the number of SMs, `ghz` is the boost clock in GHz, and `dram` is the memory bandwidth in GB/s. All other
    rates are per clock and SM. `fp32` is the number of results of fp32 arithmetic, `alu` that of 32-bit integer add,
    compare, logic and shift, `imad` that of 32-bit integer multiply-add, and `xu` that of special functions. `bf16` and
    `tf32` are the numbers of fused multiply-adds of the tensor cores.
    """

    name: str
    capability: int
    sms: int
    ghz: float
    dram: float
    fp32: int
    bf16: int
    tf32: int
    alu: int = 64
    imad: int = 64
    xu: int = 16


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("RTX 3090", 86, 82, 1.695, 936, 128, 256, 128),
        Gpu("RTX 4090", 89, 128, 2.520, 1008, 128, 256, 128),
        Gpu("RTX 5090", 120, 170, 2.407, 1792, 128, 256, 128),
        Gpu("A100", 80, 108, 1.410, 2039, 64, 1024, 512),
        Gpu("H100", 90, 132, 1.830, 3350, 128, 2048, 1024),
        Gpu("H100 mma.sync", 90, 132, 1.830, 3350, 128, 1024, 512),
    )
}
