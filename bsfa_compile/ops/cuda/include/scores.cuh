// Float scores of 64 query rows as wgmma leaves them: their maxima, and which rows have a say.
#include "numeric.cuh"
#include "spans.cuh"

struct Scale {
  float scale, softcap;  // of q.k; softcap only with SOFTCAP
};

// The score for q.k = x: natural-log units with SOFTCAP, else unscaled. -inf, where the mask hides
// everything, stays.
DEVICE float capped(const Scale& p, float x) {
#if SOFTCAP
  return x == NEG_INF ? x : p.softcap * tanh_exp(x * p.scale / p.softcap);
#else
  return x;
#endif
}

// This thread's two row maxima over its 16 columns of tile TILE; NaN if there is one.
template <int R, int TILE> DEVICE void tile_max(const float (&s)[R], float& a, float& b) {
  a = max_nan(s[TILE * 32], s[TILE * 32 + 1]);
  b = max_nan(s[TILE * 32 + 2], s[TILE * 32 + 3]);
#pragma unroll
  for (int i = 1; i < 8; i++) {
    a = max_nan(a, max_nan(s[TILE * 32 + i * 4], s[TILE * 32 + i * 4 + 1]));
    b = max_nan(b, max_nan(s[TILE * 32 + i * 4 + 2], s[TILE * 32 + i * 4 + 3]));
  }
}

// Whether the row at absolute position `position` has a say (gate.row_votes), and is in the call.
DEVICE bool votes(const Shape& shape, const Span& span, int batch, int position) {
  bool has = position >= span.first && position <= span.last;
  if (PADDED && CAUSAL && has && position < shape.k_len)
    has = pad_bits(shape, batch, position / BLOCK_K) >> position % BLOCK_K & 1;
  return has;
}
