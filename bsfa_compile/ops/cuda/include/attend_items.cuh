// Work of attention: parameters, shared memory, and the warp that takes items and loads Q, K and V
// for them. Macros of attend.cu.
#include "base.cuh"
#include "mbarrier.cuh"
#include "spans.cuh"
#include "tma.cuh"

#define Q_SLABS ((HEAD_DIM + 63) / 64)
#define K_STEPS ((HEAD_DIM + 15) / 16)
#define V_SLABS ((VALUE_DIM + 63) / 64)
#define V_COLUMNS (VALUE_DIM <= 64 ? 64 : VALUE_DIM <= 96 ? 96 : (VALUE_DIM + 63) / 64 * 64)
#define STEP_TILES (HEAD_DIM <= 128 && VALUE_DIM <= 128 ? 2 : 1)
#define STEP_KEYS (STEP_TILES * BLOCK_K)
#define SCORES (STEP_KEYS / 2)   // accumulators a thread
#define OUTPUTS (V_COLUMNS / 2)
#define Q_STAGES (HEAD_DIM <= 128 ? 2 : 1)
#define Q_BYTES (Q_SLABS * BLOCK_Q * 128)
#define K_BYTES (Q_SLABS * STEP_KEYS * 128)
#define V_BYTES (V_SLABS * STEP_KEYS * 128)

// Step word: tile in bits 0-14, second tile in 15-29, bit 30: some score is hidden.
#define NO_TILE 0x7fff
#define TILE_BITS 15
#define CUT_BIT (1u << 30)

#define K_FULL 0
#define K_EMPTY 16
#define V_FULL 32
#define V_EMPTY 48
#define Q_FULL 64
#define Q_EMPTY 80
#define ITEM_FULL 96
#define ITEM_EMPTY 128
#define STEP 160
#define ITEM 192
// An item's record: mask tiles, mask row, head, batch row; then whether its maxima must be followed,
// whether its weights overflowed (the consumers say so), and its number.
#define RECORDS 4
#define CAREFUL 16
#define OVERFLOWED 20
#define INDEX 24
#define Q_AT 1024
#define K_AT (Q_AT + Q_STAGES * Q_BYTES)
#define V_AT (K_AT + 2 * K_BYTES)

struct Params {
  Shape shape;
  Order order;
  const u32* mask_gmem;  // LIST: [B, H, rows, words]
  u16* out_gmem;         // [B, Lq, H, VALUE_DIM]
  float* lse_gmem;       // [B, H, Lq]
  const float* sinks_gmem;  // [H]: one more logit a row, natural-log units; null: none
  int* counter_gmem;     // zero on entry
  int heads, kv_heads, items;
  float scale, softcap;
};

struct Item {
  Span span;
  int row, head, kv_head, batch;  // mask row
};

DEVICE Item item_of(const Params& p, int q_start, int item) {
  const int per_kv = p.heads / p.kv_heads;
  const int2 place = place_of(p.order, p.shape.rows * per_kv, item);
  Item r;
  r.batch = place.y / p.kv_heads;
  r.kv_head = place.y % p.kv_heads;
  r.head = r.kv_head * per_kv + place.x % per_kv;
  r.row = p.shape.rows - 1 - place.x / per_kv;
  r.span = span_of(p.shape, q_start, r.row);
  return r;
}

// The tiles of one item: the lowest, and the others in descending order. All lanes of the loader's
// warp call together; 32 mask words at a time live in the lanes.
struct Tiles {
  const u32* row_gmem;
  u32 word, current;
  int chunk, index, next, count, words, lowest;

  // The part of a mask row that lies in the lanes at first, read an item ahead.
  static DEVICE u32 first_words(const Params& p, const Item& item, int lane) {
    const int w = (p.shape.words - 1) / 32 * 32 + lane;
    if (!LIST || w >= p.shape.words) return 0;
    return row_of(p, item)[w];
  }
  static DEVICE const u32* row_of(const Params& p, const Item& item) {
    return p.mask_gmem +
           (((i64)item.batch * p.heads + item.head) * p.shape.rows + item.row) * p.shape.words;
  }
  DEVICE void begin(const Params& p, const Item& item, u32 first, int lane) {
    next = item.span.tile_hi - 1;
    count = item.span.tile_hi - item.span.tile_lo;
    lowest = item.span.tile_lo;
#if LIST
    words = p.shape.words;
    row_gmem = row_of(p, item);
    chunk = (words - 1) / 32;
    count = __popc(first);
    lowest = first ? (chunk * 32 + lane) * 32 + __ffs(first) - 1 : NO_TILE;
    for (int w = chunk * 32 + lane - 32; w >= 0; w -= 32) {
      const u32 more = row_gmem[w];
      count += __popc(more);
      if (more) lowest = w * 32 + __ffs(more) - 1;
    }
    count = __reduce_add_sync(FULL_WARP, count);
    lowest = __reduce_min_sync(FULL_WARP, lowest);
    word = first;
    index = 31;
    current = __shfl_sync(FULL_WARP, word, 31);
#endif
  }
  DEVICE void fetch(int lane) {
    const int w = chunk * 32 + lane;
    word = w < words ? row_gmem[w] : 0;
    index = 31;
    current = __shfl_sync(FULL_WARP, word, 31);
  }
  DEVICE int pop(int lane) {  // never more often than count - 1 times
#if !LIST
    return next--;
#else
    while (current == 0) {
      if (index == 0) {
        chunk--;
        fetch(lane);
      } else {
        current = __shfl_sync(FULL_WARP, word, --index);
      }
    }
    const int bit = 31 - __clz(current);
    current ^= 1u << bit;
    return (chunk * 32 + index) * 32 + bit;
#endif
  }
};

// Item record `it`, in shared memory.
DEVICE u32 record_of(u32 smem, int it) { return smem + ITEM + 32 * (it % RECORDS); }

// Waits until record `it` may be written, and says which item must be done again: the one that had
// this record before or, where no new item is left, any that is still under way. -1: none.
DEVICE int take_record(u32 smem, int it, bool none_left) {
  barrier_wait(smem + ITEM_EMPTY + 8 * (it % RECORDS), (it / RECORDS & 1) ^ 1);
  for (int j = max(it - RECORDS, 0); j < it; j++) {
    if (j > it - RECORDS) {
      if (!none_left) break;
      barrier_wait(smem + ITEM_EMPTY + 8 * (j % RECORDS), j / RECORDS & 1);
    }
    const u32 record = record_of(smem, j);
    if (!load_shared(record + OVERFLOWED)) continue;
    __syncwarp();
    store_shared(record + OVERFLOWED, 0);
    return load_shared(record + INDEX);
  }
  return -1;
}

DEVICE void load_items(const Params& p, const TensorMap* q_map, const TensorMap* k_map,
                       const TensorMap* v_map, u32 smem) {
  const int lane = threadIdx.x & 31, q_start = start_of(p.shape);
  int upcoming = 0, step = 0, loaded = 0;
  u32 next_words = 0;
  // The next item that has rows, and the mask words that its tiles begin with.
  auto look_ahead = [&]() {
    Item next;
    do {
      if (lane == 0) upcoming = atomicAdd(p.counter_gmem, 1);
      upcoming = __shfl_sync(FULL_WARP, upcoming, 0);
      if (upcoming >= p.items) return;
      next = item_of(p, q_start, upcoming);
    } while (next.span.empty());
    next_words = Tiles::first_words(p, next, lane);
  };
  look_ahead();
  for (int it = 0;; it++) {
    const int again = take_record(smem, it, upcoming >= p.items);
    const int current = again < 0 ? upcoming : again;
    Item item = {};
    Tiles tiles;
    tiles.count = 0;
    if (current < p.items) {
      item = item_of(p, q_start, current);
      tiles.begin(p, item, again < 0 ? next_words : Tiles::first_words(p, item, lane), lane);
    }
    const int qs = loaded % Q_STAGES;
    if (lane == 0) {
      const u32 record = record_of(smem, it);
      store_shared(record, current < p.items ? tiles.count : -1);
      store_shared(record + 4, item.row);
      store_shared(record + 8, item.head);
      store_shared(record + 12, item.batch);
      store_shared(record + CAREFUL, again >= 0);
      store_shared(record + OVERFLOWED, 0);
      store_shared(record + INDEX, current);
      barrier_arrive(smem + ITEM_FULL + 8 * (it % RECORDS));
    }
    __syncwarp();
    if (current >= p.items) break;
    if (lane == 0 && tiles.count > 0) {
      barrier_wait(smem + Q_EMPTY + 8 * qs, (loaded / Q_STAGES & 1) ^ 1);
      barrier_expect(smem + Q_FULL + 8 * qs, Q_BYTES);
      for (int d = 0; d < Q_SLABS; d++)
        tma_load(smem + Q_AT + qs * Q_BYTES + d * BLOCK_Q * 128, q_map, smem + Q_FULL + 8 * qs,
                 d * 64, item.span.row0, item.head, item.batch);
    }
    __syncwarp();
    const int steps = (tiles.count + STEP_TILES - 1) / STEP_TILES;
    loaded += steps > 0;
    int previous[STEP_TILES] = {};
    for (int n = 0; n <= steps; n++) {
      if (n == 1 && again < 0) look_ahead();  // hides the atomic and the read of the mask
      int pair[STEP_TILES];
      u32 word = 0;
#pragma unroll
      for (int t = 0; t < STEP_TILES; t++) {
        pair[t] = NO_TILE;
        if (n < steps && n * STEP_TILES + t < tiles.count)
          pair[t] = n + t == 0 ? tiles.lowest : tiles.pop(lane);
        if (pair[t] == NO_TILE || cut(p.shape, item.span, item.batch, pair[t])) word |= CUT_BIT;
        word |= (u32)pair[t] << t * TILE_BITS;
      }
      if (lane == 0 && n < steps) {
        const int st = (step + n) & 1;
        const u32 full = smem + K_FULL + 8 * st, to = smem + K_AT + st * K_BYTES;
        barrier_wait(smem + K_EMPTY + 8 * st, ((step + n) >> 1 & 1) ^ 1);
        store_shared(smem + STEP + 4 * st, word);
        barrier_expect(full, K_BYTES);
#pragma unroll
        for (int d = 0; d < Q_SLABS; d++)
#pragma unroll
          for (int t = 0; t < STEP_TILES; t++)
            tma_load(to + (d * STEP_KEYS + t * BLOCK_K) * 128, k_map, full, d * 64,
                     pair[t] * BLOCK_K, item.kv_head, item.batch);
      }
      if (lane == 0 && n > 0) {
        const int m = step + n - 1, st = m & 1;
        const u32 full = smem + V_FULL + 8 * st, to = smem + V_AT + st * V_BYTES;
        barrier_wait(smem + V_EMPTY + 8 * st, (m >> 1 & 1) ^ 1);
        barrier_expect(full, V_BYTES);
#pragma unroll
        for (int d = 0; d < V_SLABS; d++)
#pragma unroll
          for (int t = 0; t < STEP_TILES; t++)
            tma_load(to + (d * STEP_KEYS + t * BLOCK_K) * 128, v_map, full, d * 64,
                     previous[t] * BLOCK_K, item.kv_head, item.batch);
      }
      __syncwarp();
#pragma unroll
      for (int t = 0; t < STEP_TILES; t++) previous[t] = pair[t];
    }
    if (steps == 0 && again < 0) look_ahead();
    step += steps;
  }
}
