// Stands for tma.cuh: a copy is done as soon as it is asked for. Rows are not swizzled.
#include "base.cuh"
#include "mbarrier.cuh"

// Box at (x, y, z, w) of a 4-dimensional tensor; coordinates outside it read zeros and still count.
DEVICE void tma_load(u32 to_smem, const TensorMap* map, u32 barrier, int x, int y, int z, int w) {
  if (to_smem % 1024) fail("a box at %u is not where a swizzled one may be", to_smem);
  const i64 outer = z * map->strides[1] + w * map->strides[2];
  for (int r = 0; r < map->rows; r++)
    for (int c = 0; c < 64; c++) {
      const bool inside = x + c < map->shape[0] && y + r >= 0 && y + r < map->shape[1];
      const i64 at = outer + (y + r) * map->strides[0] + x + c;
      shared<u16>(to_smem + r * 128 + c * 2) = inside ? map->gmem[at] : 0;
    }
  ++*map->copies;
  barrier_bytes(barrier, map->rows * 128);
}
