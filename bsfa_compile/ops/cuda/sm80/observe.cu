// What calibration asks of one attention call, in one pass over its scores: for every tile that
// may be dropped, the statistic of both gates and the softmax mass. No V, no output.
//
// A block of threads takes (q block, head) items off a counter and visits their tiles like the gate:
// sink tiles first, then from the last one downwards. A row's share of a tile is known only when
// its last tile has been seen, so until then the log of each row's sum over each tile waits in
// scratch memory of this block of threads (128 numbers a tile, not one a score).
//
// Macros: BF16; D (head dim, padded to 64/96/128/192/256); WARPS (4: 32 rows each, 8: 16); SOFTCAP;
//   PADDED (there is a key padding mask); WHOLE (the head dim is D); K_STAGES (shared-memory
//   buffers); MIN_BLOCKS (on a multiprocessor).

#include "geometry.cuh"
#include "ldmatrix.cuh"
#include "mma_sm80.cuh"
#include "numeric.cuh"
#include "ordered.cuh"
#include "score_tile.cuh"
#include "shared_tile.cuh"

#define THREADS (WARPS * 32)
#define STRIPS (BLOCK_Q / WARPS / 16)  // m16 strips of a warp
#define ROWS (2 * STRIPS)              // rows of a thread
#define N_TILES (BLOCK_K / 8)          // n8 tiles of the scores
#define SLOT (BLOCK_Q + 2 * WARPS)     // numbers that wait for one tile

typedef unsigned long long u64;

struct Params {
  const void* q;          // [H, Lq, head_dim], last stride 1
  const void* k;          // [Hkv, Lk, head_dim]
  float* statistic;       // [2, H, blocks, tiles]: relative, absolute; scaled, natural-log units
  float* mass;            // [H, blocks, tiles]: softmax mass, summed over the rows that vote
  float* scratch;         // [gridDim.x, tiles, SLOT]
  int* counter;           // zero on entry
  const u64* key_bits;    // [k tiles]: bit c is key c of the tile unpadded; if PADDED
  const int* key_bounds;  // [2]: tiles between the first and the last unpadded key
  long long q_head, k_head;  // elements between heads
  int q_row, k_row;          // and between rows
  int q_start, heads, group, q_len, k_len, head_dim;
  int first_block, blocks;  // mask rows of the outputs
  int first_tile, tiles;    // and their tiles; others are visited but not written
  int sink_tiles, causal, window;
  float scale, softcap;
};

#define Q_BYTES (BLOCK_Q * Layout<D>::PITCH)
#define K_BYTES (BLOCK_K * Layout<D>::PITCH)

// x[lane % ROWS]: of the rows that four lanes share, the one that a lane looks after.
__device__ __forceinline__ float own(const float (&x)[ROWS]) {
  const float low = threadIdx.x & 1 ? x[1] : x[0];
#if STRIPS == 2
  const float high = threadIdx.x & 1 ? x[3] : x[2];
  return threadIdx.x & 2 ? high : low;
#else
  return low;
#endif
}

// The same of the sums over the four lanes.
__device__ __forceinline__ float own_sum(const float (&x)[ROWS]) {
  const bool odd = threadIdx.x & 1;
#if STRIPS == 2
  const bool upper = threadIdx.x & 2;
  const float low = (upper ? x[2] : x[0]) + __shfl_xor_sync(~0u, upper ? x[0] : x[2], 2);
  const float high = (upper ? x[3] : x[1]) + __shfl_xor_sync(~0u, upper ? x[1] : x[3], 2);
  return (odd ? high : low) + __shfl_xor_sync(~0u, odd ? low : high, 1);
#else
  const float sum = (odd ? x[1] : x[0]) + __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
  return sum + __shfl_xor_sync(~0u, sum, 2);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) observe(const Params p) {
  extern __shared__ __align__(128) char shared[];
  __shared__ __align__(16) float log_total[BLOCK_Q];  // base 2, a row's sum; +inf: it has no vote
  __shared__ int item_smem;
  const unsigned q_smem = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const unsigned k_smem = q_smem + Q_BYTES;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int t4 = lane & 3, row4 = lane >> 2, warp_row = warp * (STRIPS * 16);
  const int k_tiles = (p.k_len + BLOCK_K - 1) / BLOCK_K;
#if PADDED
  const int first_tile = p.key_bounds[0], stop_tile = p.key_bounds[1];
#else
  const int first_tile = 0, stop_tile = k_tiles;
#endif
#if SOFTCAP
  const float scale = 1.f;  // of the scores as they leave the product
  const float to_cap = p.scale / p.softcap;
#else
  const float scale = p.scale;
#endif
  const float scale_log2 = scale * LOG2E;

  // Rows of this thread: warp_row + 16 * (r / 2) + 8 * (r % 2) + row4 for r < ROWS.
  auto row_of = [&](int r) { return warp_row + (r >> 1) * 16 + (r & 1) * 8 + row4; };
  const int own_row = row_of(lane & (ROWS - 1));
  float* slots_gmem = p.scratch + static_cast<long long>(blockIdx.x) * p.tiles * SLOT;

  for (;;) {
    if (threadIdx.x == 0) item_smem = atomicAdd(p.counter, 1);
    __syncthreads();
    const int item = item_smem;
    if (item >= p.blocks * p.heads) return;
    const int row = p.blocks - 1 - item % p.blocks;  // longest causal rows first
    const int head = item / p.blocks;
    const Geometry g = make_geometry(p.first_block + row, p.q_start, p.q_len, p.k_len, p.causal,
                                     p.window, p.sink_tiles, first_tile, stop_tile);
    bool votes = own_row >= g.row_begin - g.first_row && own_row < g.row_end - g.first_row;
#if PADDED
    const int position = g.block_low + own_row;
    if (votes && p.causal && position < p.k_len)
      votes = (p.key_bits[floor_tile(position)] >> (position & 63)) & 1;
#endif
    // Also: every thread has read item_smem.
    if (!__syncthreads_or(votes)) continue;

    // Whether padding leaves something of a tile that the rest of the mask leaves.
    auto visible = [&](int tile) {
#if PADDED
      return (p.key_bits[tile] & range_bits(tile, g.key_begin, g.key_end)) != 0;
#else
      return true;
#endif
    };
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

    const char* q_gmem = static_cast<const char*>(p.q) + 2 * (head * p.q_head);
    const char* k_gmem = static_cast<const char*>(p.k) + 2 * (head / p.group * p.k_head);
    const TileCopy<BLOCK_K, D, THREADS> copy_k(k_smem, k_gmem, p.k_row);
    auto load_k = [&](int tile, int buffer) {
      copy_k(buffer * K_BYTES, tile * BLOCK_K, 0, p.k_len - tile * BLOCK_K, p.head_dim);
    };
    int tile = next_tile();
    int coming = tile >= 0 ? next_tile() : -1;
    TileCopy<BLOCK_Q, D, THREADS>(q_smem, q_gmem, p.q_row)(
        0, g.first_row, g.row_begin - g.first_row, g.row_end - g.first_row, p.head_dim);
    if (tile >= 0) load_k(tile, 0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    // ldmatrix addresses of this lane: the first chunk of its row.
    const unsigned q_lane_smem = opaque(q_smem + Layout<D>::at(warp_row + (lane & 15), lane >> 4));
    const unsigned k_lane_smem =
        opaque(k_smem + Layout<D>::at((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1));
    int stage = 0;  // K buffer of `tile`

    float running[ROWS];  // maximum so far, raw scores
#pragma unroll
    for (int r = 0; r < ROWS; ++r) running[r] = NEG_INF;
    float sum = 0.f;    // of the own row, over 2^shift
    float shift = 0.f;  // its running maximum in base-2 units

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
        unsigned a[STRIPS][4];
#pragma unroll
        for (int m = 0; m < STRIPS; ++m)
          ldmatrix_x4(a[m], Layout<D>::step(q_lane_smem + m * 16 * Layout<D>::PITCH, kk));
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
        if (kk == 0) {  // the other buffer is free: every thread has passed the last barrier
#if WHOLE
          const int key = max(coming, 0) * BLOCK_K;  // past the last tile: any, nobody reads it
          copy_k.clamped((stage ^ 1) * K_BYTES, key, p.k_len - key);
#else
          if (coming >= 0) load_k(coming, stage ^ 1);
#endif
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
      const u64 keys = p.key_bits[tile];
#else
      constexpr u64 keys = ~0ull;
#endif
      if (tile < g.clear_begin || tile >= g.clear_end || keys != ~0ull) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const int at = opaque(g.block_low) + row_of(r);  // not worth registers in the loop
          int lo = 0, hi = p.k_len;
          if (p.causal) hi = min(hi, at + 1);
          if (p.window) {
            lo = max(lo, at - p.window + 1);
            if (!p.causal) hi = min(hi, at + p.window);
          }
          hide_keys(s, r, keys & range_bits(tile, lo, hi));
        }
      }

      float row_max[ROWS], row_sum[ROWS];
      const float before = __fmul_rn(own(running), scale);  // rounded, as the definition has it
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        row_max[r] = quad_max(row_maximum(s, r));
        running[r] = max_nan(running[r], row_max[r]);
        const float row_shift = running[r] == NEG_INF ? 0.f : running[r] * scale_log2;
        row_sum[r] = 0.f;
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            row_sum[r] += exp2_approx(s[r >> 1][n][(r & 1) * 2 + e] * scale_log2 - row_shift);
      }

      // From here on a lane speaks for one row.
      const float in_tile = own_sum(row_sum), largest = __fmul_rn(own(row_max), scale);
      const float now = own(running) == NEG_INF ? 0.f : own(running) * scale_log2;
      sum = sum == 0.f ? in_tile : sum * exp2_approx(shift - now) + in_tile;
      shift = now;
      // -inf where the row sees nothing of the tile: `-inf - -inf` must not become NaN.
      const bool counts = votes && largest != NEG_INF;
      const int relative = ordered(counts ? largest - before : NEG_INF);
      const int absolute = ordered(counts ? largest : NEG_INF);
      const int most_relative = __reduce_max_sync(~0u, relative);
      const int most_absolute = __reduce_max_sync(~0u, absolute);
      const int column = tile - p.first_tile;
      if (column >= 0 && column < p.tiles) {
        float* slot_gmem = slots_gmem + static_cast<long long>(column) * SLOT;
        if (t4 < ROWS) slot_gmem[own_row] = now + log2_approx(in_tile);
        if (lane == 0) {
          int* most_gmem = reinterpret_cast<int*>(slot_gmem + BLOCK_Q);
          most_gmem[warp] = most_relative;
          most_gmem[WARPS + warp] = most_absolute;
        }
      }

      // After this barrier the next K tile is there for all, and this one may be overwritten.
#if K_STAGES == 2
      cp_async_wait<0>();
      __syncthreads();
      stage ^= 1;
#else
      __syncthreads();
      if (coming >= 0) load_k(coming, 0);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
#endif
      tile = coming;
      coming = later;
    }

    if (t4 < ROWS) log_total[own_row] = votes && sum != 0.f ? shift + log2_approx(sum) : -NEG_INF;
    __syncthreads();  // and the scratch is written
    const float4 total = reinterpret_cast<const float4*>(log_total)[lane];
    const int drop_begin = max(max(g.drop_begin, g.tile_begin), p.first_tile);
    const int drop_end = min(g.drop_end, p.first_tile + p.tiles);
    const long long row_at = (static_cast<long long>(head) * p.blocks + row) * p.tiles;
    const long long plane = static_cast<long long>(p.heads) * p.blocks * p.tiles;
    auto share = [](float logarithm, float of_row) {
      return of_row == -NEG_INF ? 0.f : exp2_approx(logarithm - of_row);
    };
    for (int j = drop_begin + warp; j < drop_end; j += WARPS) {
      if (!visible(j)) continue;
      const float* slot_gmem = slots_gmem + static_cast<long long>(j - p.first_tile) * SLOT;
      const float4 part = reinterpret_cast<const float4*>(slot_gmem)[lane];
      float mass = share(part.x, total.x) + share(part.y, total.y) + share(part.z, total.z) +
                   share(part.w, total.w);
#pragma unroll
      for (int n = 16; n; n >>= 1) mass += __shfl_xor_sync(~0u, mass, n);
      const int most = lane < 2 * WARPS ? reinterpret_cast<const int*>(slot_gmem)[BLOCK_Q + lane]
                                        : ordered(NEG_INF);
      const int relative = __reduce_max_sync(~0u, lane < WARPS ? most : ordered(NEG_INF));
      const int absolute = __reduce_max_sync(~0u, lane < WARPS ? ordered(NEG_INF) : most);
      if (lane == 0) {
        const long long at = row_at + j - p.first_tile;
        p.statistic[at] = of_ordered(relative);
        p.statistic[at + plane] = of_ordered(absolute);
        // A NaN counts as lost in every tile, so that no threshold is built on its row.
        p.mass[at] = mass == mass ? mass : static_cast<float>(g.row_end - g.row_begin);
      }
    }
    __syncthreads();  // scratch, totals and Q are read before the next item overwrites them
  }
}
