// Work of the gate: parameters, shared memory, items of several units, and the thread that takes
// items and loads Q and K for them. Macros of gate.cu.
#include "base.cuh"
#include "gate_rows.cuh"
#include "mbarrier.cuh"
#include "spans.cuh"
#include "tma.cuh"
#include "undecided.cuh"

#define KEY_BYTES (HEAD_DIM <= 64 ? 64 : HEAD_DIM <= 128 ? 128 : 256)  // an int8 row of K
#define SLAB_BYTES (KEY_BYTES < 128 ? KEY_BYTES : 128)  // its part in one swizzled slab
#define K_SLABS (KEY_BYTES / SLAB_BYTES)
#define SLOT_TILES 2
#define SLOT_KEYS (SLOT_TILES * BLOCK_K)
#define SLOT_BYTES (SLOT_KEYS * KEY_BYTES)
#define GROUP_META 8
#define CHANNEL_META (2 * KEY_BYTES)
#define META_BYTES 16  // of a slot's two tiles: their scales, their norms
#define UNIT_BYTES (Q_SLABS * BLOCK_Q * 128)
#define CHANNEL_BYTES (CHANNEL_META * 4)
// Shared memory: barriers, item records, tile metadata of each slot; the channels of K; Q of all
// units; K slots.
#define SMEM_LIMIT 232448
#define FIT ((SMEM_LIMIT - K_AT) / SLOT_BYTES)
#define SLOTS (FIT < 8 ? FIT : 8)
#define K_FULL 0
#define K_EMPTY 64
#define Q_FULL 128
#define Q_EMPTY 136
#define ITEM_FULL 144
#define ITEM_EMPTY 160
#define ITEM 192
#define ITEM_BYTES 80
#define ITEM_UNIT 24  // where the first unit's part of an item is, 16 bytes each
#define META 384  // 16 bytes each
#define CHANNELS 1024
#define Q_AT (CHANNELS + (CHANNEL_BYTES + 1023) / 1024 * 1024)
#define K_AT (Q_AT + UNITS * UNIT_BYTES)

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

// Unit `which` of the item that stands at place.x of kv head place.y (batch rows unrolled).
DEVICE Unit unit_of(const Params& p, int q_start, int2 place, int which) {
  const int per_kv = p.heads / p.kv_heads, index = UNITS * place.x + which;
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

DEVICE int places_of(const Params& p) {
  return (p.shape.rows * (p.heads / p.kv_heads) + UNITS - 1) / UNITS;
}

// What the loader needs to know of an item; kv < 0: there is none left.
struct Item {
  int kv, lo, hi, sink_lo, sink_hi;
};

// Takes the next item, the it-th of this CTA: announces it, has its Q loaded (as the loaded-th).
DEVICE Item take_item(const Params& p, const TensorMap* q_map, u32 smem, int it, int& loaded) {
  const int item = atomicAdd(p.counter_gmem, 1), s = it & 1;
  const u32 record = smem + ITEM + ITEM_BYTES * s;
  barrier_wait(smem + ITEM_EMPTY + 8 * s, (it >> 1 & 1) ^ 1);
  const int2 place = place_of(p.order, places_of(p), min(item, p.items - 1));
  Item out = {item < p.items ? place.y : -1, 0, -1, 0, 0};
  int active = 0;  // a bit for each unit that has work
  if (item < p.items) {
#pragma unroll 1
    for (int w = 0; w < UNITS; w++) {
      Unit unit = unit_of(p, start_of(p.shape), place, w);
      unit.threshold = threshold_of(p, unit);
      store_shared(record + 20, unit.batch);
      const u32 own = record + ITEM_UNIT + 16 * w;
      store_shared(own, unit.row);
      store_shared(own + 4, unit.head);
      store_shared(own + 8, __float_as_uint(unit.threshold));
      store_shared(own + 12, unit.span.row0);
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
  barrier_expect(smem + Q_FULL, CHANNEL_BYTES + __popc(active) * UNIT_BYTES);
  bulk_load(smem + CHANNELS, p.mean_gmem + (i64)out.kv * CHANNEL_META, CHANNEL_BYTES, smem + Q_FULL);
#pragma unroll 1
  for (int w = 0; w < UNITS; w++) {
    if (!(active >> w & 1)) continue;
    const u32 own = record + ITEM_UNIT + 16 * w;
    const int row0 = load_shared(own + 12), head = load_shared(own + 4);
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
      // Once the slots are full: Q of the next item is there when this one ends. Not before the last
      // sink tile: until they have seen that, consumers may want their Q.
      if (n == min(steps, max(SLOTS, sinks))) upcoming = take_item(p, q_map, smem, it, loaded);
      if (n == steps) break;
      const bool sink = n < sinks;
      const int tile = sink ? item.sink_lo + n : (item.hi - (n - sinks)) * SLOT_TILES;
      const u32 full = smem + K_FULL + 8 * slot, to = smem + K_AT + slot * SLOT_BYTES;
      barrier_wait(smem + K_EMPTY + 8 * slot, empty);
      const bool in_16_bits = EXACT_SINKS && sink;
      barrier_expect(full, (in_16_bits ? UNIT_BYTES / 2 : sink ? BLOCK_K * KEY_BYTES : SLOT_BYTES) +
                               META_BYTES);
      bulk_load(smem + META + META_BYTES * slot, meta_gmem + tile / SLOT_TILES * (META_BYTES / 4),
                META_BYTES, full);
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
