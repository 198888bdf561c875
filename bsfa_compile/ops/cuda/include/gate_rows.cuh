// The rows of the int8 gate: what a thread knows of its query rows, how they are quantised, and the
// keep rule on a block of dot products. Macros of gate.cu.
#include "base.cuh"
#include "halves.cuh"
#include "hide.cuh"
#include "numeric.cuh"
#include "scores.cuh"
#include "spans.cuh"

// The relative gate with resolve.cu behind it knows a row's maximum over the sink tiles in 16 bits,
// if there are registers for it.
#define EXACT_SINKS (EXACT && RELATIVE && HEAD_DIM <= (SOFTCAP ? 128 : 192))
#define K_STEPS ((HEAD_DIM + 31) / 32)  // int8 wgmma steps along the head dim
#define KEY_NORM_FACTOR 1.1547005383792515f  // 4 standard deviations of rounding: 4 / sqrt(12)

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
  DEVICE float bound() const { return m + (RELATIVE && t > 0.f ? 0.f : t); }
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

// What rounding may have taken from the row's score in a tile. The int8 rule: four standard
// deviations of each of the two errors, added up. EXACT: five of both together, for which
// max(x, y) + (sqrt(2) - 1) min(x, y) is never too little.
DEVICE float margin_of(const Row& r, float scale_k, float norm_k) {
#if EXACT
  const float of_k = scale_k * r.a;
  return fmaf(0.51777f, fminf(of_k, norm_k), 1.25f * fmaxf(of_k, norm_k));
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

// x / 127, correctly rounded as the reference's is (a Newton step on the product with the rounded
// reciprocal). The division operator is a call, which would keep loop state out of uniform
// registers.
DEVICE float divide_by_127(float x) {
  const float guess = x * (1.f / 127.f);
  return fmaf(fmaf(-guess, 127.f, x), 1.f / 127.f, guess);
}

// Reads rows `row` and `row + 8` of Q and rounds them into the A fragments of K_STEPS wgmmas.
DEVICE void quantise(const Scale& p, u32 q_smem, int row, int lane, const float* mean_gmem,
                     u32 (&a)[K_STEPS * 4], Row (&out)[2], float threshold) {
  uint2 raw[K_STEPS * 4];
  const int g = lane >> 2, pair = lane & 3;
#pragma unroll
  for (int i = 0; i < K_STEPS * 4; i++) {
    const int step = i / 4, half = i / 2 % 2, r = i % 2;  // fragment order: row, row + 8, k + 16
    const int chunk = (step & 1) * 4 + half * 2 + (pair >> 1);
    raw[i] = load_shared_pair(q_smem + (step >> 1) * (BLOCK_Q * 128) + (row + r * 8) * 128 +
                              ((chunk ^ g) << 4) + (pair & 1) * 8);
  }
  float peak[2] = {}, square[2] = {}, with_mean[2] = {};
#pragma unroll
  for (int i = 0; i < K_STEPS * 4; i++) {
    const int r = i % 2;
    float x[4];
    unpack_16bit(raw[i].x, x[0], x[1]);
    unpack_16bit(raw[i].y, x[2], x[3]);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      peak[r] = fmaxf(peak[r], fabsf(x[e]));
      square[r] = fmaf(x[e], x[e], square[r]);
    }
    if (!RELATIVE || SOFTCAP || EXACT_SINKS) {
      const float4 mean = __ldg((const float4*)(mean_gmem + i / 4 * 32 + i / 2 % 2 * 16) + pair);
      with_mean[r] += x[0] * mean.x + x[1] * mean.y + x[2] * mean.z + x[3] * mean.w;
    }
  }
  float sq[2], inverse[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    peak[r] = quad_max(peak[r]);
    square[r] = quad_sum(square[r]);
    sq[r] = fmaxf(divide_by_127(peak[r]), 1.17549435e-38f);
    inverse[r] = reciprocal(sq[r]);
    // Not a number or infinite somewhere: NaN in t keeps every tile.
    const bool finite = square[r] < __int_as_float(0x7f800000);
    const float unit = finite ? sq[r] * p.scale : __int_as_float(0x7fffffff);
    out[r].a = sqrt_approx(square[r]) * KEY_NORM_FACTOR * inverse[r];
    out[r].m = RELATIVE ? NEG_INF : -quad_sum(with_mean[r]) * inverse[r];
    out[r].t = threshold * reciprocal(unit);
#if EXACT && RELATIVE
    out[r].high = NEG_INF;
#endif
#if EXACT_SINKS
    out[r].mean = quad_sum(with_mean[r]);
    out[r].per_unit = inverse[r];
#endif
#if SOFTCAP
    out[r].unit = unit;
    out[r].shift = quad_sum(with_mean[r]) * inverse[r];
    out[r].m = RELATIVE ? NEG_INF : 0.f;
    out[r].t = finite ? threshold : unit;
#endif
  }
#pragma unroll
  for (int i = 0; i < K_STEPS * 4; i++) {
    // Unpacked anew: kept as floats from above, they would not fit the registers.
    asm volatile("" : "+r"(raw[i].x), "+r"(raw[i].y));
    float x[4];
    unpack_16bit(raw[i].x, x[0], x[1]);
    unpack_16bit(raw[i].y, x[2], x[3]);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      // One Newton step makes the product the correctly rounded quotient, as the reference's is;
      // adding 1.5 2^23 rounds it to a whole number, which then stands in the low bits.
      const float guess = x[e] * inverse[i % 2];
      const float quotient = fmaf(fmaf(-guess, sq[i % 2], x[e]), inverse[i % 2], guess);
      x[e] = quotient + 12582912.f;
    }
    const u32 low = __byte_perm(__float_as_uint(x[0]), __float_as_uint(x[1]), 0x0040);
    const u32 high = __byte_perm(__float_as_uint(x[2]), __float_as_uint(x[3]), 0x0040);
    a[i] = __byte_perm(low, high, 0x5410);
  }
}

// Raises a row's running maximum to the largest dot product of a tile, if the row sees any of it.
DEVICE void raise(const Scale& p, Row& row, float scale_k, int top) {
  if (top > HIDDEN) row.m = fmaxf(row.m, score_of(p, row, scale_k, top));
}

// Whether a row of this lane may pass somewhere in a block of 64 rows x TILES tiles. x: the thread's
// row maxima in each tile; meta: the tiles' scales and norms in shared memory (quantise.cu).
template <int TILES>
DEVICE bool may_pass(const Scale& p, const int (&x)[TILES][2], const Row (&row)[2], u32 meta) {
  float reach[2] = {NEG_INF, NEG_INF};
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    const float scale_k = load_shared_float(meta + t * 4);
    const float norm_k = load_shared_float(meta + 16 + t * 4);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float margin = margin_of(row[r], scale_k, norm_k);
      reach[r] = max_nan(reach[r], reach_of(p, row[r], scale_k, margin, x[t][r]));
    }
  }
  return !(reach[0] < row[0].bound()) || !(reach[1] < row[1].bound());
}

// Gives the four lanes of a quad the same row maxima.
template <int TILES> DEVICE void share_maxima(int (&x)[TILES][2]) {
#pragma unroll
  for (int lanes = 1; lanes <= 2; lanes++)
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int r = 0; r < 2; r++)
        x[t][r] = max(x[t][r], __shfl_xor_sync(FULL_WARP, x[t][r], lanes));
}

// Decides the tiles of one block in visiting order, the last first. Returns the tiles that pass for
// this lane's rows. all: skip the vote on the whole block.
template <int TILES>
DEVICE u32 decide(const Scale& p, int (&x)[TILES][2], Row (&row)[2], u32 meta, bool all) {
  if (!__any_sync(FULL_WARP, all || SOFTCAP || may_pass(p, x, row, meta))) return 0;
  share_maxima(x);
  u32 bits = 0;
#pragma unroll
  for (int t = TILES - 1; t >= 0; t--) {
    const float scale_k = load_shared_float(meta + t * 4);
    const float norm_k = load_shared_float(meta + 16 + t * 4);
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
