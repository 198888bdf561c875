// The rules on int8 scores that are not the last word: which tiles pass for certain, which may.
#include "gate_rows.cuh"
#include "undecided.cuh"

// What is said of a block's tiles: a bit each where a row is open, RAISE higher where one may raise
// its running maximum, CERTAIN higher where one passes.
#define RAISE 8
#define CERTAIN 16

#if !RELATIVE
// Sifts one block of 64 rows x TILES tiles. Says for this lane's rows that some pass, for the
// warp's that several are open. A tile with one that is open goes to `entries`. `place`: code of
// the warp's first row in the first tile.
template <int TILES>
DEVICE u32 sift(const Scale& p, const int (&x)[TILES][2], const Row (&row)[2], u32 meta, bool all,
                int lane, u32 line, u32 place, Entries& entries) {
  if (!__any_sync(FULL_WARP, all || SOFTCAP || may_pass(p, x, row, meta))) return 0;
  u32 passing = 0, open[2] = {};
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    const float scale_k = load_shared_float(meta + t * 4);
    const float norm_k = load_shared_float(meta + 16 + t * 4);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float margin = margin_of(row[r], scale_k, norm_k), bound = row[r].m + row[r].t;
      const bool may = x[t][r] > HIDDEN &&
                       !(reach_of(p, row[r], scale_k, margin, x[t][r]) < bound);
      const bool does = may && reach_of(p, row[r], scale_k, -margin, x[t][r]) >= bound;
      passing |= (u32)does << t;
      open[r] |= (u32)(may && !does) << t;
    }
  }
  if (!__any_sync(FULL_WARP, open[0] | open[1])) return passing << CERTAIN;
  passing = __reduce_or_sync(FULL_WARP, passing);
  u32 several = 0;
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    const u32 first = __ballot_sync(FULL_WARP, open[0] >> t & 1);
    const u32 second = __ballot_sync(FULL_WARP, open[1] >> t & 1);
    const int number = (passing >> t & 1) ? 0 : __popc(first) + __popc(second);
    // Lane l has rows l / 4 and l / 4 + 8 of the warp's, and c = l % 4: row << 2 | c is l, l + 32.
    const u32 holder = first ? __ffs(first) - 1 : __ffs(second) + 31;
    entries.add(number == 1, line, place + (t << TILE_SHIFT) + holder, lane);
    if (number > 1) several |= 1u << t;
  }
  return several | passing << CERTAIN;
}
#elif EXACT
#if EXACT_SINKS
// Raises a row's running maximum to a score in 16 bits, the row's largest of a tile.
DEVICE void raise_exactly(const Scale& p, Row& row, float top) {
#if SOFTCAP
  const float value = capped(p, top);
#else
  const float value = (top - row.mean) * row.per_unit;
#endif
  row.m = fmaxf(row.m, value);
  row.high = max_nan(row.high, value);
}
#endif

// What dot product x says of a row's score; raises the running maximum by it.
DEVICE float2 raise_within(const Scale& p, Row& row, float scale_k, float norm_k, int x) {
  const float margin = margin_of(row, scale_k, norm_k);
  const float least = reach_of(p, row, scale_k, -margin, x);
  const float most = reach_of(p, row, scale_k, margin, x);
  row.m = fmaxf(row.m, x > HIDDEN ? least : NEG_INF);
  row.high = max_nan(row.high, x > HIDDEN ? most : NEG_INF);
  return make_float2(least, most);
}

// Sifts one block of 64 rows x TILES tiles in visiting order, the last first. A row's running
// maximum is known to lie in [m, high]. A tile that no row may raise it in, and no row is open in,
// needs no second look, also for what follows. Says it for this lane's rows.
template <int TILES>
DEVICE u32 sift(const Scale& p, int (&x)[TILES][2], Row (&row)[2], u32 meta, bool all) {
  if (!__any_sync(FULL_WARP, all || SOFTCAP || may_pass(p, x, row, meta))) return 0;
  share_maxima(x);
  u32 bits = 0;
#pragma unroll
  for (int t = TILES - 1; t >= 0; t--) {
    const float scale_k = load_shared_float(meta + t * 4);
    const float norm_k = load_shared_float(meta + 16 + t * 4);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const Row before = row[r];
      const float2 score = raise_within(p, row[r], scale_k, norm_k, x[t][r]);
      const bool seen = x[t][r] > HIDDEN, passes = seen && score.x >= before.high + before.t;
      if (seen && !(score.y < before.m)) bits |= 1u << (t + RAISE);
      if (seen && !(score.y < before.m + before.t) && !passes) bits |= 1u << t;
      if (passes) bits |= 1u << (t + CERTAIN);
    }
  }
  return bits;
}
#endif
