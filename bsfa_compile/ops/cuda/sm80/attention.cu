// Block-sparse attention in one pass, for every card of capability >= 8.0: mma.sync + cp.async.
//
// A block of threads owns 128 queries of one head and visits their tiles of 64 keys, sink tiles
// first, then from the last one downwards. Each tile's scores are computed, the block votes on
// keeping it, and only a kept tile costs exponentials, a V load and the second product.
//
// Macros: BF16; D, DV (head dims, padded to 64/96/128/192/256); WARPS (4: 32 rows each, 8: 16);
//   DECIDE (0: keep all, 1: relative gate, 2: absolute gate, 3: tile mask given);
//   ATTEND (0: only decide); SOFTCAP; PADDED (there is a key padding mask); WHOLE (the head dims
//   are D and DV); K_STAGES, V_STAGES (shared-memory buffers); Q_REGISTERS (1: Q stays in
//   registers, 2: and its buffer is then K's and V's); MIN_BLOCKS (on a multiprocessor).

#include "geometry.cuh"
#include "ldmatrix.cuh"
#include "mma_sm80.cuh"
#include "numeric.cuh"
#include "score_tile.cuh"
#include "shared_tile.cuh"
#include "store_rows.cuh"

#define THREADS (WARPS * 32)
#define STRIPS (BLOCK_Q / WARPS / 16)  // m16 strips of a warp
#define N_TILES (BLOCK_K / 8)          // n8 tiles of the scores
#define DV_TILES (DV / 8)

typedef unsigned long long u64;

struct Params {
  const void* q;             // [B, H, Lq, head_dim], last stride 1
  const void* k;             // [B, Hkv, Lk, head_dim]
  const void* v;             // [B, Hkv, Lk, v_dim]
  void* out;                 // [B, Lq, H, v_dim], contiguous
  float* lse;                // [B, H, Lq]
  const float* thresholds;   // [H, columns]; scaled logits, natural-log units
  unsigned* tile_mask;       // [B, H, mask rows, mask_words]; read if DECIDE == 3, else written
  u64* counts;               // [H, 2]: dropped, candidates
  const u64* key_bits;       // [B, k tiles]: bit c is key c of the tile unpadded; if PADDED
  const int* key_bounds;     // [B, 2]: tiles between the first and the last unpadded key
  const float* sinks;        // [H]: one more logit a row, natural-log units; null: none
  const long long* q_start;  // scalar on the device; null: q_start_value
  long long q_stride[2], k_stride[2], v_stride[2];  // batch, head; in elements
  int q_row, k_row, v_row;                          // elements between rows
  int q_start_value, heads, group, q_len, k_len, head_dim, v_dim, columns, mask_words;
  int sink_tiles, causal, window;
  float scale, softcap;
};

#define Q_BYTES (BLOCK_Q * (DV > D && ATTEND ? Layout<DV>::PITCH : Layout<D>::PITCH))
#define K_BYTES (BLOCK_K * Layout<D>::PITCH)
#define V_BYTES (BLOCK_K * Layout<DV>::PITCH)

__device__ __forceinline__ void load_q(unsigned (&q)[D / 16][STRIPS][4], unsigned q_lane_smem) {
#pragma unroll
  for (int kk = 0; kk < D / 16; ++kk)
#pragma unroll
    for (int m = 0; m < STRIPS; ++m)
      ldmatrix_x4(q[kk][m], Layout<D>::step(q_lane_smem + m * 16 * Layout<D>::PITCH, kk));
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention(const Params p) {
  extern __shared__ __align__(128) char shared[];
  const unsigned base_smem = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const unsigned q_smem = base_smem;
  const unsigned k_smem = q_smem + (Q_REGISTERS == 2 ? 0 : Q_BYTES);
  [[maybe_unused]] const unsigned v_smem = k_smem + K_STAGES * K_BYTES;

  const int block = gridDim.x - 1 - blockIdx.x;  // longest causal rows first
  const int head = blockIdx.y, batch = blockIdx.z;
  const int kv_head = head / p.group;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int warp_row = warp * (STRIPS * 16);
  const int k_tiles = (p.k_len + BLOCK_K - 1) / BLOCK_K;
  const int q_start = p.q_start ? static_cast<int>(*p.q_start) : p.q_start_value;
#if PADDED
  const u64* key_bits = p.key_bits + static_cast<long long>(batch) * k_tiles;
  const int first_tile = p.key_bounds[2 * batch], stop_tile = p.key_bounds[2 * batch + 1];
#else
  const int first_tile = 0, stop_tile = k_tiles;
#endif
  const Geometry g = make_geometry(block, q_start, p.q_len, p.k_len, p.causal, p.window,
                                   p.sink_tiles, first_tile, stop_tile);
  unsigned* mask_gmem =
      p.tile_mask +
      ((static_cast<long long>(batch) * p.heads + head) * gridDim.x + block) * p.mask_words;
#if DECIDE != 3
  for (int n = threadIdx.x; n < p.mask_words; n += THREADS) mask_gmem[n] = 0;
#endif
  if (g.row_begin >= g.row_end) return;

  // Whether padding leaves something of a tile that the rest of the mask leaves.
  auto visible = [&](int tile) {
#if PADDED
    return (key_bits[tile] & range_bits(tile, g.key_begin, g.key_end)) != 0;
#else
    return true;
#endif
  };
#if DECIDE == 3
  int word_index = (g.tile_end + 31) / 32;
  unsigned word = 0;
  auto next_tile = [&]() {
    for (;;) {
      while (word == 0) {
        if (--word_index < g.tile_begin / 32) return -1;
        word = mask_gmem[word_index];
      }
      const int bit = 31 - __clz(word), tile = word_index * 32 + bit;
      word ^= 1u << bit;
      if (tile < g.tile_end && tile >= g.tile_begin && visible(tile)) return tile;
    }
  };
#else
  int visited = 0;
  auto next_tile = [&]() {
    const int sinks = g.sink_end - g.tile_begin, count = g.tile_end - g.tile_begin;
    while (visited < count) {
      const int n = visited++;
      const int tile = n < sinks ? g.tile_begin + n : g.tile_end - 1 + sinks - n;
      if (visible(tile)) return tile;
    }
    return -1;
  };
#endif

  const char* q_gmem =
      static_cast<const char*>(p.q) + 2 * (batch * p.q_stride[0] + head * p.q_stride[1]);
  const char* k_gmem =
      static_cast<const char*>(p.k) + 2 * (batch * p.k_stride[0] + kv_head * p.k_stride[1]);
  const TileCopy<BLOCK_K, D, THREADS> copy_k(k_smem, k_gmem, p.k_row);
  auto load_k = [&](int tile, int buffer) {
    copy_k(buffer * K_BYTES, tile * BLOCK_K, 0, p.k_len - tile * BLOCK_K, p.head_dim);
  };
#if ATTEND
  const char* v_gmem =
      static_cast<const char*>(p.v) + 2 * (batch * p.v_stride[0] + kv_head * p.v_stride[1]);
  const TileCopy<BLOCK_K, DV, THREADS> copy_v(v_smem, v_gmem, p.v_row);
  auto load_v = [&](int tile, int buffer) {
    copy_v(buffer * V_BYTES, tile * BLOCK_K, 0, p.k_len - tile * BLOCK_K, p.v_dim);
  };
#endif

  // `tile` is computed; K of the tiles in `coming` is on its way or about to be asked for.
  int tile = next_tile();
  int coming = tile >= 0 ? next_tile() : -1;
  TileCopy<BLOCK_Q, D, THREADS>(q_smem, q_gmem, p.q_row)(
      0, g.first_row, g.row_begin - g.first_row, g.row_end - g.first_row, p.head_dim);
  const unsigned q_lane_smem = opaque(q_smem + Layout<D>::at(warp_row + (lane & 15), lane >> 4));
#if Q_REGISTERS == 2
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  unsigned q[D / 16][STRIPS][4];
  load_q(q, q_lane_smem);
  __syncthreads();
#endif
  if (tile >= 0) load_k(tile, 0);
  cp_async_commit();
  cp_async_wait<0>();

#if SOFTCAP
  const float scale = 1.f;  // of the scores as they leave the first product
  const float to_cap = p.scale / p.softcap;
#else
  const float scale = p.scale;
#endif
  const float scale_log2 = scale * LOG2E;
  const int t4 = lane & 3, row4 = lane >> 2;

  // Rows of this thread: warp_row + 16 * (r / 2) + 8 * (r % 2) + row4 for r < 2 * STRIPS.
  auto row_of = [&](int r) { return warp_row + (r >> 1) * 16 + (r & 1) * 8 + row4; };
  float running[2 * STRIPS];  // maximum so far, raw scores
#pragma unroll
  for (int r = 0; r < 2 * STRIPS; ++r) running[r] = NEG_INF;
#if ATTEND
  float sum[2 * STRIPS];
  float acc[STRIPS][DV_TILES][4];
#pragma unroll
  for (int r = 0; r < 2 * STRIPS; ++r) sum[r] = 0.f;
#pragma unroll
  for (int s = 0; s < STRIPS; ++s)
#pragma unroll
    for (int n = 0; n < DV_TILES; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[s][n][e] = 0.f;
#endif

#if DECIDE == 1 || DECIDE == 2
  // In raw scores: scale > 0, so comparing before scaling decides the same.
  const float threshold =
      p.thresholds[head * p.columns + min(g.block_low / BLOCK_Q, p.columns - 1)] / scale;
  const bool keep_all = threshold == NEG_INF;
  // A row votes for a tile whose maximum reaches its bound. No vote for rows outside the call and
  // rows that are padding: an infinite bound. LOWEST: any score is enough, -inf (hidden) is not.
  auto votes = [&](int r) {
    const int row = row_of(r), position = g.block_low + row;
    if (row < g.row_begin - g.first_row || row >= g.row_end - g.first_row) return false;
#if PADDED
    if (p.causal && position < p.k_len)
      return ((key_bits[floor_tile(position)] >> (position & 63)) & 1) != 0;
#endif
    return true;
  };
  float bound[2 * STRIPS];
#pragma unroll
  for (int r = 0; r < 2 * STRIPS; ++r)
    bound[r] = !votes(r) ? -NEG_INF : DECIDE == 1 ? LOWEST : fmaxf(threshold, LOWEST);
#endif
#if DECIDE == 1
  // A threshold above 0 can drop a tile that holds a row's maximum, which the gate must remember
  // and the softmax must not: then the gate keeps maxima of its own. (+inf drops all: no matter.)
  __shared__ float gate_running[BLOCK_Q];
  const bool own_maxima = threshold > 0.f && threshold != -NEG_INF;
  if (own_maxima)
    for (int n = threadIdx.x; n < BLOCK_Q; n += THREADS) gate_running[n] = NEG_INF;
#endif
#if DECIDE != 3
  unsigned kept_bits = 0;  // of the mask word that `previous` is in
  int previous = -1;       // the tile decided last
  bool kept = false;       // and how
  auto record = [&](int upcoming) {
    if (previous < 0) return;
    kept_bits |= static_cast<unsigned>(kept) << (previous & 31);
    if ((upcoming ^ previous) >> 5) {  // sink tiles come first: a word may be written twice
      if (threadIdx.x == 0) mask_gmem[previous >> 5] |= kept_bits;
      kept_bits = 0;
    }
  };
#endif
  __syncthreads();
#if Q_REGISTERS == 1
  unsigned q[D / 16][STRIPS][4];
  load_q(q, q_lane_smem);
#endif

  // ldmatrix addresses of this lane: the first chunk of its row of the first tile.
  const unsigned k_lane_smem =
      opaque(k_smem + Layout<D>::at((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1));
  int stage = 0;  // K buffer of `tile`
#if ATTEND
  const unsigned v_lane_smem = opaque(v_smem + Layout<DV>::at(lane & 15, lane >> 4));
  int v_stage = 0;
#endif
#if DECIDE == 1 || DECIDE == 2
  bool likely = keep_all;  // that `tile` will be kept: its V is asked for before the vote
#else
  constexpr bool likely = true;
#endif

  while (tile >= 0) {
    const unsigned k_tile_smem = k_lane_smem + stage * K_BYTES;
    const int later = coming >= 0 ? next_tile() : -1;

    // Scores of 16 * STRIPS rows x 64 keys. The copies hide under the first products.
    float s[STRIPS][N_TILES][4];
#pragma unroll
    for (int m = 0; m < STRIPS; ++m)
#pragma unroll
      for (int n = 0; n < N_TILES; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][n][e] = 0.f;
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
#if Q_REGISTERS
      unsigned(&a)[STRIPS][4] = q[kk];
#else
      unsigned a[STRIPS][4];
#pragma unroll
      for (int m = 0; m < STRIPS; ++m)
        ldmatrix_x4(a[m], Layout<D>::step(q_lane_smem + m * 16 * Layout<D>::PITCH, kk));
#endif
#pragma unroll
      for (int n = 0; n < N_TILES; n += 2) {
        unsigned b[4];
        ldmatrix_x4(b, Layout<D>::step(k_tile_smem, kk) + n * 8 * Layout<D>::PITCH);
#pragma unroll
        for (int m = 0; m < STRIPS; ++m) {
          mma_m16n8k16(s[m][n], a[m], b[0], b[1]);
          mma_m16n8k16(s[m][n + 1], a[m], b[2], b[3]);
        }
      }
#if K_STAGES == 2
      // The other buffer is free: every thread has passed the vote on its tile.
      if (kk == 0) {
#if WHOLE
        const int key = max(coming, 0) * BLOCK_K;  // past the last tile: any, nobody reads it
        copy_k.clamped((stage ^ 1) * K_BYTES, key, p.k_len - key);
#else
        if (coming >= 0) load_k(coming, stage ^ 1);
#endif
        cp_async_commit();
      }
#endif
#if DECIDE != 3
      if (kk == 0) record(tile);
#endif
#if ATTEND
      if (kk == 1) {
        if (likely) load_v(tile, v_stage);
        cp_async_commit();
      }
#endif
    }

#if SOFTCAP
#pragma unroll
    for (int m = 0; m < STRIPS; ++m)
#pragma unroll
      for (int n = 0; n < N_TILES; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][n][e] = p.softcap * tanh_exp(s[m][n][e] * to_cap);
#endif

#if PADDED
    const u64 keys = key_bits[tile];
#else
    constexpr u64 keys = ~0ull;
#endif
    if (tile < g.clear_begin || tile >= g.clear_end || keys != ~0ull) {
#pragma unroll
      for (int r = 0; r < 2 * STRIPS; ++r) {
        const int position = opaque(g.block_low) + row_of(r);  // not worth registers in the loop
        int lo = 0, hi = p.k_len;
        if (p.causal) hi = min(hi, position + 1);
        if (p.window) {
          lo = max(lo, position - p.window + 1);
          if (!p.causal) hi = min(hi, position + p.window);
        }
        hide_keys(s, r, keys & range_bits(tile, lo, hi));
      }
    }

    float row_max[2 * STRIPS];  // over this thread's 16 scores of the row
#pragma unroll
    for (int r = 0; r < 2 * STRIPS; ++r) row_max[r] = row_maximum(s, r);

    // Keep the tile? Not `x < bound`, so that a NaN keeps it.
#if DECIDE == 1 || DECIDE == 2
    bool keep = tile < g.drop_begin || tile >= g.drop_end || keep_all;
#if DECIDE == 1
    if (own_maxima) {
#pragma unroll
      for (int r = 0; r < 2 * STRIPS; ++r) {
        row_max[r] = quad_max(row_max[r]);
        const float before = gate_running[row_of(r)];
        __syncwarp();
        bound[r] = votes(r) ? fmaxf(before + threshold, LOWEST) : -NEG_INF;
        if (t4 == 0) gate_running[row_of(r)] = max_nan(before, row_max[r]);
      }
    }
#endif
#pragma unroll
    for (int r = 0; r < 2 * STRIPS; ++r) keep |= !(row_max[r] < bound[r]);
#endif

    // After this barrier the next K tile is there for all, and this one may be overwritten.
#if K_STAGES == 2
    cp_async_wait<ATTEND>();
#endif
#if DECIDE == 1 || DECIDE == 2
    kept = __syncthreads_or(keep);
#else
    __syncthreads();
#if DECIDE == 0
    kept = true;
#else
    constexpr bool kept = true;
#endif
#endif

#if ATTEND
    if (kept && !likely) {
      load_v(tile, v_stage);
      cp_async_commit();
    }
#endif
#if K_STAGES == 2
    stage ^= 1;
#else
    if (coming >= 0) load_k(coming, 0);
    cp_async_commit();
#endif
#if DECIDE != 3
    previous = tile;
#endif
    tile = coming;
    coming = later;

#if !ATTEND
#pragma unroll
    for (int r = 0; r < 2 * STRIPS; ++r) {
      running[r] = max_nan(running[r], quad_max(row_max[r]));
#if DECIDE == 1
      if (bound[r] != -NEG_INF) bound[r] = fmaxf(running[r] + threshold, LOWEST);
#endif
    }
#else
    if (kept) {
      float shift[2 * STRIPS];  // maximum in base-2 units, subtracted before the exponential
      bool moved = false;
      float old[2 * STRIPS];
#pragma unroll
      for (int r = 0; r < 2 * STRIPS; ++r) {
        old[r] = running[r];
        running[r] = max_nan(old[r], quad_max(row_max[r]));
        moved |= running[r] != old[r];
        shift[r] = running[r] == NEG_INF ? 0.f : running[r] * scale_log2;
#if DECIDE == 1
        if (bound[r] != -NEG_INF) bound[r] = fmaxf(running[r] + threshold, LOWEST);
#endif
      }
      if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
        for (int r = 0; r < 2 * STRIPS; ++r) {
          const float factor = exp2_approx(old[r] * scale_log2 - shift[r]);
          sum[r] *= factor;
#pragma unroll
          for (int n = 0; n < DV_TILES; ++n) {
            acc[r >> 1][n][(r & 1) * 2] *= factor;
            acc[r >> 1][n][(r & 1) * 2 + 1] *= factor;
          }
        }
      }

      cp_async_wait<K_STAGES == 1>();  // V; with one K buffer, K was asked for after it
      __syncthreads();
      const unsigned v_tile_smem = v_lane_smem + v_stage * V_BYTES;
#pragma unroll
      for (int kk = 0; kk < BLOCK_K / 16; ++kk) {
        unsigned a[STRIPS][4];
#pragma unroll
        for (int m = 0; m < STRIPS; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float(&x)[4] = s[m][2 * kk + half];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              x[e] = exp2_approx(x[e] * scale_log2 - shift[2 * m + (e >> 1)]);
              sum[2 * m + (e >> 1)] += x[e];
            }
            a[m][2 * half] = pack_16bit(x[0], x[1]);
            a[m][2 * half + 1] = pack_16bit(x[2], x[3]);
          }
        }
#pragma unroll
        for (int n = 0; n < DV_TILES; n += 2) {
          unsigned b[4];
          ldmatrix_x4_trans(
              b, Layout<DV>::step(v_tile_smem, n / 2) + kk * 16 * Layout<DV>::PITCH);
#pragma unroll
          for (int m = 0; m < STRIPS; ++m) {
            mma_m16n8k16(acc[m][n], a[m], b[0], b[1]);
            mma_m16n8k16(acc[m][n + 1], a[m], b[2], b[3]);
          }
        }
      }
#if V_STAGES == 2
      v_stage ^= 1;
#endif
    }
#if DECIDE == 1 || DECIDE == 2
    likely = kept;
#endif
#if V_STAGES == 1
    if (kept) __syncthreads();  // V is read before the next tile's V overwrites it
#endif
#endif
#if K_STAGES == 1
    cp_async_wait<0>();
    __syncthreads();
#endif
  }

#if DECIDE != 3
  record(-1);
  // Counts, from the mask just written.
  __syncthreads();
  int candidates = 0, dropped = 0;
  for (int j = max(g.drop_begin, g.tile_begin) + threadIdx.x; j < g.drop_end; j += THREADS) {
    if (!visible(j)) continue;
    ++candidates;
    dropped += !((mask_gmem[j >> 5] >> (j & 31)) & 1);
  }
  candidates = __reduce_add_sync(0xffffffffu, candidates);
  dropped = __reduce_add_sync(0xffffffffu, dropped);
  if (lane == 0 && candidates) {
    atomicAdd(p.counts + 2 * head, static_cast<u64>(dropped));
    atomicAdd(p.counts + 2 * head + 1, static_cast<u64>(candidates));
  }
#endif

#if ATTEND
  cp_async_wait<0>();
  float inverse[2 * STRIPS];
#pragma unroll
  for (int r = 0; r < 2 * STRIPS; ++r) {
    const int row = g.first_row + row_of(r);
    sum[r] = quad_sum(sum[r]);
    const bool empty = sum[r] == 0.f;
    inverse[r] = empty ? 0.f : 1.f / sum[r];
    float total = empty ? NEG_INF : running[r] * scale_log2 + log2_approx(sum[r]);
    if (p.sinks) {
      const float seen = total;
      total = log2_add(seen, p.sinks[head] * LOG2E);
      if (!empty) inverse[r] *= exp2_approx(seen - total);
    }
    if (t4 == 0 && row >= g.row_begin && row < g.row_end)
      p.lse[(static_cast<long long>(batch) * p.heads + head) * p.q_len + row] =
          total * LN2;
  }
#if Q_REGISTERS == 2
  __syncthreads();  // V is read before the output overwrites it
#endif
  // Staged in this warp's own rows of the Q buffer.
  const long long out_row = static_cast<long long>(p.heads) * p.v_dim;
  unsigned short* out_gmem = static_cast<unsigned short*>(p.out) +
                             static_cast<long long>(batch) * p.q_len * out_row + head * p.v_dim;
  store_rows<STRIPS, DV>(acc, inverse, shared, out_gmem, out_row, warp_row, g.first_row,
                         g.row_begin, g.row_end, p.v_dim, lane);
#endif
}
