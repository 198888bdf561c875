// The rows of the int8 gate: what a thread knows of its query rows, and the keep rule on a block of
// dot products. Macros of gate.cu.
#include "base.cuh"
#include "hide.cuh"
#include "numeric.cuh"
#include "scores.cuh"
#include "spans.cuh"

// The relative gate with resolve.cu behind it knows a row's maximum over the sink tiles in 16 bits,
// if there are registers for it.
#define EXACT_SINKS (EXACT && RELATIVE && HEAD_DIM <= (SOFTCAP ? 128 : 192))
#define K_STEPS ((HEAD_DIM + 31) / 32)  // int8 wgmma steps along the head dim
#define Q_SLABS ((HEAD_DIM + 63) / 64)  // of 64 columns in 16 bits

// One query row as a thread sees it; the four lanes of a quad hold the same values.
struct Row {
  float a, t, m;
#if EXACT && RELATIVE
  float high;  // m is at most this
#endif
#if EXACT_SINKS
  float mean, per_unit;  // q.mean(K); what makes a dot product in 16 bits one of these
#endif
  // Below this the row changes nothing.
  DEVICE float bound() const { return m + (RELATIVE ? min_nan(t, 0.f) : t); }
  // A row without a say.
  DEVICE void silence() {
    m = -NEG_INF;
    t = a = 0.f;
#if EXACT && RELATIVE
    high = m;
#endif
  }
#if SOFTCAP
  float unit, shift;  // score = cap tanh((dot + shift) unit / cap), and t, m in natural units
#endif
};

// The row's score for dot product x in a tile of this scale; with the margin, its statistic + m.
DEVICE float score_of(const Scale& p, const Row& r, float scale_k, int x) {
#if SOFTCAP
  return p.softcap * tanh_exp((scale_k * (float)x + r.shift) * r.unit / p.softcap);
#else
  return scale_k * (float)x;
#endif
}
DEVICE float reach_of(const Scale& p, const Row& r, float scale_k, float margin, int x) {
#if SOFTCAP
  return fmaf(margin, r.unit, score_of(p, r, scale_k, x));
#else
  return fmaf(scale_k, (float)x, margin);
#endif
}

// What rounding may have taken from the row's score in a tile. The int8 rule: three standard
// deviations of each of the two errors, added up. EXACT: five of both together, for which
// max(x, y) + (sqrt(2) - 1) min(x, y) is never too little (r.a has its share of the five).
#define WIDER (EXACT ? 5.f / 3.f : 1.f)
DEVICE float margin_of(const Row& r, float scale_k, float norm_k) {
#if EXACT
  const float of_k = scale_k * r.a, of_q = WIDER * norm_k;
  return fmaf(0.414214f, fminf(of_k, of_q), fmaxf(of_k, of_q));
#else
  return fmaf(scale_k, r.a, norm_k);
#endif
}

// This thread's two row maxima over its 16 columns of tile TILE.
template <int R, int TILE> DEVICE void tile_max(const int (&s)[R], int& a, int& b) {
  a = max(s[TILE * 32], s[TILE * 32 + 1]);
  b = max(s[TILE * 32 + 2], s[TILE * 32 + 3]);
#pragma unroll
  for (int i = 1; i < 8; i++) {
    a = __vimax3_s32(a, s[TILE * 32 + i * 4], s[TILE * 32 + i * 4 + 1]);
    b = __vimax3_s32(b, s[TILE * 32 + i * 4 + 2], s[TILE * 32 + i * 4 + 3]);
  }
}

// Raises a row's running maximum to the largest dot product of a tile, if the row sees any of it.
DEVICE void raise(const Scale& p, Row& row, float scale_k, int top) {
  if (top > HIDDEN) row.m = fmaxf(row.m, score_of(p, row, scale_k, top));
}

// What a thread knows of a slot's tiles: where their scales and norms lie (two each), the largest.
struct Meta {
  u32 at;
  float scale, norm;
  DEVICE float scale_of(int tile) const { return load_shared_float(at + tile * 4); }
  DEVICE float norm_of(int tile) const { return load_shared_float(at + 8 + tile * 4); }
};

DEVICE Meta meta_of(u32 at) {
  const float4 m = load_shared_floats(at);
  return {at, fmaxf(m.x, m.y), max_nan(m.z, m.w)};
}

// Whether a row of this lane may pass in a block of 64 rows x 2 tiles, told from the largest scale and
// norm: false is certain. x: the thread's row maxima in each tile.
DEVICE bool may_pass(const Scale& p, const int (&x)[2][2], const Row (&row)[2], const Meta& meta) {
  bool some = false;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int top = __vimax_s32_relu(x[0][r], x[1][r]);
    const float margin = margin_of(row[r], meta.scale, meta.norm);
    some |= !(reach_of(p, row[r], meta.scale, margin, top) < row[r].bound());
  }
  return some;
}

// Each row's score in each tile with the margin.
DEVICE void reach_of(const Scale& p, const int (&x)[2][2], const Row (&row)[2], const Meta& meta,
                     float (&reach)[2][2]) {
#pragma unroll
  for (int t = 0; t < 2; t++) {
    const float scale_k = meta.scale_of(t), norm_k = meta.norm_of(t);
#pragma unroll
    for (int r = 0; r < 2; r++)
      reach[t][r] = reach_of(p, row[r], scale_k, margin_of(row[r], scale_k, norm_k), x[t][r]);
  }
}

// Whether a row of this lane may raise its running maximum, or may pass and yet not (T > 0).
DEVICE bool may_raise(const float (&reach)[2][2], const Row (&row)[2]) {
  bool some = row[0].t > 0.f || row[1].t > 0.f;
#pragma unroll
  for (int t = 0; t < 2; t++)
#pragma unroll
    for (int r = 0; r < 2; r++) some |= !(reach[t][r] <= row[r].m);
  return some;
}

// Gives the four lanes of a quad the same row maxima.
DEVICE void share_maxima(int (&x)[2][2]) {
#pragma unroll
  for (int lanes = 1; lanes <= 2; lanes++)
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
      for (int r = 0; r < 2; r++)
        x[t][r] = max(x[t][r], __shfl_xor_sync(FULL_WARP, x[t][r], lanes));
}

// Decides the tiles of one block in visiting order, the last first. Returns the tiles that pass for
// this lane's rows and columns. Where no row raises its running maximum the order does not matter,
// and a lane needs no other's columns.
DEVICE u32 decide(const Scale& p, int (&x)[2][2], Row (&row)[2], const Meta& meta) {
  u32 bits = 0;
  float reach[2][2];
  reach_of(p, x, row, meta, reach);
  if (!RELATIVE || !__any_sync(FULL_WARP, may_raise(reach, row))) {
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
      for (int r = 0; r < 2; r++)
        if (x[t][r] > HIDDEN && !(reach[t][r] < row[r].m + row[r].t)) bits |= 1u << t;
    return bits;
  }
  share_maxima(x);
#pragma unroll
  for (int t = 1; t >= 0; t--) {
    const float scale_k = meta.scale_of(t), norm_k = meta.norm_of(t);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float margin = margin_of(row[r], scale_k, norm_k);
      const float reach = reach_of(p, row[r], scale_k, margin, x[t][r]);
      if (x[t][r] > HIDDEN && !(reach < row[r].m + row[r].t)) bits |= 1u << t;
      if (RELATIVE) raise(p, row[r], scale_k, x[t][r]);
    }
  }
  return bits;
}
