// A tile of 16-bit elements in shared memory: where its 16-byte chunks lie, how they arrive.
#include "cp_async.cuh"
#include "numeric.cuh"

// Swizzled so that ldmatrix meets no bank conflict. 96 columns are 12 chunks, which an xor of 3
// bits would leave; a 13th chunk in each row does the same there.
template <int COLS>
struct Layout {
  static constexpr int CHUNKS = COLS / 8;
  static constexpr bool XOR = CHUNKS % 8 == 0;
  static constexpr int PITCH = (XOR ? CHUNKS : CHUNKS + 1) * 16;  // bytes a row
  static __device__ __forceinline__ unsigned at(int row, int chunk) {
    return row * PITCH + ((XOR ? chunk ^ (row & 7) : chunk) << 4);
  }
  // Address of chunk c + 2 * n, given that of chunk c < 2 in a tile aligned to 128 bytes.
  static __device__ __forceinline__ unsigned step(unsigned address, int n) {
    return XOR ? (address ^ ((n & 3) << 5)) + (n >> 2) * 128 : address + n * 32;
  }
};

// Copies ROWS rows of COLS columns with THREADS threads. Rows outside [begin, end) and columns
// beyond `columns` become zeros. Rows are less than 2^25 elements apart.
template <int ROWS, int COLS, int THREADS>
struct TileCopy {
  static constexpr int POW2 = COLS == 96 ? 4 : COLS == 192 ? 8 : COLS / 8;
  static constexpr int ACROSS = POW2 < THREADS / 8 ? POW2 : THREADS / 8;  // threads on a row
  static constexpr int DOWN = THREADS / ACROSS;  // a multiple of 8: one swizzle for all its rows

  unsigned to_smem;       // this thread's first chunk in the first buffer
  const char* from_gmem;  // and in row 0 of the source
  int row_bytes;

  __device__ __forceinline__ TileCopy(unsigned smem, const char* gmem, int row_stride) {
    const int row = threadIdx.x / ACROSS, chunk = threadIdx.x % ACROSS;
    row_bytes = row_stride * 2;
    to_smem = opaque(smem + Layout<COLS>::at(row, chunk));
    from_gmem = opaque(mad_wide(row, row_bytes, gmem + chunk * 16));
  }

  // Rows first_row.. of the source, the last of `count` rows again for those beyond. No branch, so
  // that the copies mix with other work; all COLS columns exist.
  __device__ __forceinline__ void clamped(unsigned offset, int first_row, int count) const {
    const char* tile_gmem = mad_wide(first_row, row_bytes, from_gmem);
    const int left = count - 1 - static_cast<int>(threadIdx.x) / ACROSS;
#pragma unroll
    for (int n = 0; n < ROWS / DOWN; ++n)
#pragma unroll
      for (int c = 0; c < COLS * 2; c += ACROSS * 16)
        cp_async_16(to_smem + offset + n * DOWN * Layout<COLS>::PITCH + c,
                    mad_wide(min(n * DOWN, left), row_bytes, tile_gmem) + c);
  }

  // Rows first_row.. of the source, to the buffer `offset` bytes after the first.
  __device__ __forceinline__ void operator()(unsigned offset, int first_row, int begin, int end,
                                             int columns) const {
    const char* tile_gmem = mad_wide(first_row, row_bytes, from_gmem);
    const unsigned tile_smem = to_smem + offset;
    if (begin <= 0 && end >= ROWS && columns == COLS) {
#pragma unroll
      for (int n = 0; n < ROWS / DOWN; ++n)
#pragma unroll
        for (int c = 0; c < COLS * 2; c += ACROSS * 16)
          cp_async_16(tile_smem + n * DOWN * Layout<COLS>::PITCH + c,
                      mad_wide(n * DOWN, row_bytes, tile_gmem) + c);
    } else {
      const int row = threadIdx.x / ACROSS, column = threadIdx.x % ACROSS * 8;
#pragma unroll
      for (int n = 0; n < ROWS / DOWN; ++n)
#pragma unroll
        for (int c = 0; c < COLS * 2; c += ACROSS * 16) {
          const int r = row + n * DOWN;
          const bool inside = r >= begin && r < end;
          const int bytes = inside ? max(min(columns * 2 - column * 2 - c, 16), 0) : 0;
          cp_async_part(tile_smem + n * DOWN * Layout<COLS>::PITCH + c,
                        mad_wide(n * DOWN, row_bytes, tile_gmem) + c, bytes);
        }
    }
  }
};
