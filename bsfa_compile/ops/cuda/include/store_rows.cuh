// A warp's output accumulators to global memory, through shared memory of its own, so that stores
// are 16 bytes wide.
#include "numeric.cuh"
#include "shared_tile.cuh"

// acc: rows warp_row + 16 * m + 8 * half + lane / 4 of the tile, times inverse[2 * m + half]. Row 0
// of the tile is row first_row of out_gmem, of which rows [begin, end) are written.
template <int STRIPS, int COLS>
__device__ __forceinline__ void store_rows(const float (&acc)[STRIPS][COLS / 8][4],
                                           const float (&inverse)[2 * STRIPS], char* tile_smem,
                                           unsigned short* out_gmem, long long row_stride,
                                           int warp_row, int first_row, int begin, int end,
                                           int columns, int lane) {
  const int row4 = lane >> 2, t4 = lane & 3;
#pragma unroll
  for (int m = 0; m < STRIPS; ++m)
#pragma unroll
    for (int n = 0; n < COLS / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + m * 16 + half * 8 + row4;
        *reinterpret_cast<unsigned*>(tile_smem + Layout<COLS>::at(row, n) + t4 * 4) =
            pack_16bit(acc[m][n][2 * half] * inverse[2 * m + half],
                       acc[m][n][2 * half + 1] * inverse[2 * m + half]);
      }
  __syncwarp();
  for (int index = lane; index < STRIPS * 16 * (COLS / 8); index += 32) {
    const int row = warp_row + index / (COLS / 8), chunk = index % (COLS / 8);
    const int to_row = first_row + row, left = columns - chunk * 8;
    if (to_row < begin || to_row >= end || left <= 0) continue;
    const char* from = tile_smem + Layout<COLS>::at(row, chunk);
    unsigned short* to = out_gmem + to_row * row_stride + chunk * 8;
    if (columns % 8 == 0) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int e = 0; e < min(left, 8); ++e)
        to[e] = reinterpret_cast<const unsigned short*>(from)[e];
    }
  }
}
