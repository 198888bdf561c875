// The gate in int8: decides from Q.K alone which tiles attention will visit, one bit a tile.
//
// A work item is UNITS units, three where they fit, each one q block (128 rows) of one query head, of
// the same kv head: a consumer warpgroup owns a unit, quantises its Q from shared memory into
// registers once, and runs both 64-row halves over every slot of K that the loader brings (two tiles;
// all warpgroups read the same slot). A warpgroup has one product under way, and while it takes the maxima of that the
// others' keep the tensor cores busy. Scores are integers; a row's are worth sq * scale each, so
// everything is compared in that unit: with x the row's largest dot product in tile j,
//     keep  <=>  not (sk_j x + margin < m + T / (sq scale)),  margin = sk_j a + kn_j
// where a and kn_j carry the rounding error of reference.int8_scores, and m is the row's running
// maximum (relative) or minus its q.mean(K) (absolute), which centring K took away.
// Since margin >= 0 and T <= 0, a row that does not pass changes neither mask nor m. So a block of
// 64 rows x 2 tiles needs one vote of all lanes, on the larger scale and norm; where a row may pass, a
// second one, tile by tile, on whether some m rises; and only then a quad's lanes exchange maxima.
// (T > 0 is voted on as if it were 0.)
//
// EXACT: the mask gains what passes for certain, and resolve.cu decides what may pass. The absolute
// gate lists it row by row, or where there is much of it marks the tile. The relative gate marks
// tiles, also those that may raise a running maximum; it knows the maximum over the sink tiles in
// 16 bits.
//
// Macros: HEAD_DIM, BF16, CAUSAL, WINDOW, PADDED, RELATIVE, SOFTCAP, EXACT, UNITS.
#include "gate_items.cuh"
#include "gate_sift.cuh"
#include "round_rows.cuh"
#include "warps.cuh"
#include "wgmma.cuh"

#define ACCUMULATORS (SLOT_KEYS / 2)
#define THREADS (128 * (UNITS + 1))
// A lane of each warpgroup: 504 in all, which is what the kernel starts with; asking for more
// waits forever.
#define LOADER_REGISTERS (UNITS == 3 ? 48 : 56)
#define CONSUMER_REGISTERS (UNITS == 3 ? 152 : 224)

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

// The slot multiplied last, of which the second half of the rows is still to be judged.
struct Slot {
  Meta meta;
  u32 empty;  // its barrier
  int tile;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    gate(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
         const __grid_constant__ TensorMap k_tile_map, const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 dynamic_smem[];
  const u32 smem = shared_address(dynamic_smem);
  const int warpgroup = uniform(threadIdx.x >> 7), lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) {
      barrier_init(smem + K_FULL + 8 * i, 1);
      barrier_init(smem + K_EMPTY + 8 * i, 4 * UNITS);
    }
    barrier_init(smem + Q_FULL, 1);
    barrier_init(smem + Q_EMPTY, 4 * UNITS);
    for (int i = 0; i < 2; i++) {
      barrier_init(smem + ITEM_FULL + 8 * i, 1);
      barrier_init(smem + ITEM_EMPTY + 8 * i, 128 * UNITS);
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
    const u32 record = smem + ITEM + ITEM_BYTES * (it & 1);
    auto field = [&](u32 offset) { return uniform(load_shared(record + offset)); };
    const int kv = field(0), lo = field(4), hi = field(8), sink_lo = field(12);
    const int sinks = field(16) - sink_lo;
    Unit unit;
    unit.batch = field(20);
    const u32 own = ITEM_UNIT + 16 * which;
    unit.row = field(own);
    unit.head = field(own + 4);
    unit.threshold = __uint_as_float(field(own + 8));
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
        quantise(p.scale, q_smem, f * 64 + row0, lane, smem + CHANNELS, unit.threshold, a[f],
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
      const u32 k_smem = smem + K_AT + slot * SLOT_BYTES, meta = smem + META + META_BYTES * slot;
      barrier_wait(smem + K_FULL + 8 * slot, full);
      if (RELATIVE && !idle) {
        const u32 scales = meta + (sink_lo + n) % SLOT_TILES * 4;
        const float scale_k = load_shared_float(scales), norm_k = load_shared_float(scales + 8);
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
          if (cut(p.shape, span, unit.batch, sink_lo + n))
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
    Slot judged = {};
    u32 word = 0, certain = 0, raising = 0;  // of the tiles seen so far of 32
    auto judge = [&](int f, const Slot& of) {
      if (!__any_sync(FULL_WARP, may_pass(p.scale, x, row[f], of.meta))) return;
#if EXACT && RELATIVE
      const u32 bits = sift(p.scale, x, row[f], of.meta);
#elif EXACT
      const u32 place = of.tile << TILE_SHIFT | f << 8 | warp << 6;
      const u32 bits = sift(p.scale, x, row[f], of.meta, lane, line, place, entries);
      if (__any_sync(FULL_WARP, entries.count > 32 - 2 * SLOT_TILES))
        entries.flush(p.undecided, p.shape.words, lane);
#else
      const u32 bits = decide(p.scale, x, row[f], of.meta);
#endif
      constexpr u32 ALL = (1u << SLOT_TILES) - 1;
      word |= (bits & ALL) << of.tile % 32;
#if EXACT
      certain |= bits >> CERTAIN << of.tile % 32;
      raising |= (bits >> RAISE & ALL) << of.tile % 32;
#endif
    };
    auto finish = [&]() {
      judge(1, judged);
      __syncwarp();
      if (lane == 0) barrier_arrive(judged.empty);
    };
    auto write = [&]() {
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
      __syncwarp();  // else ptxas takes the loop for divergent, and the products wait for each other
      word = 0;
    };
    bool here = false;  // the next slot's keys
#pragma unroll 1
    for (int group = first; group >= last; group--) {
      const u32 k_smem = smem + K_AT + slot * SLOT_BYTES, meta = smem + META + META_BYTES * slot;
      if (!here) barrier_wait(smem + K_FULL + 8 * slot, full);
      Slot now;
      now.tile = group * SLOT_TILES;
      now.empty = smem + K_EMPTY + 8 * slot;
      if (++slot == SLOTS) slot = 0, full ^= 1;
      bool edge = group == top;  // some of it is hidden
      if (WINDOW || PADDED)
#pragma unroll 1
        for (int t = 0; t < SLOT_TILES; t++)
          edge |= now.tile + t < span.tile_hi && cut(p.shape, span, unit.batch, now.tile + t);
      int s[ACCUMULATORS];
      auto reduce = [&](int f) {
        wgmma_wait<0>();
        pin(s);
        if (edge) hide(s, p.shape, unit.batch, now.tile, span.low + f * 64 + row0, lane);
        tile_max<ACCUMULATORS, 0>(s, x[0][0], x[0][1]);
        tile_max<ACCUMULATORS, 1>(s, x[1][0], x[1][1]);
      };
      multiply(s, a[0], k_smem, SLOT_KEYS);
      pin(x);
      if (group < first) finish();
      reduce(0);
      if (group < first && judged.tile % 32 == 0) write();
      multiply(s, a[1], k_smem, SLOT_KEYS);
      pin(x);
      here = group > last && barrier_test(smem + K_FULL + 8 * slot, full);
      now.meta = meta_of(meta);
      judge(0, now);
      judged = now;
      reduce(1);
    }
    if (first >= last) {
      finish();
      write();
    }
    skip_slots(smem, lane, last - lo, slot, full);
  }
}
