// Exact decisions: computes in 16 bits what int8 left undecided.
//
// gate.cu (EXACT) keeps what passes for certain and says what may pass. The absolute gate lists
// single rows of 16 keys: first all warps go through the list, 5 KB to read instead of a tile, with
// mma.sync whose operands come straight from memory. Where more is open it marks the tile, as the
// relative gate always does; and that marks the tiles which may raise a row's running maximum.
//
// A work item is one q block (128 rows) of one head. Warp 0 of warpgroup 0, the loader, finds those
// that have open tiles and brings two tiles of K at a time, which need not be neighbours;
// warpgroups 1 and 2 own 64 rows each. A warp one of whose rows passes sets the tile's bit.
// RELATIVE: the sink tiles come first, then from the last tile downwards all that are open or may
// raise a maximum, until none is open any more. A tile left out has no row above its maximum so
// far: it would change nothing.
//
// Macros: HEAD_DIM, BF16, CAUSAL, WINDOW, PADDED, RELATIVE, SOFTCAP.
#include "base.cuh"
#include "spans.cuh"
#include "hide.cuh"
#include "mbarrier.cuh"
#include "mma_sm80.cuh"
#include "scores.cuh"
#include "tma.cuh"
#include "undecided.cuh"
#include "warps.cuh"
#include "wgmma.cuh"

#define Q_SLABS ((HEAD_DIM + 63) / 64)
#define K_STEPS ((HEAD_DIM + 15) / 16)
#define STEP_KEYS (2 * BLOCK_K)
#define SLOT_BYTES (Q_SLABS * STEP_KEYS * 128)
#define Q_BYTES (Q_SLABS * BLOCK_Q * 128)
#define Q_STAGES (HEAD_DIM <= 128 ? 2 : 1)
#define CLAIM 4  // items taken at a time: of the absolute gate's most have no open tile
#define WARPS 12
#define CHUNKS (HEAD_DIM / 8)            // of 16 bytes in a row of Q or K
#define CHUNK_STEPS ((CHUNKS + 3) / 4)   // the four lanes of a quad read one each
#define AT_ONCE (HEAD_DIM <= 128 ? 2 : 1)  // entries of the list under way in a warp

// Shared memory: barriers, item records, the tiles of each slot; Q; K slots.
#define SMEM_LIMIT 232448
#define FIT ((SMEM_LIMIT - 1024 - Q_STAGES * Q_BYTES) / SLOT_BYTES)
#define SLOTS (FIT < 8 ? FIT : 8)
#define K_FULL 0
#define K_EMPTY 64
#define Q_FULL 128
#define Q_EMPTY 144
#define ITEM_FULL 160
#define ITEM_EMPTY 176
#define ITEM 192
#define TILES 320
#define Q_AT 1024
#define K_AT (Q_AT + Q_STAGES * Q_BYTES)
#define NO_TILE 0x7fff  // beyond the last of MOST_KEYS
#define TILE_BITS 15
#define LAST_STEP (1u << 30)  // of its item
#define CUT (1u << 31)        // some score of it is hidden

// Where the rows of a tensor [B, H, L, HEAD_DIM] lie; strides in elements.
struct Rows {
  const u16* at_gmem;
  i64 stride_b, stride_h, stride_l;
  DEVICE const u16* row(int batch, int head, int i) const {
    return at_gmem + batch * stride_b + head * stride_h + i * stride_l;
  }
};

struct Params {
  Shape shape;
  Order order;
  Rows q, k;
  Undecided undecided;
  const float* thresholds_gmem;  // [H, columns], natural-log units
  u32* mask_gmem;                // [B, H, rows, words]; gains what passes
  int* counter_gmem;             // zero on entry
  int columns, heads, kv_heads, items;
  Scale scale;
  // In the units of `capped`.
  DEVICE float threshold_of(int head, int block) const {
    const float t = thresholds_gmem[head * columns + min(block, columns - 1)];
    return SOFTCAP ? t : t * reciprocal(scale.scale);
  }
};

struct Item : HeadBlock {
  // Where its line of the mask begins.
  DEVICE i64 line(const Params& p) const {
    return (((i64)batch * p.heads + head) * p.shape.rows + row) * p.shape.words;
  }
};

DEVICE Item item_of(const Params& p, int item) {
  return {head_block_of(p.order, p.shape, p.heads, p.kv_heads, item)};
}

// What is open in word w of the line at `line`.
DEVICE u32 open_tiles(const Params& p, i64 line, int w) {
  return w < p.shape.words ? p.undecided.open_gmem[line + w] & ~p.mask_gmem[line + w] : 0;
}

// An entry of the list, as the lane that read it knows it.
struct Entry {
  const u16 *q_gmem, *k_gmem;  // its row, and its first key
  u64 seen;                    // PADDED: bit 8 n + i set where key 8 n + 2 c + i is one
  float threshold;
};

// Scores of one row and 16 keys, both keys of this lane's quad: numbers g and g + 8, where number n
// is the entry's key 8 (n / 2) + n % 2. The four lanes of a quad hold the same.
struct Fragment {
  uint4 q[CHUNK_STEPS], k[2][CHUNK_STEPS];
  DEVICE void load(const Params& p, const Entry& e, int lane) {
    const int g = lane >> 2;
#pragma unroll
    for (int j = 0; j < CHUNK_STEPS; j++) {
      const int chunk = j * 4 + (lane & 3);
      const uint4 none = make_uint4(0, 0, 0, 0);
      const bool inside = CHUNKS % 4 == 0 || chunk < CHUNKS;
      q[j] = inside ? __ldg((const uint4*)e.q_gmem + chunk) : none;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int key = (g + 8 * h) / 2 * 8 + (g & 1);
        k[h][j] = inside ? __ldg((const uint4*)(e.k_gmem + key * p.k.stride_l) + chunk) : none;
      }
    }
  }
  // The order of the head dim is the operands' own: the same in both, so the sum is the same.
  DEVICE bool passes(const Params& p, const Entry& e, int lane) const {
    float d[4] = {};
#pragma unroll
    for (int j = 0; j < CHUNK_STEPS; j++) {
      const u32 low[4] = {k[0][j].x, k[1][j].x, k[0][j].y, k[1][j].y};
      const u32 high[4] = {k[0][j].z, k[1][j].z, k[0][j].w, k[1][j].w};
      mma_m16n8k16(d, low, q[j].x, q[j].y);
      mma_m16n8k16(d, high, q[j].z, q[j].w);
    }
    bool keep = false;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int n = (lane >> 2) + 8 * h;
      const bool seen = !PADDED || (e.seen >> (n / 2 * 8 + n % 2) & 1);
      keep |= seen && !(capped(p.scale, d[2 * h]) < e.threshold);
    }
    return __any_sync(FULL_WARP, keep);
  }
};

template <class T> DEVICE const T* from_lane(const T* x, int lane) {
  return (const T*)__shfl_sync(FULL_WARP, (u64)x, lane);
}

// Decides the entries of the list. All warps of the grid call.
DEVICE void decide_listed(const Params& p) {
  const int lane = threadIdx.x & 31, first_block = start_of(p.shape) / BLOCK_Q;
  const int first_row = first_block * BLOCK_Q - start_of(p.shape);
  const int count = min(*p.undecided.count_gmem, p.undecided.room);
  const int warp = blockIdx.x * WARPS + (threadIdx.x >> 5);
#pragma unroll 1
  for (int from = warp * 32; from < count; from += gridDim.x * WARPS * 32) {
    Entry mine = {};
    u32* word_gmem = p.mask_gmem;
    u32 bit = 0;
    bool open = from + lane < count, keep = false;
    if (open) {
      const uint2 found = p.undecided.list_gmem[from + lane];
      const int line = found.x, tile = found.y >> TILE_SHIFT, row = found.y >> 2 & 127;
      const int i = line % p.shape.rows, head = line / p.shape.rows % p.heads;
      const int batch = line / p.shape.rows / p.heads, c = found.y & 3;
      word_gmem += (i64)line * p.shape.words + tile / 32;
      bit = 1u << tile % 32;
      open = !(*word_gmem & bit);
      mine.q_gmem = p.q.row(batch, head, first_row + i * BLOCK_Q + row);
      mine.k_gmem = p.k.row(batch, head / (p.heads / p.kv_heads), tile * BLOCK_K + 2 * c);
      if (PADDED) mine.seen = pad_bits(p.shape, batch, tile) >> 2 * c;
      mine.threshold = p.threshold_of(head, first_block + i);
    }
    u32 left = __ballot_sync(FULL_WARP, open);
#pragma unroll 1
    while (left) {
      Entry e[AT_ONCE];
      Fragment fragment[AT_ONCE];
      int source[AT_ONCE];
#pragma unroll
      for (int n = 0; n < AT_ONCE; n++) {
        source[n] = left ? __ffs(left) - 1 : source[0];
        left &= left - 1;
        e[n].q_gmem = from_lane(mine.q_gmem, source[n]);
        e[n].k_gmem = from_lane(mine.k_gmem, source[n]);
        e[n].threshold = __shfl_sync(FULL_WARP, mine.threshold, source[n]);
        if (PADDED) e[n].seen = __shfl_sync(FULL_WARP, mine.seen, source[n]);
        fragment[n].load(p, e[n], lane);
      }
#pragma unroll
      for (int n = 0; n < AT_ONCE; n++) {
        const bool passes = fragment[n].passes(p, e[n], lane);
        if (lane == source[n]) keep = passes;
      }
    }
    if (keep) atomicOr(word_gmem, bit);
  }
}

// Brings the tiles of one item to its consumers. All lanes call; lane 0 acts.
struct Loader {
  const Params& p;
  const TensorMap *q_map, *k_map;
  u32 smem, slot, empty;
  int it, lane;

  // `state`: 0, or -1 after the last item.
  DEVICE void announce(int state, const Item& item, const Span& span) {
    const int s = it & 1;
    if (lane == 0) {
      barrier_wait(smem + ITEM_EMPTY + 8 * s, (it >> 1 & 1) ^ 1);
      const u32 record = smem + ITEM + 32 * s;
      store_shared(record, state);
      store_shared(record + 4, item.row);
      store_shared(record + 8, item.head);
      store_shared(record + 12, item.batch);
      barrier_arrive(smem + ITEM_FULL + 8 * s);
      if (state == 0) {
        const int q = it % Q_STAGES;
        barrier_wait(smem + Q_EMPTY + 8 * q, (it / Q_STAGES & 1) ^ 1);
        barrier_expect(smem + Q_FULL + 8 * q, Q_BYTES);
        for (int d = 0; d < Q_SLABS; d++)
          tma_load(smem + Q_AT + q * Q_BYTES + d * BLOCK_Q * 128, q_map, smem + Q_FULL + 8 * q,
                   d * 64, span.row0, item.head, item.batch);
      }
    }
    __syncwarp();
    it++;
  }
  // One step: tile a, and then b if there is one.
  DEVICE void bring(const Item& item, int a, int b, u32 flags) {
    if (lane == 0) {
      const u32 full = smem + K_FULL + 8 * slot, to = smem + K_AT + slot * SLOT_BYTES;
      barrier_wait(smem + K_EMPTY + 8 * slot, empty);
      store_shared(smem + TILES + 4 * slot, a | b << TILE_BITS | flags);
      barrier_expect(full, b == NO_TILE ? SLOT_BYTES / 2 : SLOT_BYTES);
      for (int d = 0; d < Q_SLABS; d++) {
        tma_load(to + d * STEP_KEYS * 128, k_map, full, d * 64, a * BLOCK_K, item.kv_head,
                 item.batch);
        if (b != NO_TILE)
          tma_load(to + (d * STEP_KEYS + BLOCK_K) * 128, k_map, full, d * 64, b * BLOCK_K,
                   item.kv_head, item.batch);
      }
    }
    __syncwarp();
    if (++slot == SLOTS) slot = 0, empty ^= 1;
  }
};

DEVICE void load_items(const Params& p, const TensorMap* q_map, const TensorMap* k_map, u32 smem) {
  const int lane = threadIdx.x & 31, q_start = start_of(p.shape);
  Loader loader = {p, q_map, k_map, smem, 0, 1, 0, lane};
  for (;;) {
    int claimed = 0;
    if (lane == 0) claimed = atomicAdd(p.counter_gmem, CLAIM);
    claimed = __shfl_sync(FULL_WARP, claimed, 0);
    if (claimed >= p.items) break;
    int lowest[CLAIM];  // open tile of each item
#pragma unroll
    for (int c = 0; c < CLAIM; c++) {
      lowest[c] = NO_TILE;
      if (claimed + c >= p.items) continue;
      const i64 line = item_of(p, claimed + c).line(p);
      for (int w = lane; w < p.shape.words; w += 32) {
        const u32 open = open_tiles(p, line, w);
        if (open) lowest[c] = min(lowest[c], w * 32 + __ffs(open) - 1);
      }
    }
#pragma unroll 1
    for (int c = 0; c < CLAIM; c++) {
      int low = lowest[0];
#pragma unroll
      for (int other = 1; other < CLAIM; other++) low = c == other ? lowest[other] : low;
      low = __reduce_min_sync(FULL_WARP, low);
      if (low == NO_TILE) continue;
      const Item item = item_of(p, claimed + c);
      const Span span = span_of(p.shape, q_start, item.row);
      const i64 line = item.line(p);
      // A step is brought when it is known whether it is the last. (The absolute gate's may be
      // fewer than were seen above: other blocks of threads still go through the list.)
      int pair[2], number = 0;
      u32 flags = 0;
      bool begun = false;
      auto bring = [&](u32 last) {
        if (!begun) loader.announce(0, item, span);
        begun = true;
        loader.bring(item, pair[0], number == 2 ? pair[1] : NO_TILE, flags | last);
        number = flags = 0;
      };
      auto add = [&](int tile) {
        if (number == 2) bring(0);
        if (number == 0) pair[0] = tile;
        else pair[1] = tile;
        number++;
        if (RELATIVE && cut(p.shape, span, item.batch, tile)) flags = CUT;
      };
      int sinks = 0;
      if (RELATIVE) {
        const int first = bounds_of(p.shape, item.batch).x;
        sinks = min(span.tile_hi, first + p.shape.sink_tiles);
        for (int tile = max(span.tile_lo, first); tile < sinks; tile++) add(tile);
      }
      for (int from = (p.shape.words - 1) / 32 * 32; from + 31 >= low / 32; from -= 32) {
        const int w = from + lane;
        u32 word = open_tiles(p, line, w);
        if (RELATIVE && w < p.shape.words) word |= p.undecided.raise_gmem[line + w];
        for (u32 lanes = __ballot_sync(FULL_WARP, word); lanes;) {
          const int source = 31 - __clz(lanes);
          lanes ^= 1u << source;
          for (u32 bits = __shfl_sync(FULL_WARP, word, source); bits;) {
            const int bit = 31 - __clz(bits), tile = (from + source) * 32 + bit;
            bits ^= 1u << bit;
            if (!RELATIVE || tile >= max(low, sinks)) add(tile);
          }
        }
      }
      if (number) bring(LAST_STEP);
    }
  }
  loader.announce(-1, Item{}, Span{});
}

extern "C" __global__ void __launch_bounds__(384, 1)
    resolve(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
            const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 dynamic_smem[];
  const u32 smem = shared_address(dynamic_smem);
  const int warpgroup = __shfl_sync(FULL_WARP, threadIdx.x >> 7, 0), lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) {
      barrier_init(smem + K_FULL + 8 * i, 1);
      barrier_init(smem + K_EMPTY + 8 * i, 8);
    }
    for (int i = 0; i < 2; i++) {
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
  if (!RELATIVE) decide_listed(p);
  if (warpgroup == 0) {
    if (threadIdx.x < 32) load_items(p, &q_map, &k_map, smem);
    return;
  }
  const int half = warpgroup - 1, warp = __shfl_sync(FULL_WARP, threadIdx.x >> 5 & 3, 0);
  const int q_start = start_of(p.shape);
  u32 slot = 0, full = 0;
  for (int it = 0;; it++) {
    barrier_wait(smem + ITEM_FULL + 8 * (it & 1), it >> 1 & 1);
    const u32 record = smem + ITEM + 32 * (it & 1);
    auto field = [&](u32 offset) { return __shfl_sync(FULL_WARP, load_shared(record + offset), 0); };
    const int state = field(0);
    Item item;
    item.row = field(4);
    item.head = field(8);
    item.batch = field(12);
    barrier_arrive(smem + ITEM_EMPTY + 8 * (it & 1));
    if (state < 0) break;
    const Span span = span_of(p.shape, q_start, item.row);
    const float t = p.threshold_of(item.head, span.block);
    u32* mask = p.mask_gmem + item.line(p);
    const int position = span.low + half * 64 + warp * 16 + (lane >> 2);
    bool voter[2];
    float m[2];  // RELATIVE: running maxima; else 0
#pragma unroll
    for (int r = 0; r < 2; r++) {
      voter[r] = votes(p.shape, span, item.batch, position + r * 8);
      m[r] = RELATIVE ? NEG_INF : 0.f;
    }
    const int q = it % Q_STAGES;
    const u32 q_smem = smem + Q_AT + q * Q_BYTES + half * 64 * 128;
    barrier_wait(smem + Q_FULL + 8 * q, it / Q_STAGES & 1);
    u32 step = 0;
#pragma unroll 1
    while (!(step & LAST_STEP)) {
      const u32 k_smem = smem + K_AT + slot * SLOT_BYTES;
      float s[64];
      barrier_wait(smem + K_FULL + 8 * slot, full);
      step = __shfl_sync(FULL_WARP, load_shared(smem + TILES + 4 * slot), 0);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < K_STEPS; i++) {
        const u64 a = k_major<128>(q_smem, i / 4 * (BLOCK_Q * 128) + i % 4 * 32);
        const u64 b = k_major<128>(k_smem, i / 4 * (STEP_KEYS * 128) + i % 4 * 32);
        if (i == 0) wgmma_ss<false>(s, a, b);
        else wgmma_ss<true>(s, a, b);
      }
      wgmma_commit();
      wgmma_wait<0>();
      pin(s);
      __syncwarp();
      if (lane == 0) barrier_arrive(smem + K_EMPTY + 8 * slot);
      if (++slot == SLOTS) slot = 0, full ^= 1;
      const int tiles[2] = {(int)(step & NO_TILE), (int)(step >> TILE_BITS & NO_TILE)};
      float x[2][2];
      if (PADDED || step & CUT)
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (tiles[i] != NO_TILE) hide_tile(s, i, p.shape, item.batch, tiles[i], position, lane);
      tile_max<64, 0>(s, x[0][0], x[0][1]);
      tile_max<64, 1>(s, x[1][0], x[1][1]);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const bool there = tiles[i] != NO_TILE;
        bool keep = false;
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const float own = voter[r] && there ? x[i][r] : NEG_INF;
          const float y = capped(p.scale, RELATIVE ? quad_max(own) : own);
          keep |= y != NEG_INF && !(y < m[r] + t);
          if (RELATIVE) m[r] = max_nan(m[r], y);
        }
        keep = __any_sync(FULL_WARP, keep);
        if (lane == 0 && keep) atomicOr(mask + tiles[i] / 32, 1u << tiles[i] % 32);
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(smem + Q_EMPTY + 8 * q);
  }
}
