// Attention over a list of tiles: the kept ones of a tile mask, or (LIST = 0) all visible ones.
//
// A work item is one q block (128 rows) of one head. Of warpgroup 0 a warp takes items off a counter
// and another loads for them: STEP_TILES tiles of K and V at a time, which need not be neighbours,
// the lowest listed one first (but see TOP_FIRST), which holds the attention sink if there is one,
// then from the last one downwards. Warpgroups 1 and 2 own 64 rows each and take turns to issue. In a step QK of this
// step and PV of the last one are queued; while they run, the scores become weights, in registers
// of their own, so that packing them need not wait for PV.
//
// FIXED: exponents are relative to a row's maximum over its first step, for the whole item. Nothing
// is lost by that, floating point being relative, unless a later score is so much larger that the
// weights overflow. Then the sum of weights says so, and the item is done again, with maxima that
// are followed: the output is rescaled when a row's maximum grew by more than 2^GROW.
//
// Macros: HEAD_DIM, VALUE_DIM, BF16, CAUSAL, WINDOW, PADDED, SOFTCAP, LIST.
#include "attend_items.cuh"
#include "gather.cuh"
#include "numeric.cuh"
#include "warps.cuh"
#include "wgmma.cuh"

// A lane of each warpgroup: 504 in all, which is what the kernel starts with.
#define LOADER_REGISTERS (LIST && PADDED && HEAD_DIM <= 192 ? 56 : 40)
#define CONSUMER_REGISTERS ((504 - LOADER_REGISTERS) / 2)
#define GROW 8.f
#define START (-3.402823466e38f)  // running maximum before any key: finite, so that no NaN arises
// Where the rows see a key of their first step. One that does not overflows.
#define FIXED (!WINDOW || TOP_FIRST)
// The largest weight of a first step is 2^-ROOM. In bf16 a sum of MOST is too large: 87 nats more than
// the first maximum, and an output overflows only if V exceeds 2^60. In fp16 a weight overflows at 11
// nats more, and with it the row's whole output.
#define ROOM (BF16 ? 60.f : 0.f)
#define MOST 0x1p66f

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

// What a consumer thread holds of an item: two rows' maxima m (log2 units) and sums of weights l,
// their scores s and outputs o.
struct Rows {
  u32 smem, q, q_empty;
  int wg, lane, position, batch, step, steps;  // step: of all items, the item's first
  float factor, m0, m1, l0, l1;
  float s[SCORES], o[OUTPUTS];

  DEVICE void begin_item(int first_position, int batch_row, int its_steps) {
    position = first_position;
    batch = batch_row;
    steps = its_steps;
    l0 = l1 = 0.f;
    m0 = m1 = START;
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++) o[i] = 0.f;
  }
  DEVICE int stage(int n) const { return step + n & 1; }
  DEVICE int phase(int n) const { return step + n >> 1 & 1; }
  DEVICE void wait_for_k(int n) { barrier_wait(smem + K_FULL + 8 * stage(n), phase(n)); }
  DEVICE void pass_turn() { named_arrive(1 + (wg ^ 1), 256); }
  // Queues QK of step n; returns its word.
  DEVICE u32 begin_step(int n) {
    const u32 word = load_shared(smem + STEP + 4 * stage(n));
    named_sync(1 + wg, 256);
    wgmma_fence();
    multiply_qk(s, q, smem + K_AT + stage(n) * K_BYTES);
    return word;
  }
  // The scores of step n are there.
  DEVICE void take_scores(const Params& p, int n, u32 word) {
    pin(s);
    __syncwarp();
    if (lane == 0) barrier_arrive(smem + K_EMPTY + 8 * stage(n));
    if (SOFTCAP) cap(s, p.scale, p.softcap);
    if (word & CUT_BIT) hide(s, p.shape, batch, word, position, lane);
  }
  DEVICE void begin_pv(int n, const u32 (&weights)[SCORES / 2]) {
    barrier_wait(smem + V_FULL + 8 * stage(n), phase(n));
    multiply_pv(o, weights, smem + V_AT + stage(n) * V_BYTES);
  }
  DEVICE void end_pv(int n) {
    wgmma_wait<0>();
    pin(o);
    if (lane == 0) barrier_arrive(smem + V_EMPTY + 8 * stage(n));
  }

  // The first step. room: see ROOM.
  DEVICE void start(const Params& p, float room, u32 (&weights)[SCORES / 2]) {
    wait_for_k(0);
    const u32 word = begin_step(0);
    pass_turn();
    wgmma_wait<0>();
    take_scores(p, 0, word);
    float a, b;
    row_max(s, a, b);
    m0 = fmaxf(m0, quad_max(a) * factor + room);
    m1 = fmaxf(m1, quad_max(b) * factor + room);
    exponentials(s, factor, m0, m1, l0, l1);
    pack(s, weights);
    if (steps > 1) wait_for_k(1);
  }
  // Step n > 0: its scores become `fresh` while PV of step n - 1 takes `old`.
  template <bool FOLLOW>
  DEVICE void advance(const Params& p, int n, const u32 (&old)[SCORES / 2],
                      u32 (&fresh)[SCORES / 2]) {
    const u32 word = begin_step(n);
    begin_pv(n - 1, old);
    pass_turn();
    wgmma_wait<1>();
    take_scores(p, n, word);
    float a, b, e0 = 1.f, e1 = 1.f;
    bool grow = false;
    if (FOLLOW) {
      row_max(s, a, b);
      grow = __any_sync(FULL_WARP, fmaxf(fmaf(a, factor, -m0), fmaf(b, factor, -m1)) > GROW);
    }
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
    pack(s, fresh);
    pin(fresh);
    // A loop stands between weights and wait: the compiler would wait first, and the tensor cores
    // stand still until the weights are there.
    if (n + 1 < steps) wait_for_k(n + 1);
    end_pv(n - 1);
    if (grow) {
#pragma unroll
      for (int i = 0; i < OUTPUTS; i++) o[i] *= i & 2 ? e1 : e0;
    }
  }
  // Whether there was room for the weights.
  DEVICE bool fits() const {
    return BF16 ? l0 < MOST && l1 < MOST : fabsf(o[0]) < -NEG_INF && fabsf(o[2]) < -NEG_INF;
  }
  DEVICE void finish(const u32 (&weights)[SCORES / 2]) {
    if (lane == 0) barrier_arrive(q_empty);
    begin_pv(steps - 1, weights);
    end_pv(steps - 1);
    step += steps;
  }
  // All steps after the first.
  template <bool FOLLOW> DEVICE void walk(const Params& p, u32 (&weights)[SCORES / 2]) {
    u32 others[SCORES / 2];
#pragma unroll 1
    for (int n = 1;; n += 2) {
      if (n == steps) return finish(weights);
      advance<FOLLOW>(p, n, weights, others);
      if (n + 1 == steps) return finish(others);
      advance<FOLLOW>(p, n + 1, others, weights);
    }
  }
};

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
      barrier_init(smem + ITEM_EMPTY + 8 * i, 9);  // the loader, too
    }
    barrier_init_done();
  }
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();  // which reads what the kernels before this one wrote
  if (warpgroup == 0) {
    registers_down<LOADER_REGISTERS>();
    if (threadIdx.x < 32) load_items(p, &q_map, &k_map, &v_map, smem);
    else if (threadIdx.x < 64) choose_items(p, smem);
    return;
  }
  registers_up<CONSUMER_REGISTERS>();
  const int wg = warpgroup - 1, lane = threadIdx.x & 31;
  const int row = wg * 64 + (threadIdx.x >> 5 & 3) * 16 + (lane >> 2);
  const int q_start = start_of(p.shape);
  Rows x;
  x.smem = smem;
  x.wg = wg;
  x.lane = lane;
  x.factor = SOFTCAP ? LOG2E : p.scale * LOG2E;
  x.step = 0;
  if (wg == 1) named_arrive(1, 256);  // warpgroup 0 issues first
  for (int it = 0, loaded = 0;; it++) {
    const u32 record = record_of(smem, it);
    barrier_wait(smem + ITEM_FULL + 8 * (it % RECORDS), it / RECORDS & 1);
    const int count = load_shared(record + COUNT);
    Item item;
    item.row = load_shared(record + ROW);
    item.head = load_shared(record + HEAD);
    item.batch = load_shared(record + BATCH);
    const bool careful = !FIXED || load_shared(record + CAREFUL);
    if (count < 0) break;
    item.span = span_of(p.shape, q_start, item.row);
    x.begin_item(item.span.low + row, item.batch, (count + STEP_TILES - 1) / STEP_TILES);
    if (x.steps > 0) {
      const int qs = loaded % Q_STAGES;
      barrier_wait(smem + Q_FULL + 8 * qs, loaded / Q_STAGES & 1);
      loaded++;
      x.q = smem + Q_AT + qs * Q_BYTES + wg * 8192;
      x.q_empty = smem + Q_EMPTY + 8 * qs;
      u32 weights[SCORES / 2];
      x.start(p, careful ? 0.f : ROOM, weights);
      if (careful) x.walk<true>(p, weights);
      else x.walk<false>(p, weights);
    }
    if (!careful && __any_sync(FULL_WARP, !x.fits())) store_shared(record + OVERFLOWED, 1);
    const float l0 = quad_sum(x.l0), l1 = quad_sum(x.l1);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int at = item.span.row0 + row + 8 * r;
      const float l = r ? l1 : l0, m = r ? x.m1 : x.m0;
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
        u32 packed[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int at_pair = (i + e) * 4 + 2 * r;
          packed[e] = pack_16bit(x.o[at_pair] * inverse, x.o[at_pair + 1] * inverse);
        }
        const uint4 eight = gather_quad(packed, lane);
        if (inside && (i + (lane & 3)) * 8 < VALUE_DIM) out[i + (lane & 3)] = eight;
      }
      if (inside && (lane & 3) == 0)
        p.lse_gmem[((i64)item.batch * p.heads + item.head) * p.shape.q_len + at] = total * LN2;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(smem + ITEM_EMPTY + 8 * (it % RECORDS));
  }
  if (wg == 0) named_sync(1, 256);  // takes up the last arrival, so that the barrier ends clean
}
