"""What the makers publish of two GPUs, and how many blocks of a kernel one of their processors (SM) holds.

Sources: NVIDIA A100 Tensor Core GPU datasheet (80GB SXM) and NVIDIA H100 Tensor Core GPU datasheet (SXM; dense figures
are half of those with sparsity); CUDA C++ Programming Guide, technical specifications by compute capability."""
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class Machine:
    name: str
    arch: str             # what nvcc compiles for
    sms: int
    bf16: float           # FLOP/s of the tensor cores, dense
    fp8: float            # the same, dense; 0: none
    fp32: float           # FLOP/s outside the tensor cores
    hbm: float            # bytes/s
    shared_per_sm: int    # bytes
    shared_per_block: int
    registers_per_sm: int = 65536
    warps_per_sm: int = 64
    blocks_per_sm: int = 32

    def occupancy(self, threads, registers, shared):
        """(blocks, warps) an SM holds of blocks of `threads`, `registers` a thread, `shared` bytes a block. An SM has
        four parts with a quarter of the registers each, given out in units of 256 a warp; a block's shared memory is
        rounded up to 128 bytes and the system takes 1 KiB more."""
        warps = ceil(threads / 32)
        a_warp = ceil(registers * 32 / 256) * 256
        by_registers = 4 * (self.registers_per_sm // 4 // a_warp) // warps
        by_shared = self.shared_per_sm // (ceil(shared / 128) * 128 + 1024)
        if shared > self.shared_per_block:
            by_shared = 0
        blocks = min(self.blocks_per_sm, self.warps_per_sm // warps, by_registers, by_shared)
        return blocks, blocks * warps


A100 = Machine("A100 80GB SXM", "sm_80", 108, 312e12, 0, 19.5e12, 2039e9, 164 << 10, 163 << 10)
H100 = Machine("H100 80GB SXM", "sm_90a", 132, 989.4e12, 1978.9e12, 67e12, 3350e9, 228 << 10, 227 << 10)
MACHINES = (A100, H100)
