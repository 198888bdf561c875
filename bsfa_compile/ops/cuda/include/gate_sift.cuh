// The rules on int8 scores that are not the last word: which tiles pass for certain, which may.
#include "gate_rows.cuh"
#include "undecided.cuh"
#include "wgmma.cuh"

// What is said of a block's tiles: a bit each where a row is open, RAISE higher where one may raise
// its running maximum, CERTAIN higher where one passes.
#define RAISE 8
#define CERTAIN 16

#if !RELATIVE
// Sifts one block of 64 rows x 2 tiles. Says, alike in all lanes, where several of the warp's
// rows are open, and where some row passes. A tile with one that is open goes to `entries`. `place`:
// code of the warp's first row in the first tile. Every branch is a vote: one that the compiler
// takes for divergent costs the loop its uniform registers.
DEVICE u32 sift(const Scale& p, const int (&x)[2][2], const Row (&row)[2], const Meta& meta,
                int lane, u32 line, u32 place, Entries& entries) {
  float most[2][2];
  reach_of(p, x, row, meta, most);
  u32 passing = 0, several = 0;
#pragma unroll
  for (int t = 0; t < 2; t++) {
    if (!__any_sync(FULL_WARP, !(most[t][0] < row[0].bound()) || !(most[t][1] < row[1].bound())))
      continue;
    const float scale_k = meta.scale_of(t), norm_k = meta.norm_of(t);
    bool passes = false, open[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float bound = row[r].bound(), margin = margin_of(row[r], scale_k, norm_k);
      const bool does = reach_of(p, row[r], scale_k, -margin, x[t][r]) >= bound;
      passes |= does;
      open[r] = !does && x[t][r] > HIDDEN && !(most[t][r] < bound);
    }
    if (__any_sync(FULL_WARP, passes)) {
      passing |= 1u << t;
      continue;
    }
    const u32 first = __ballot_sync(FULL_WARP, open[0]), second = __ballot_sync(FULL_WARP, open[1]);
    const int number = __popc(first) + __popc(second);
    // Lane l has rows l / 4 and l / 4 + 8 of the warp's, and c = l % 4: row << 2 | c is l, l + 32.
    const u32 holder = first ? __ffs(first) - 1 : __ffs(second) + 31;
    entries.add(number == 1, line, place + (t << TILE_SHIFT) + holder, lane);
    several |= (u32)(number > 1) << t;
  }
  return several | passing << CERTAIN;
}
#elif EXACT
#if EXACT_SINKS
// Raises a row's running maximum to a score in 16 bits, the row's largest of a tile.
DEVICE void raise_exactly(const Scale& p, Row& row, float top, float mean, float per_unit) {
#if SOFTCAP
  const float value = capped(p, top);
#else
  const float value = (top - mean) * per_unit;
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

// Sifts one block of 64 rows x 2 tiles in visiting order, the last first. A row's running
// maximum is known to lie in [m, high]. A tile that no row may raise it in, and no row is open in,
// needs no second look, also for what follows. Says it for this lane's rows, as decide() does.
DEVICE u32 sift(const Scale& p, int (&x)[2][2], Row (&row)[2], const Meta& meta) {
  u32 bits = 0;
  float most[2][2];
  reach_of(p, x, row, meta, most);
  if (!__any_sync(FULL_WARP, may_raise(most, row))) {
#pragma unroll
    for (int t = 0; t < 2; t++) {
      const float scale_k = meta.scale_of(t), norm_k = meta.norm_of(t);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float margin = margin_of(row[r], scale_k, norm_k);
        const float least = reach_of(p, row[r], scale_k, -margin, x[t][r]);
        const bool seen = x[t][r] > HIDDEN;
        if (seen && !(most[t][r] < row[r].m + row[r].t)) bits |= 1u << t;
        if (seen && least >= row[r].high + row[r].t) bits |= 1u << (t + CERTAIN);
      }
    }
    return bits;
  }
  pin(x);  // nothing computed above is worth a register below
  share_maxima(x);
#pragma unroll
  for (int t = 1; t >= 0; t--) {
    const float scale_k = meta.scale_of(t), norm_k = meta.norm_of(t);
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
