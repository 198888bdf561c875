// Scores that the mask hides, in a gate's accumulators. Macros CAUSAL, WINDOW, PADDED.
#include "numeric.cuh"
#include "spans.cuh"

#define HIDDEN (-(1 << 30))  // an int8 dot product that the mask hides; a float one is -inf

DEVICE void set_hidden(int& x) { x = HIDDEN; }
DEVICE void set_hidden(float& x) { x = NEG_INF; }

// s: a thread's scores of 64 rows; hides in the `at`-th tile of them what its rows do not see of
// `tile`. `position`: of the thread's first row (the second: + 8).
template <class T, int R>
DEVICE void hide_tile(T (&s)[R], int at, const Shape& shape, int batch, int tile, int position,
                      int lane) {
  const int key = tile * BLOCK_K + (lane & 3) * 2;
  const bool inside = tile * BLOCK_K < shape.k_len;
  const u64 keys = PADDED && inside ? pad_bits(shape, batch, tile) >> (lane & 3) * 2 : ~0ull;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int hi = key_high_of(shape, position + 8 * r) - key;
    const int lo = key_low_of(shape, position + 8 * r) - key;
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const int c = i / 2 * 8 + (i & 1);
      const bool seen = c < hi && (!WINDOW || c >= lo) && (!PADDED || (keys >> c & 1));
      if (!seen) set_hidden(s[at * 32 + i / 2 * 4 + r * 2 + (i & 1)]);
    }
  }
}

// The same in all tiles, `tile` and the next ones.
template <class T, int R>
DEVICE void hide(T (&s)[R], const Shape& shape, int batch, int tile, int position, int lane) {
#pragma unroll
  for (int t = 0; t < R / 32; t++) hide_tile(s, t, shape, batch, tile + t, position, lane);
}
