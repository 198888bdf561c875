// Work of attention: parameters, shared memory, the warp that chooses items and the one that loads
// Q, K and V for them. Macros of attend.cu.
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
// The lowest tile does not come first: a window leaves none that all rows of a block see, but its
// two highest are seen between them.
#define TOP_FIRST (WINDOW && CAUSAL && STEP_TILES == 2)

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
// An item's record. Two of them: what a multiprocessor takes ahead nobody else can.
#define RECORDS 2
#define RECORD_BYTES 192
#define COUNT 0  // tiles; negative: there is no item left
#define ROW 4  // of the mask
#define HEAD 8
#define BATCH 12
#define CAREFUL 16     // its maxima must be followed
#define OVERFLOWED 20  // its weights did overflow: the consumers say so
#define INDEX 24
#define KV_HEAD 28
#define LOWEST_TILE 32
#define WORDS 64  // the 32 mask words that its tiles begin with
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

struct Item : HeadBlock {
  Span span;
};

DEVICE Item item_of(const Params& p, int q_start, int item) {
  Item r = {head_block_of(p.order, p.shape, p.heads, p.kv_heads, item)};
  r.span = span_of(p.shape, q_start, r.row);
  return r;
}

// The tiles of one item in descending order. All lanes of the loader's warp call together; 32 mask
// words at a time live in the lanes.
struct Tiles {
  const u32* row_gmem;
  u32 word, left, current;  // a lane's word; words that are not visited; what is left of one
  int chunk, index, next;

  DEVICE void take(u32 its_word) {
    word = its_word;
    left = __ballot_sync(FULL_WARP, word);
  }
  DEVICE int pop(int lane) {  // never more often than there are tiles
#if !LIST
    return next--;
#else
    while (current == 0) {
      if (left) {
        index = 31 - __clz(left);
        left ^= 1u << index;
        current = __shfl_sync(FULL_WARP, word, index);
      } else {
        take(row_gmem[--chunk * 32 + lane]);  // not the top one: it exists
      }
    }
    const int bit = 31 - __clz(current);
    current ^= 1u << bit;
    return (chunk * 32 + index) * 32 + bit;
#endif
  }
};

// The highest 32 words of a mask row that the span reaches.
DEVICE int top_chunk(const Span& span) { return max(span.tile_hi - 1, 0) / 1024; }

DEVICE const u32* mask_row(const Params& p, int batch, int head, int row) {
  return p.mask_gmem + (((i64)batch * p.heads + head) * p.shape.rows + row) * p.shape.words;
}

// Item record `it`, in shared memory.
DEVICE u32 record_of(u32 smem, int it) { return smem + ITEM + RECORD_BYTES * (it % RECORDS); }

// Waits until the item that record `it` is of has ended. Its number if its weights overflowed, else
// -1.
DEVICE int overflowed(u32 smem, int it) {
  if (it < 0) return -1;
  const u32 record = record_of(smem, it);
  barrier_wait(smem + ITEM_EMPTY + 8 * (it % RECORDS), it / RECORDS & 1);
  const int index = load_shared(record + OVERFLOWED) ? (int)load_shared(record + INDEX) : -1;
  __syncwarp();
  store_shared(record + OVERFLOWED, 0);
  return index;
}

// The next item of all that has rows. Its number, -1 if there is none left.
DEVICE int claim(const Params& p, int q_start, int lane, Item& item) {
  for (;;) {
    int index = 0;
    if (lane == 0) index = atomicAdd(p.counter_gmem, 1);
    index = __shfl_sync(FULL_WARP, index, 0);
    if (index >= p.items) return -1;
    item = item_of(p, q_start, index);
    if (!item.span.empty()) return index;  // else no query touches that mask row
  }
}

// Writes the records of the items that this CTA does. A warp of its own, for it takes trips to
// memory and divisions.
DEVICE void choose_items(const Params& p, u32 smem) {
  const int lane = threadIdx.x & 31, q_start = start_of(p.shape);
  for (int it = 0;; it++) {
    Item item;
    int index = overflowed(smem, it - RECORDS);
    bool careful = index >= 0;
    if (!careful) index = claim(p, q_start, lane, item);
    for (int j = it - RECORDS + 1; j < it && index < 0; j++) {
      index = overflowed(smem, j);
      careful = index >= 0;
    }
    if (careful) item = item_of(p, q_start, index);
    int count = -1, lowest = NO_TILE;
    u32 word = 0;
    if (index >= 0) {
#if LIST
      const u32* row_gmem = mask_row(p, item.batch, item.head, item.row);
      count = 0;
      for (int chunk = 0; chunk <= top_chunk(item.span); chunk++) {
        const int w = chunk * 32 + lane;
        word = w < p.shape.words ? row_gmem[w] : 0;
        count += __popc(word);
        if (word) lowest = min(lowest, w * 32 + __ffs(word) - 1);
      }
      count = __reduce_add_sync(FULL_WARP, count);
      lowest = __reduce_min_sync(FULL_WARP, lowest);
#else
      const int2 bounds = bounds_of(p.shape, item.batch);
      lowest = max(item.span.tile_lo, bounds.x);
      count = max(min(item.span.tile_hi, bounds.y) - lowest, 0);
#endif
    }
    const u32 record = record_of(smem, it);
    store_shared(record + WORDS + 4 * lane, word);
    if (lane == 0) {
      store_shared(record + COUNT, count);
      store_shared(record + ROW, item.row);
      store_shared(record + HEAD, item.head);
      store_shared(record + BATCH, item.batch);
      store_shared(record + CAREFUL, careful);
      store_shared(record + OVERFLOWED, 0);
      store_shared(record + INDEX, index);
      store_shared(record + KV_HEAD, item.kv_head);
      store_shared(record + LOWEST_TILE, lowest);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(smem + ITEM_FULL + 8 * (it % RECORDS));
    if (index < 0) return;
  }
}

// Queues the copies of a step's tiles of K or V.
template <int SLABS>
DEVICE void load_tiles(u32 to, const TensorMap* map, u32 full, const int (&tiles)[STEP_TILES],
                       int kv_head, int batch) {
#pragma unroll
  for (int d = 0; d < SLABS; d++)
#pragma unroll
    for (int t = 0; t < STEP_TILES; t++)
      tma_load(to + (d * STEP_KEYS + t * BLOCK_K) * 128, map, full, d * 64, tiles[t] * BLOCK_K,
               kv_head, batch);
}

DEVICE void load_items(const Params& p, const TensorMap* q_map, const TensorMap* k_map,
                       const TensorMap* v_map, u32 smem) {
  const int lane = threadIdx.x & 31, q_start = start_of(p.shape);
  int step = 0, loaded = 0;
  for (int it = 0;; it++) {
    const u32 record = record_of(smem, it);
    barrier_wait(smem + ITEM_FULL + 8 * (it % RECORDS), it / RECORDS & 1);
    const int count = load_shared(record + COUNT);
    if (count < 0) return;
    const int row = load_shared(record + ROW), head = load_shared(record + HEAD);
    const int batch = load_shared(record + BATCH), kv_head = load_shared(record + KV_HEAD);
    const int lowest = load_shared(record + LOWEST_TILE);
    const Span span = span_of(p.shape, q_start, row);
    Tiles tiles = {};
#if LIST
    tiles.row_gmem = mask_row(p, batch, head, row);
    tiles.chunk = top_chunk(span);
    tiles.take(load_shared(record + WORDS + 4 * lane));
#else
    tiles.next = min(span.tile_hi, bounds_of(p.shape, batch).y) - 1;
#endif
    __syncwarp();
    if (lane == 0) barrier_arrive(smem + ITEM_EMPTY + 8 * (it % RECORDS));

    const int qs = loaded % Q_STAGES;
    if (lane == 0 && count > 0) {
      barrier_wait(smem + Q_EMPTY + 8 * qs, (loaded / Q_STAGES & 1) ^ 1);
      barrier_expect(smem + Q_FULL + 8 * qs, Q_BYTES);
      for (int d = 0; d < Q_SLABS; d++)
        tma_load(smem + Q_AT + qs * Q_BYTES + d * BLOCK_Q * 128, q_map, smem + Q_FULL + 8 * qs,
                 d * 64, span.row0, head, batch);
    }
    __syncwarp();
    const int steps = (count + STEP_TILES - 1) / STEP_TILES;
    loaded += steps > 0;
    int previous[STEP_TILES] = {};
    for (int n = 0; n <= steps; n++) {
      int pair[STEP_TILES];
      u32 word = 0;
#pragma unroll
      for (int t = 0; t < STEP_TILES; t++) {
        pair[t] = NO_TILE;
        if (n < steps && n * STEP_TILES + t < count)
          pair[t] = n + t == 0 && !TOP_FIRST ? lowest : tiles.pop(lane);
        if (pair[t] == NO_TILE || cut(p.shape, span, batch, pair[t])) word |= CUT_BIT;
        word |= (u32)pair[t] << t * TILE_BITS;
      }
      if (lane == 0 && n < steps) {
        const int st = (step + n) & 1;
        const u32 full = smem + K_FULL + 8 * st, to = smem + K_AT + st * K_BYTES;
        barrier_wait(smem + K_EMPTY + 8 * st, ((step + n) >> 1 & 1) ^ 1);
        store_shared(smem + STEP + 4 * st, word);
        barrier_expect(full, K_BYTES);
        load_tiles<Q_SLABS>(to, k_map, full, pair, kv_head, batch);
      }
      if (lane == 0 && n > 0) {
        const int m = step + n - 1, st = m & 1;
        const u32 full = smem + V_FULL + 8 * st, to = smem + V_AT + st * V_BYTES;
        barrier_wait(smem + V_EMPTY + 8 * st, (m >> 1 & 1) ^ 1);
        barrier_expect(full, V_BYTES);
        load_tiles<V_SLABS>(to, v_map, full, previous, kv_head, batch);
      }
      __syncwarp();
#pragma unroll
      for (int t = 0; t < STEP_TILES; t++) previous[t] = pair[t];
    }
    step += steps;
  }
}
