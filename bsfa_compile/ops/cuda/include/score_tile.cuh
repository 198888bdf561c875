// A warp's accumulators of one score tile: s[m][n][e] of mma m16n8, m strips of 16 rows, n tiles of
// 8 keys. Row r < 2 * STRIPS of a thread is 16 * (r / 2) + 8 * (r % 2) + lane / 4.
#include "numeric.cuh"

// Hide the keys of row r whose bit in `seen` is 0 (bit c: key c of the tile).
template <int STRIPS>
__device__ __forceinline__ void hide_keys(float (&s)[STRIPS][8][4], int r,
                                          unsigned long long seen) {
  seen >>= 2 * (threadIdx.x & 3);
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (!((seen >> (n * 8 + e)) & 1)) s[r >> 1][n][(r & 1) * 2 + e] = NEG_INF;
}

// Maximum of the 16 scores of row r that this thread holds; NaN if one is.
template <int STRIPS>
__device__ __forceinline__ float row_maximum(const float (&s)[STRIPS][8][4], int r) {
  const int e = (r & 1) * 2;
  float x = max_nan(s[r >> 1][0][e], s[r >> 1][0][e + 1]);
#pragma unroll
  for (int n = 1; n < 8; ++n) x = max_nan(x, max_nan(s[r >> 1][n][e], s[r >> 1][n][e + 1]));
  return x;
}
