// TMA: bulk copies from global to shared memory that report their bytes to an mbarrier.
#include "base.cuh"

// Box at (x, y, z, w) of a 4-dimensional tensor; coordinates outside it read zeros and still count.
DEVICE void tma_load(u32 to_smem, const TensorMap* map, u32 barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to_smem),
      "l"((u64)map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
// Plain run of bytes, a multiple of 16 from a 16-byte boundary.
DEVICE void bulk_load(u32 to_smem, const void* from_gmem, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to_smem),
      "l"((u64)__cvta_generic_to_global(from_gmem)), "r"(bytes), "r"(barrier)
      : "memory");
}
DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"((u64)map) : "memory");
}
