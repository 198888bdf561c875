// The gate in int8: decides from Q.K alone which tiles attention will visit, one bit a tile.
//
// A work item is two units, each one q block (128 rows) of one query head, of the same kv head: a
// consumer warpgroup owns a unit, quantises its Q from shared memory into registers once, and runs
// both 64-row halves over every slot of K that the loader brings (SLOT_KEYS keys, both warpgroups
// read the same slot). Scores are integers; a row's are worth sq * scale each, so everything is
// compared in that unit: with x the row's largest dot product in tile j,
//     keep  <=>  not (sk_j x + margin < m + T / (sq scale)),  margin = sk_j a + kn_j
// where a and kn_j carry the rounding error of reference.int8_scores, and m is the row's running
// maximum (relative) or minus its q.mean(K) (absolute), which centring K took away.
// Since margin >= 0 and T <= 0, a row that does not pass changes neither mask nor m. So a block of
// 64 rows x SLOT_KEYS keys needs one vote of all lanes, and only where some row passes the shuffles
// and the tile by tile test. (T > 0 is voted on as if it were 0.)
//
// EXACT: the mask gains what passes for certain, and resolve.cu decides what may pass. The absolute
// gate lists it row by row, or where there is much of it marks the tile. The relative gate marks
// tiles, also those that may raise a running maximum; it knows the maximum over the sink tiles in
// 16 bits.
//
// Macros: HEAD_DIM, BF16, CAUSAL, WINDOW, PADDED, RELATIVE, SOFTCAP, EXACT.
#include "base.cuh"
#include "spans.cuh"
#include "gate_rows.cuh"
#include "gate_sift.cuh"
#include "mbarrier.cuh"
#include "round_rows.cuh"
#include "tma.cuh"
#include "warps.cuh"
#include "wgmma.cuh"

#define ROW_BYTES (HEAD_DIM <= 64 ? 64 : HEAD_DIM <= 128 ? 128 : 256)  // an int8 row of K
#define SLAB_BYTES (ROW_BYTES < 128 ? ROW_BYTES : 128)  // its part in one swizzled slab
#define K_SLABS (ROW_BYTES / SLAB_BYTES)
// 256 keys a slot need 128 accumulators; 128 keys leave registers for wide heads and rich masks.
#define PLAIN (HEAD_DIM <= 128 && !WINDOW && !PADDED && !SOFTCAP)
#define SLOT_TILES (PLAIN ? 4 : 2)
#define SLOT_KEYS (SLOT_TILES * BLOCK_K)
#define SLOT_BYTES (SLOT_KEYS * ROW_BYTES)
#define GROUP_TILES 4
#define GROUP_META 8
#define CHANNEL_META (2 * ROW_BYTES)
#define META_BYTES (GROUP_META * 4)
#define UNIT_BYTES (Q_SLABS * BLOCK_Q * 128)
#define ACCUMULATORS (SLOT_KEYS / 2)
// A lane of each warpgroup: 504 in all, which is what the kernel starts with; asking for more
// waits forever.
#define LOADER_REGISTERS 56
#define CONSUMER_REGISTERS 224

// Shared memory: barriers, item records, tile metadata of each slot; Q of both units; K slots.
#define SMEM_LIMIT 232448
#define FIT ((SMEM_LIMIT - 1024 - 2 * UNIT_BYTES) / SLOT_BYTES)
#define SLOTS (FIT < 8 ? FIT : 8)
#define K_FULL 0
#define K_EMPTY 64
#define Q_FULL 128
#define Q_EMPTY 136
#define ITEM_FULL 144
#define ITEM_EMPTY 160
#define ITEM 192
#define META 320
#define Q_AT 1024
#define K_AT (Q_AT + 2 * UNIT_BYTES)

struct Params {
  Shape shape;
  Order order;
  const float* thresholds_gmem;  // [H, columns], natural-log units
  const float* meta_gmem;        // [B*Hkv, groups, GROUP_META] (quantise.cu)
  const float* mean_gmem;        // [B*Hkv, CHANNEL_META]: of K, then its spread
  u32* mask_gmem;                // [B, H, rows, words], zero on entry
  Undecided undecided;           // EXACT
  int* counter_gmem;             // zero on entry
  int columns, groups, heads, kv_heads, items;
  Scale scale;
};

struct Unit {
  Span span;
  int row, head, batch;  // mask row
  float threshold;
  bool exists;
  // Nothing to compute: no rows, no keys, or everything is kept.
  DEVICE bool idle() const {
    return !exists || span.tile_hi <= span.tile_lo || threshold == NEG_INF;
  }
};

// Unit `which` of the pair that stands at place.x of kv head place.y (batch rows unrolled).
DEVICE Unit unit_of(const Params& p, int q_start, int2 place, int which) {
  const int per_kv = p.heads / p.kv_heads, index = 2 * place.x + which;
  Unit u;
  u.exists = index < p.shape.rows * per_kv;
  u.row = u.exists ? p.shape.rows - 1 - index / per_kv : -1;
  u.batch = place.y / p.kv_heads;
  u.head = place.y % p.kv_heads * per_kv + index % per_kv;
  u.span = span_of(p.shape, q_start, u.row);
  return u;
}

DEVICE float threshold_of(const Params& p, const Unit& u) {
  if (!u.exists) return NEG_INF;
  return p.thresholds_gmem[u.head * p.columns + min(u.span.block, p.columns - 1)];
}

DEVICE int pairs_of(const Params& p) {
  return (p.shape.rows * (p.heads / p.kv_heads) + 1) / 2;
}

// Queues S = Q.K for 64 rows and the keys from k_smem on; slabs of K are `keys` rows high.
template <int R>
DEVICE void multiply(int (&s)[R], const u32 (&a)[K_STEPS * 4], u32 k_smem, int keys) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < K_STEPS; i++) {
    const u64 b = k_major<SLAB_BYTES>(k_smem, i / 4 * keys * SLAB_BYTES + i % 4 * 32);
    if (i == 0) wgmma_s8<false>(s, a, b);
    else wgmma_s8<true>(s, a + i * 4, b);
  }
  wgmma_commit();
}

#if EXACT_SINKS
// The same for the keys of one tile in 16 bits.
DEVICE void multiply_16bit(float (&s)[32], u32 q_smem, u32 k_smem) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < (HEAD_DIM + 15) / 16; i++) {
    const u64 a = k_major<128>(q_smem, i / 4 * (BLOCK_Q * 128) + i % 4 * 32);
    const u64 b = k_major<128>(k_smem, i / 4 * (BLOCK_K * 128) + i % 4 * 32);
    if (i == 0) wgmma_ss<false>(s, a, b);
    else wgmma_ss<true>(s, a, b);
  }
  wgmma_commit();
}
#endif

// Hands back slots that this warpgroup's unit has no use for.
DEVICE void skip_slots(u32 smem, int lane, int slots, u32& slot, u32& full) {
  for (int n = 0; n < slots; n++) {
    barrier_wait(smem + K_FULL + 8 * slot, full);
    __syncwarp();
    if (lane == 0) barrier_arrive(smem + K_EMPTY + 8 * slot);
    if (++slot == SLOTS) slot = 0, full ^= 1;
  }
}

// The last slot that was multiplied: what its first half's rows keep, and what judging the second
// half's takes.
struct Judged {
  u32 bits, meta, empty;
  int tile;
  bool edge;
};

// What the loader needs to know of an item; kv < 0: there is none left.
struct Item {
  int kv, lo, hi, sink_lo, sink_hi;
};

// Takes the next item, the it-th of this CTA: announces it, has its Q loaded (as the loaded-th).
DEVICE Item take_item(const Params& p, const TensorMap* q_map, u32 smem, int it, int& loaded) {
  const int item = atomicAdd(p.counter_gmem, 1), s = it & 1;
  const u32 record = smem + ITEM + 64 * s;
  barrier_wait(smem + ITEM_EMPTY + 8 * s, (it >> 1 & 1) ^ 1);
  const int2 place = place_of(p.order, pairs_of(p), min(item, p.items - 1));
  Item out = {item < p.items ? place.y : -1, 0, -1, 0, 0};
  int active = 0;  // a bit for each unit that has work
  if (item < p.items) {
#pragma unroll 1
    for (int w = 0; w < 2; w++) {
      Unit unit = unit_of(p, start_of(p.shape), place, w);
      unit.threshold = threshold_of(p, unit);
      store_shared(record + 20, unit.batch);
      store_shared(record + 32 + 12 * w, unit.row);
      store_shared(record + 36 + 12 * w, unit.head);
      store_shared(record + 40 + 12 * w, __float_as_uint(unit.threshold));
      store_shared(record + 56 + 4 * w, unit.span.row0);
      if (unit.idle()) continue;
      active |= 1 << w;
      const int low = unit.span.tile_lo, high = unit.span.tile_hi;
      const int first = bounds_of(p.shape, unit.batch).x;
      const int from = max(low, first), to = min(high, first + p.shape.sink_tiles);
      const bool alone = out.hi < out.lo, no_sink = out.sink_hi <= out.sink_lo;
      out.lo = alone ? low / SLOT_TILES : min(out.lo, low / SLOT_TILES);
      out.hi = alone ? (high - 1) / SLOT_TILES : max(out.hi, (high - 1) / SLOT_TILES);
      if (RELATIVE && from < to) {
        out.sink_lo = no_sink ? from : min(out.sink_lo, from);
        out.sink_hi = no_sink ? to : max(out.sink_hi, to);
      }
    }
  }
  store_shared(record, out.kv);
  store_shared(record + 4, out.lo);
  store_shared(record + 8, out.hi);
  store_shared(record + 12, out.sink_lo);
  store_shared(record + 16, out.sink_hi);
  barrier_arrive(smem + ITEM_FULL + 8 * s);
  if (!active) return out;

  barrier_wait(smem + Q_EMPTY, (loaded & 1) ^ 1);
  loaded++;
  barrier_expect(smem + Q_FULL, __popc(active) * UNIT_BYTES);
#pragma unroll 1
  for (int w = 0; w < 2; w++) {
    if (!(active >> w & 1)) continue;
    const int row0 = load_shared(record + 56 + 4 * w), head = load_shared(record + 36 + 12 * w);
    const int batch = load_shared(record + 20);
    for (int d = 0; d < Q_SLABS; d++)
      tma_load(smem + Q_AT + w * UNIT_BYTES + d * BLOCK_Q * 128, q_map, smem + Q_FULL, d * 64,
               row0, head, batch);
  }
  return out;
}

DEVICE void load_items(const Params& p, const TensorMap* q_map, const TensorMap* k_map,
                       const TensorMap* k_tile_map, u32 smem) {
  u32 slot = 0, empty = 1;
  Item item = {0, 0, -1, 0, 0};  // nothing to do before the first
  for (int it = 0, loaded = 0; item.kv >= 0; it++) {
    const float* meta_gmem = p.meta_gmem + (i64)item.kv * p.groups * GROUP_META;
    const int sinks = item.sink_hi - item.sink_lo, steps = sinks + item.hi - item.lo + 1;
    Item upcoming;
    // The running maximum wants the sink tiles first, then from the last visible tile downwards.
    for (int n = 0; n <= steps; n++) {
      // Once the slots are full: Q of the next item is there when this one ends.
      if (n == min(steps, SLOTS)) upcoming = take_item(p, q_map, smem, it, loaded);
      if (n == steps) break;
      const bool sink = n < sinks;
      const int tile = sink ? item.sink_lo + n : (item.hi - (n - sinks)) * SLOT_TILES;
      const u32 full = smem + K_FULL + 8 * slot, to = smem + K_AT + slot * SLOT_BYTES;
      barrier_wait(smem + K_EMPTY + 8 * slot, empty);
      const bool in_16_bits = EXACT_SINKS && sink;
      barrier_expect(full, (in_16_bits ? UNIT_BYTES / 2 : sink ? BLOCK_K * ROW_BYTES : SLOT_BYTES) +
                               META_BYTES);
      bulk_load(smem + META + 64 * slot, meta_gmem + tile / GROUP_TILES * GROUP_META, META_BYTES,
                full);
      if (in_16_bits) {
        for (int d = 0; d < Q_SLABS; d++)
          tma_load(to + d * BLOCK_K * 128, k_tile_map, full, d * 64, tile * BLOCK_K,
                   item.kv % p.kv_heads, item.kv / p.kv_heads);
      } else {
#pragma unroll
        for (int d = 0; d < K_SLABS; d++)
          tma_load(to + d * (sink ? BLOCK_K : SLOT_KEYS) * SLAB_BYTES, sink ? k_tile_map : k_map,
                   full, d * SLAB_BYTES, tile * BLOCK_K, item.kv, 0);
      }
      if (++slot == SLOTS) slot = 0, empty ^= 1;
    }
    item = upcoming;
  }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    gate(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
         const __grid_constant__ TensorMap k_tile_map, const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 dynamic_smem[];
  const u32 smem = shared_address(dynamic_smem);
  const int warpgroup = uniform(threadIdx.x >> 7), lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) {
      barrier_init(smem + K_FULL + 8 * i, 1);
      barrier_init(smem + K_EMPTY + 8 * i, 8);
    }
    barrier_init(smem + Q_FULL, 1);
    barrier_init(smem + Q_EMPTY, 8);
    for (int i = 0; i < 2; i++) {
      barrier_init(smem + ITEM_FULL + 8 * i, 1);
      barrier_init(smem + ITEM_EMPTY + 8 * i, 256);
    }
    barrier_init_done();
  }
  __syncthreads();
  allow_next_kernel();
  wait_for_previous_kernel();
  if (warpgroup == 0) {
    registers_down<LOADER_REGISTERS>();
    if (threadIdx.x == 0) load_items(p, &q_map, &k_map, &k_tile_map, smem);
    return;
  }
  registers_up<CONSUMER_REGISTERS>();
  const int which = warpgroup - 1, warp = uniform(threadIdx.x >> 5 & 3);
  const int q_start = start_of(p.shape);
  u32 slot = 0, full = 0;
  Entries entries = {};
  for (int it = 0, loaded = 0;; it++) {
    barrier_wait(smem + ITEM_FULL + 8 * (it & 1), it >> 1 & 1);
    const u32 record = smem + ITEM + 64 * (it & 1);
    auto field = [&](u32 offset) { return uniform(load_shared(record + offset)); };
    const int kv = field(0), lo = field(4), hi = field(8), sink_lo = field(12);
    const int sinks = field(16) - sink_lo;
    Unit unit;
    unit.batch = field(20);
    unit.row = field(32 + 12 * which);
    unit.head = field(36 + 12 * which);
    unit.threshold = __uint_as_float(field(40 + 12 * which));
    unit.exists = unit.row >= 0;
    barrier_arrive(smem + ITEM_EMPTY + 8 * (it & 1));
    if (kv < 0) {
#if EXACT && !RELATIVE
      entries.flush(p.undecided, p.shape.words, lane);
#endif
      break;
    }
    unit.span = span_of(p.shape, q_start, unit.row);
    const Span& span = unit.span;
    const u32 line = (unit.batch * p.heads + unit.head) * p.shape.rows + unit.row;
    u32* mask = p.mask_gmem + (i64)line * p.shape.words;
    // Keeps all it sees. The trip count is every warp's: a loop that the compiler takes for divergent
    // would keep slot, descriptors and bounds out of uniform registers, also in the main loop.
    if (unit.exists && unit.threshold == NEG_INF)
      for (int group = span.tile_lo / 128; group * 128 < span.tile_hi; group++) {
        const int w = group * 4 + warp;
        const u32 seen = __ballot_sync(FULL_WARP, visible(p.shape, span, unit.batch, w * 32 + lane));
        if (lane == 0 && seen) mask[w] = seen;
      }
    if (hi < lo) continue;

    const bool idle = unit.idle();
    u32 a[2][K_STEPS * 4];
    Row row[2][2];
#if EXACT_SINKS
    float own_mean = 0.f, own_unit = 0.f;  // of the quad's four rows, one a lane, to save registers
#endif
    const int row0 = warp * 16 + (lane >> 2);
    barrier_wait(smem + Q_FULL, loaded++ & 1);
    if (!idle) {
#pragma unroll
      for (int f = 0; f < 2; f++) {
        const u32 q_smem = smem + Q_AT + which * UNIT_BYTES;
        const float* mean = p.mean_gmem + (i64)kv * CHANNEL_META;
        quantise(p.scale, q_smem, f * 64 + row0, lane, mean, mean + ROW_BYTES, unit.threshold, a[f],
                 row[f]);
#pragma unroll
        for (int r = 0; r < 2; r++) {
          // m = +inf loses every comparison; as does a finite t then.
          if (!votes(p.shape, span, unit.batch, span.low + f * 64 + row0 + r * 8))
            row[f][r].silence();
#if EXACT_SINKS
          if ((lane & 3) == f * 2 + r) own_mean = row[f][r].mean, own_unit = row[f][r].per_unit;
#endif
        }
      }
    }
    auto release_q = [&]() {
      __syncwarp();
      if (lane == 0) barrier_arrive(smem + Q_EMPTY);
    };
    if (!EXACT_SINKS) release_q();

    const int2 bounds = bounds_of(p.shape, unit.batch);
    const int top = (span.tile_hi - 1) / SLOT_TILES, bottom = span.tile_lo / SLOT_TILES;
    // Slots bring the sink tiles one by one (n < sinks), then groups of tiles downwards.
#pragma unroll 1
    for (int n = 0; n < sinks; n++) {
      const u32 k_smem = smem + K_AT + slot * SLOT_BYTES, meta = smem + META + 64 * slot;
      barrier_wait(smem + K_FULL + 8 * slot, full);
      if (RELATIVE && !idle) {
        const u32 scales = meta + (sink_lo + n) % GROUP_TILES * 4;
        const float scale_k = load_shared_float(scales), norm_k = load_shared_float(scales + 16);
#if EXACT_SINKS
        float s[2][32], x[2];
#pragma unroll
        for (int f = 0; f < 2; f++)
          multiply_16bit(s[f], smem + Q_AT + which * UNIT_BYTES + f * 64 * 128, k_smem);
#else
        int s[2][32], x[2];
#pragma unroll
        for (int f = 0; f < 2; f++) multiply(s[f], a[f], k_smem, BLOCK_K);
#endif
#pragma unroll
        for (int f = 0; f < 2; f++) {
          if (f == 0) wgmma_wait<1>();
          else wgmma_wait<0>();
          pin(s[f]);
          hide(s[f], p.shape, unit.batch, sink_lo + n, span.low + f * 64 + row0, lane);
          tile_max<32, 0>(s[f], x[0], x[1]);
#pragma unroll
          for (int r = 0; r < 2; r++) {
#if EXACT_SINKS
            const int holder = (lane & ~3) + f * 2 + r;
            raise_exactly(p.scale, row[f][r], quad_max(x[r]),
                          __shfl_sync(FULL_WARP, own_mean, holder),
                          __shfl_sync(FULL_WARP, own_unit, holder));
#else
            x[r] = max(x[r], __shfl_xor_sync(FULL_WARP, x[r], 1));
            x[r] = max(x[r], __shfl_xor_sync(FULL_WARP, x[r], 2));
#if EXACT && RELATIVE
            raise_within(p.scale, row[f][r], scale_k, norm_k, x[r]);
#else
            raise(p.scale, row[f][r], scale_k, x[r]);
#endif
#endif
          }
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(smem + K_EMPTY + 8 * slot);
      if (++slot == SLOTS) slot = 0, full ^= 1;
    }
    if (EXACT_SINKS) release_q();
    const int first = idle ? lo - 1 : top, last = idle ? lo : bottom;
    skip_slots(smem, lane, hi - first, slot, full);
    // A product's maxima are judged while the next product is under way.
    int x[SLOT_TILES][2];
    Judged judged = {};
    u32 word = 0, certain = 0, raising = 0;
    auto judge = [&](int f, int tile, u32 meta, bool edge) {
#if EXACT && RELATIVE
      return sift(p.scale, x, row[f], meta, edge);
#elif EXACT
      const u32 place = tile << TILE_SHIFT | f << 8 | warp << 6;
      return sift(p.scale, x, row[f], meta, lane, line, place, entries);
#else
      return decide(p.scale, x, row[f], meta, edge);
#endif
    };
    auto finish = [&]() {
      judged.bits |= judge(1, judged.tile, judged.meta, judged.edge);
#if EXACT && !RELATIVE
      if (__any_sync(FULL_WARP, entries.count > 32 - 2 * SLOT_TILES))
        entries.flush(p.undecided, p.shape.words, lane);
#endif
      __syncwarp();
      if (lane == 0) barrier_arrive(judged.empty);
    };
    auto write = [&]() {
#if EXACT
      certain |= judged.bits >> CERTAIN << judged.tile % 32;
      raising |= (judged.bits >> RAISE & (1u << SLOT_TILES) - 1) << judged.tile % 32;
      judged.bits &= (1u << SLOT_TILES) - 1;
#endif
      word |= judged.bits << judged.tile % 32;
      if (judged.tile % 32 && judged.tile / SLOT_TILES != last) return;
      const int j = judged.tile / 32 * 32 + lane;
      const bool seen = visible(p.shape, span, unit.batch, j);
      const u32 visibles = __ballot_sync(FULL_WARP, seen);
      const u32 always = __ballot_sync(FULL_WARP, seen && always_kept(p.shape, span, bounds, j));
#if EXACT
      const i64 at = (i64)line * p.shape.words + judged.tile / 32;
      certain = __reduce_or_sync(FULL_WARP, certain);
      word = __reduce_or_sync(FULL_WARP, word) & ~certain;
      if (lane == 0 && word) atomicOr(p.undecided.open_gmem + at, word);
      if (RELATIVE) {
        raising = __reduce_or_sync(FULL_WARP, raising);
        if (lane == 0 && raising) atomicOr(p.undecided.raise_gmem + at, raising);
      }
      word = certain;
      certain = raising = 0;
#endif
      word = (__reduce_or_sync(FULL_WARP, word) & visibles) | always;
      if (lane == 0 && word) atomicOr(mask + judged.tile / 32, word);
      word = 0;
    };
#pragma unroll 1
    for (int group = first; group >= last; group--) {
      const u32 k_smem = smem + K_AT + slot * SLOT_BYTES, empty = smem + K_EMPTY + 8 * slot;
      const int tile = group * SLOT_TILES;
      const u32 meta = smem + META + 64 * slot + tile % GROUP_TILES * 4;
      bool edge = group == top;
      if (WINDOW || PADDED)
#pragma unroll 1
        for (int t = 0; t < SLOT_TILES; t++)
          edge |= tile + t < span.tile_hi && cut(p.shape, span, unit.batch, tile + t);
      barrier_wait(smem + K_FULL + 8 * slot, full);
      if (++slot == SLOTS) slot = 0, full ^= 1;
      int s[ACCUMULATORS];
      auto reduce = [&](int f) {
        wgmma_wait<0>();
        pin(s);
        if (edge) hide(s, p.shape, unit.batch, tile, span.low + f * 64 + row0, lane);
        tile_max<ACCUMULATORS, 0>(s, x[0][0], x[0][1]);
        tile_max<ACCUMULATORS, 1>(s, x[1][0], x[1][1]);
#if PLAIN
        tile_max<ACCUMULATORS, 2>(s, x[2][0], x[2][1]);
        tile_max<ACCUMULATORS, 3>(s, x[3][0], x[3][1]);
#endif
      };
      multiply(s, a[0], k_smem, SLOT_KEYS);
      pin(x);
      if (group < first) finish();
      reduce(0);
      if (group < first) write();
      multiply(s, a[1], k_smem, SLOT_KEYS);
      pin(x);
      judged.bits = judge(0, tile, meta, edge);
      judged.tile = tile;
      judged.meta = meta;
      judged.empty = empty;
      judged.edge = edge;
      reduce(1);
    }
    if (first >= last) {
      finish();
      write();
    }
    skip_slots(smem, lane, last - lo, slot, full);
  }
}
