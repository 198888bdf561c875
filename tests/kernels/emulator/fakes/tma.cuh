// Stands for tma.cuh: a copy is done as soon as it is asked for.
#include "base.cuh"
#include "mbarrier.cuh"

// Box at (x, y, z, w) of a 4-dimensional tensor; coordinates outside it read zeros and still count.
DEVICE void tma_load(u32 to_smem, const TensorMap* map, u32 barrier, int x, int y, int z, int w) {
  if (to_smem % 1024) fail("a box at %u is not where a swizzled one may be", to_smem);
  const u8* outer = map->gmem + z * map->strides[1] + w * map->strides[2];
  const int size = map->element, row_bytes = map->box[0] * size;
  for (int r = 0; r < map->box[1]; r++)
    for (int c = 0; c < map->box[0]; c++) {
      const bool inside = x + c < map->shape[0] && y + r >= 0 && y + r < map->shape[1];
      const u8* from = outer + (y + r) * map->strides[0] + (x + c) * size;
      for (int i = 0; i < size; i++)
        shared<u8>(swizzled(to_smem + r * row_bytes + c * size + i, row_bytes)) = inside ? from[i] : 0;
    }
  ++*map->copies;
  barrier_bytes(barrier, map->box[1] * row_bytes);
}
DEVICE void bulk_load(u32 to_smem, const void* from_gmem, u32 bytes, u32 barrier) {
  if (to_smem % 16 || (u64)from_gmem % 16 || bytes % 16) fail("a copy that is not of 16 bytes");
  for (u32 i = 0; i < bytes; i++) shared<u8>(to_smem + i) = ((const u8*)from_gmem)[i];
  barrier_bytes(barrier, bytes);
}
