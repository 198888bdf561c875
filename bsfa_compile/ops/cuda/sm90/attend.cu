// Attention over a list of tiles: the kept ones of a tile mask, or (LIST = 0) all visible ones.
//
// A work item is one q block (128 rows) of one head. Warp 0 of warpgroup 0 is the loader: it takes
// items off a counter and brings STEP_TILES tiles of K and V at a time, which need not be
// neighbours: the lowest listed one first, then from the last one downwards. The lowest holds the
// attention sink, if there is one: a row's maximum is then known from the start, and its largest
// weight is exactly 1 (a maximum that lags would have it rounded to 16 bits). Warpgroups 1 and 2 own 64
// rows each and never branch on the data: in a step QK of this step and PV of the last one run on
// the tensor cores while the softmax is computed, and the two warpgroups take turns to issue. The
// output is rescaled only when a row's maximum grew by more than 2^8.
//
// Macros: HEAD_DIM, VALUE_DIM, BF16, CAUSAL, WINDOW, PADDED, SOFTCAP, LIST.
#include "base.cuh"
#include "gather.cuh"
#include "mbarrier.cuh"
#include "numeric.cuh"
#include "spans.cuh"
#include "tma.cuh"
#include "warps.cuh"
#include "wgmma.cuh"

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
#define GROW 8.f
#define START (-3.402823466e38f)  // running maximum before any key: finite, so that no NaN arises

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
#define ITEM_EMPTY 112
#define ITEM 128
#define STEP 192
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

DEVICE void load_items(const Params& p, const TensorMap* q_map, const TensorMap* k_map,
                       const TensorMap* v_map, u32 smem) {
  const int lane = threadIdx.x & 31, q_start = start_of(p.shape);
  int upcoming = 0, step = 0, loaded = 0;
  Item next;
  u32 next_words = 0;
  auto look_ahead = [&]() {
    if (lane == 0) upcoming = atomicAdd(p.counter_gmem, 1);
    upcoming = __shfl_sync(FULL_WARP, upcoming, 0);
    if (upcoming >= p.items) return;
    next = item_of(p, q_start, upcoming);
    next_words = Tiles::first_words(p, next, lane);
  };
  look_ahead();
  for (int it = 0;;) {
    const int current = upcoming;
    Item item = {};
    Tiles tiles;
    tiles.count = 0;
    if (current < p.items) {
      item = next;
      if (item.span.empty()) {  // a mask row that no query touches
        look_ahead();
        continue;
      }
      tiles.begin(p, item, next_words, lane);
    }
    const int s = it & 1, qs = loaded % Q_STAGES;
    if (lane == 0) {
      barrier_wait(smem + ITEM_EMPTY + 8 * s, (it >> 1 & 1) ^ 1);
      const u32 record = smem + ITEM + 32 * s;
      store_shared(record, current < p.items ? tiles.count : -1);
      store_shared(record + 4, item.row);
      store_shared(record + 8, item.head);
      store_shared(record + 12, item.batch);
      barrier_arrive(smem + ITEM_FULL + 8 * s);
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
      if (n == 1) look_ahead();  // hides the atomic and the read of the mask
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
    if (steps == 0) look_ahead();
    step += steps;
    it++;
  }
}

DEVICE void multiply_qk(float (&s)[SCORES], u32 q, u32 k) {
#pragma unroll
  for (int i = 0; i < K_STEPS; i++) {
    const u64 a = k_major<128>(q, i / 4 * (BLOCK_Q * 128) + i % 4 * 32);
    const u64 b = k_major<128>(k, i / 4 * (STEP_KEYS * 128) + i % 4 * 32);
    if (i == 0) wgmma_ss<false>(s, a, b);
    else wgmma_ss<true>(s, a, b);
  }
  wgmma_commit();
}

DEVICE void multiply_pv(float (&o)[OUTPUTS], const u32 (&weights)[SCORES / 2], u32 v) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < STEP_KEYS / 16; i++)
    wgmma_rs(o, weights + i * 4, mn_major<STEP_KEYS * 128>(v, i * 2048));
  wgmma_commit();
}

// Scores that the mask hides become -inf. `position`: of the thread's first row (second: + 8).
DEVICE void hide(float (&s)[SCORES], const Shape& shape, int batch, u32 word, int position,
                 int lane) {
  const int hi0 = key_high_of(shape, position), hi1 = key_high_of(shape, position + 8);
  const int lo0 = key_low_of(shape, position), lo1 = key_low_of(shape, position + 8);
#pragma unroll
  for (int t = 0; t < STEP_TILES; t++) {
    const int tile = word >> t * TILE_BITS & NO_TILE, key = tile * BLOCK_K + (lane & 3) * 2;
    u64 keys = ~0ull;
    if (PADDED && tile != NO_TILE) keys = pad_bits(shape, batch, tile) >> (lane & 3) * 2;
#pragma unroll
    for (int i = 0; i < 32; i++) {
      const int c = i / 4 * 8 + (i & 1), hi = i & 2 ? hi1 : hi0, lo = i & 2 ? lo1 : lo0;
      const bool seen = key + c < hi && (!WINDOW || key + c >= lo) && (!PADDED || (keys >> c & 1));
      if (!seen) s[t * 32 + i] = NEG_INF;
    }
  }
}

DEVICE void cap(float (&s)[SCORES], float scale, float softcap) {
  const float inner = scale / softcap;
#pragma unroll
  for (int i = 0; i < SCORES; i++) s[i] = softcap * tanh_exp(s[i] * inner);
}

DEVICE void row_max(const float (&s)[SCORES], float& a, float& b) {
  a = s[0];
  b = s[2];
#pragma unroll
  for (int i = 0; i < SCORES / 4; i++) {
    a = fmaxf(a, fmaxf(s[i * 4], s[i * 4 + 1]));
    b = fmaxf(b, fmaxf(s[i * 4 + 2], s[i * 4 + 3]));
  }
}

// s <- 2^(s factor - m), in place; the sums of the thread's two rows are added to l.
DEVICE void exponentials(float (&s)[SCORES], float factor, float m0, float m1, float& l0,
                         float& l1) {
#pragma unroll
  for (int i = 0; i < SCORES; i++) s[i] = exp2_approx(fmaf(s[i], factor, -(i & 2 ? m1 : m0)));
  float x0 = 0.f, x1 = 0.f, y0 = 0.f, y1 = 0.f;
#pragma unroll
  for (int i = 0; i < SCORES; i += 8) {
    x0 += s[i] + s[i + 1];
    y0 += s[i + 2] + s[i + 3];
    x1 += s[i + 4] + s[i + 5];
    y1 += s[i + 6] + s[i + 7];
  }
  l0 += x0 + x1;
  l1 += y0 + y1;
}

// Row `at` of the item's output [B, Lq, H, VALUE_DIM].
DEVICE u16* out_row(const Params& p, const Item& item, int at) {
  return p.out_gmem + (((i64)item.batch * p.shape.q_len + at) * p.heads + item.head) * VALUE_DIM;
}

DEVICE void pack(const float (&s)[SCORES], u32 (&weights)[SCORES / 2]) {
#pragma unroll
  for (int i = 0; i < SCORES / 2; i++) weights[i] = pack_16bit(s[2 * i], s[2 * i + 1]);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attend(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
           const __grid_constant__ TensorMap v_map, const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 dynamic_smem[];
  const u32 smem = shared_address(dynamic_smem);
  const int warpgroup = __shfl_sync(FULL_WARP, threadIdx.x >> 7, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      barrier_init(smem + K_FULL + 8 * i, 1);
      barrier_init(smem + K_EMPTY + 8 * i, 8);
      barrier_init(smem + V_FULL + 8 * i, 1);
      barrier_init(smem + V_EMPTY + 8 * i, 8);
      barrier_init(smem + Q_FULL + 8 * i, 1);
      barrier_init(smem + Q_EMPTY + 8 * i, 8);
      barrier_init(smem + ITEM_FULL + 8 * i, 1);
      barrier_init(smem + ITEM_EMPTY + 8 * i, 256);
    }
    barrier_init_done();
  }
  __syncthreads();
  allow_next_kernel();
  wait_for_previous_kernel();
  if (warpgroup == 0) {
    registers_down<56>();
    if (threadIdx.x < 32) load_items(p, &q_map, &k_map, &v_map, smem);
    return;
  }
  registers_up<224>();
  const int wg = warpgroup - 1, lane = threadIdx.x & 31;
  const int row = wg * 64 + (threadIdx.x >> 5 & 3) * 16 + (lane >> 2);
  const int q_start = start_of(p.shape);
  const float factor = SOFTCAP ? LOG2E : p.scale * LOG2E;
  int step = 0;
  if (wg == 1) named_arrive(1, 256);  // warpgroup 0 issues first
  for (int it = 0, loaded = 0;; it++) {
    const u32 record = smem + ITEM + 32 * (it & 1);
    barrier_wait(smem + ITEM_FULL + 8 * (it & 1), it >> 1 & 1);
    const int count = load_shared(record);
    Item item;
    item.row = load_shared(record + 4);
    item.head = load_shared(record + 8);
    item.batch = load_shared(record + 12);
    barrier_arrive(smem + ITEM_EMPTY + 8 * (it & 1));
    if (count < 0) break;
    item.span = span_of(p.shape, q_start, item.row);
    const int position = item.span.low + row, steps = (count + STEP_TILES - 1) / STEP_TILES;
    float o[OUTPUTS], l0 = 0.f, l1 = 0.f, m0 = START, m1 = START;
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++) o[i] = 0.f;
    if (steps > 0) {
      const int qs = loaded % Q_STAGES;
      const u32 q = smem + Q_AT + qs * Q_BYTES + wg * 8192;
      float s[SCORES];
      u32 weights[SCORES / 2];
      barrier_wait(smem + Q_FULL + 8 * qs, loaded / Q_STAGES & 1);
      loaded++;
      {
        const int st = step & 1;
        barrier_wait(smem + K_FULL + 8 * st, step >> 1 & 1);
        const u32 word = load_shared(smem + STEP + 4 * st);
        named_sync(1 + wg, 256);
        wgmma_fence();
        multiply_qk(s, q, smem + K_AT + st * K_BYTES);
        named_arrive(1 + (wg ^ 1), 256);
        wgmma_wait<0>();
        pin(s);
        if (lane == 0) barrier_arrive(smem + K_EMPTY + 8 * st);
        if (SOFTCAP) cap(s, p.scale, p.softcap);
        if (word & CUT_BIT) hide(s, p.shape, item.batch, word, position, lane);
        float a, b;
        row_max(s, a, b);
        m0 = fmaxf(m0, quad_max(a) * factor);
        m1 = fmaxf(m1, quad_max(b) * factor);
        exponentials(s, factor, m0, m1, l0, l1);
        pack(s, weights);
      }
#pragma unroll 1
      for (int n = 1; n < steps; n++) {
        const int x = step + n, st = x & 1, y = x - 1, vt = y & 1;
        barrier_wait(smem + K_FULL + 8 * st, x >> 1 & 1);
        const u32 word = load_shared(smem + STEP + 4 * st);
        named_sync(1 + wg, 256);
        wgmma_fence();
        multiply_qk(s, q, smem + K_AT + st * K_BYTES);
        barrier_wait(smem + V_FULL + 8 * vt, y >> 1 & 1);
        multiply_pv(o, weights, smem + V_AT + vt * V_BYTES);
        named_arrive(1 + (wg ^ 1), 256);
        wgmma_wait<1>();
        pin(s);
        if (lane == 0) barrier_arrive(smem + K_EMPTY + 8 * st);
        if (SOFTCAP) cap(s, p.scale, p.softcap);
        if (word & CUT_BIT) hide(s, p.shape, item.batch, word, position, lane);
        float a, b, e0 = 1.f, e1 = 1.f;
        row_max(s, a, b);
        const bool grow =
            __any_sync(FULL_WARP, fmaxf(fmaf(a, factor, -m0), fmaf(b, factor, -m1)) > GROW);
        if (grow) {
          const float n0 = fmaxf(m0, quad_max(a) * factor), n1 = fmaxf(m1, quad_max(b) * factor);
          e0 = exp2_approx(m0 - n0);
          e1 = exp2_approx(m1 - n1);
          m0 = n0;
          m1 = n1;
          l0 *= e0;
          l1 *= e1;
        }
        exponentials(s, factor, m0, m1, l0, l1);
        // The compiler moves this wait above most exponentials; holding it here was 5 % slower:
        // the other warpgroup's work covers them.
        wgmma_wait<0>();
        pin(o);
        if (lane == 0) barrier_arrive(smem + V_EMPTY + 8 * vt);
        pack(s, weights);
        if (grow) {
#pragma unroll
          for (int i = 0; i < OUTPUTS; i++) o[i] *= i & 2 ? e1 : e0;
        }
      }
      if (lane == 0) barrier_arrive(smem + Q_EMPTY + 8 * qs);
      const int y = step + steps - 1, vt = y & 1;
      barrier_wait(smem + V_FULL + 8 * vt, y >> 1 & 1);
      multiply_pv(o, weights, smem + V_AT + vt * V_BYTES);
      wgmma_wait<0>();
      pin(o);
      if (lane == 0) barrier_arrive(smem + V_EMPTY + 8 * vt);
      step += steps;
    }
    l0 = quad_sum(l0);
    l1 = quad_sum(l1);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int at = item.span.row0 + row + 8 * r;
      const float l = r ? l1 : l0, m = r ? m1 : m0;
      float inverse = l == 0.f ? 0.f : 1.f / l, total = l == 0.f ? NEG_INF : m + log2_approx(l);
      if (p.sinks_gmem) {
        const float seen = total;
        total = log2_add(seen, p.sinks_gmem[item.head] * LOG2E);
        if (l != 0.f) inverse *= exp2_approx(seen - total);
      }
      const bool inside = at >= 0 && at < p.shape.q_len;
      uint4* out = (uint4*)out_row(p, item, at);
#pragma unroll
      for (int i = 0; i < OUTPUTS / 4; i += 4) {
        u32 x[4];
#pragma unroll
        for (int e = 0; e < 4; e++)
          x[e] = pack_16bit(o[(i + e) * 4 + 2 * r] * inverse, o[(i + e) * 4 + 2 * r + 1] * inverse);
        const uint4 eight = gather_quad(x, lane);
        if (inside && (i + (lane & 3)) * 8 < VALUE_DIM) out[i + (lane & 3)] = eight;
      }
      if (inside && (lane & 3) == 0)
        p.lse_gmem[((i64)item.batch * p.heads + item.head) * p.shape.q_len + at] = total * LN2;
    }
  }
  if (wg == 0) named_sync(1, 256);  // takes up the last arrival, so that the barrier ends clean
}
