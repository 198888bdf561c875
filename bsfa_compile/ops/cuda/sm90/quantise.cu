// K to int8 for the gate: less its mean over keys, each channel over its spread (reference.py), one
// scale per 64-key tile, and each tile's norm.
//
// Two kernels. `sum_keys` adds K and its squares up in fixed chunks, so that mean and spread do not
// depend on the order in which CTAs run; `quantise_keys` adds the chunks, centres, rounds. Q is
// quantised by the gate itself, in registers. Macros: HEAD_DIM, BF16.
#include "base.cuh"
#include "halves.cuh"
#include "numeric.cuh"
#include "warps.cuh"

#define ROW_BYTES (HEAD_DIM <= 64 ? 64 : HEAD_DIM <= 128 ? 128 : 256)  // an int8 row, padded
#define GROUP_TILES 4
#define GROUP_META 8  // floats: two scales and two norms for each pair of tiles
#define NAN __int_as_float(0x7fffffff)
#define CHANNEL_META (2 * ROW_BYTES)  // floats of a kv head: one for each channel, then another

struct Keys {
  const u16* k_gmem;  // [B, Hkv, Lk, HEAD_DIM], any strides but the last
  i64 stride_b, stride_h, stride_l;
  int kv_heads, k_len;
  int chunk, chunks;  // keys whose sum one CTA forms
};

DEVICE const u16* row_of(const Keys& p, int head, int key) {
  return p.k_gmem + (head / p.kv_heads) * p.stride_b + (head % p.kv_heads) * p.stride_h +
         key * p.stride_l;
}

// Sums are of K less one of its keys: squares of what is nearly constant would cancel out.
DEVICE const u16* origin(const Keys& p, int head) { return row_of(p, head, p.k_len / 2); }

// Memory that the kernels after this one add to: the tile mask, its counts, work counters.
struct Zeros {
  u32* at_gmem[3];
  i64 words[3];
};

// grid (chunks, B*Hkv). sums_gmem [B*Hkv, chunks, CHANNEL_META]: of K less its origin, of the
// squares; beyond HEAD_DIM never read.
extern "C" __global__ void __launch_bounds__(256)
    sum_keys(const Keys p, float* sums_gmem, const Zeros zeros) {
  constexpr int LANES = HEAD_DIM / 8, ROWS = 256 / LANES;  // threads a row, rows at a time
  __shared__ float part_smem[2][ROWS][HEAD_DIM + 4];
  allow_next_kernel();
  const int head = blockIdx.y, lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
  const i64 thread = ((i64)blockIdx.y * gridDim.x + blockIdx.x) * 256 + threadIdx.x;
#pragma unroll
  for (int i = 0; i < 3; i++)
    for (i64 w = thread; w < zeros.words[i]; w += (i64)gridDim.x * gridDim.y * 256)
      zeros.at_gmem[i][w] = 0;
  const int stop = min(p.k_len, (int)(blockIdx.x + 1) * p.chunk);
  float sum[8] = {}, square[8] = {};
  if (row < ROWS) {
    float shift[8];
    unpack8(__ldg((const uint4*)(origin(p, head) + lane * 8)), shift);
#pragma unroll 8
    for (int key = blockIdx.x * p.chunk + row; key < stop; key += ROWS) {
      float x[8];
      unpack8(__ldg((const uint4*)(row_of(p, head, key) + lane * 8)), x);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float moved = x[i] - shift[i];
        sum[i] += moved;
        square[i] = fmaf(moved, moved, square[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      part_smem[0][row][lane * 8 + i] = sum[i];
      part_smem[1][row][lane * 8 + i] = square[i];
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < 2 * HEAD_DIM; c += 256) {
    const int of = c / HEAD_DIM, channel = c % HEAD_DIM;
    float* sums = sums_gmem + ((i64)head * p.chunks + blockIdx.x) * CHANNEL_META;
    float total = 0.f;
    for (int i = 0; i < ROWS; i++) total += part_smem[of][i][channel];
    sums[of * ROW_BYTES + channel] = total;
  }
}

// grid (groups of 256 keys, B*Hkv). k8_gmem [B*Hkv, Lk, ROW_BYTES] int8,
// meta_gmem [B*Hkv, groups, GROUP_META], mean_gmem [B*Hkv, CHANNEL_META]: K's mean, its spread.
#define ROW_LANES (ROW_BYTES / 8)
#define TILE_THREADS (ROW_BYTES < 256 ? 64 : 128)
#define ROWS_AT_ONCE (TILE_THREADS / ROW_LANES)
#define STEPS (64 / ROWS_AT_ONCE)
extern "C" __global__ void __launch_bounds__(GROUP_TILES* TILE_THREADS, ROW_BYTES < 256 ? 2 : 1)
    quantise_keys(const Keys p, const float* sums_gmem, u8* k8_gmem, float* meta_gmem,
                  float* mean_gmem) {
  constexpr int WARPS = TILE_THREADS / 32;
  __shared__ float mean_smem[ROW_BYTES], inverse_smem[ROW_BYTES];
  __shared__ float peak_smem[GROUP_TILES][WARPS], norm_smem[GROUP_TILES][WARPS];
  allow_next_kernel();
  const int head = blockIdx.y, t = threadIdx.x;
  const int tile = t / TILE_THREADS, in_tile = t % TILE_THREADS;
  const int lane = in_tile % ROW_LANES, row0 = in_tile / ROW_LANES;
  const int key0 = (blockIdx.x * GROUP_TILES + tile) * 64 + row0;
  const bool has_data = lane * 8 < HEAD_DIM;
  uint4 raw[STEPS];
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    const int key = key0 + i * ROWS_AT_ONCE;
    raw[i] = make_uint4(0, 0, 0, 0);
    if (key < p.k_len && has_data) raw[i] = __ldg((const uint4*)(row_of(p, head, key) + lane * 8));
  }
  wait_for_previous_kernel();
  if (t < ROW_BYTES) {
    float total = 0.f, squares = 0.f, shift = 0.f, unused;
    if (t < HEAD_DIM) {
      unpack_16bit(origin(p, head)[t], shift, unused);
#pragma unroll 8
      for (int c = 0; c < p.chunks; c++) {
        const float* sums = sums_gmem + ((i64)head * p.chunks + c) * CHANNEL_META + t;
        total += sums[0];
        squares += sums[ROW_BYTES];
      }
    }
    const float moved = total / (float)p.k_len, mean = shift + moved;
    const float variance = max_nan(fmaf(-moved, moved, squares / (float)p.k_len), 0.f);
    const float fourth_root = __fsqrt_rn(__fsqrt_rn(variance));
    const float spread = fourth_root * __fsqrt_rn(fourth_root);
    mean_smem[t] = mean;
    inverse_smem[t] = spread == 0.f ? 0.f : 1.f / spread;
    if (blockIdx.x == 0) {
      mean_gmem[head * CHANNEL_META + t] = mean;
      mean_gmem[head * CHANNEL_META + ROW_BYTES + t] = spread;
    }
  }
  __syncthreads();

  float mean[8], inverse_spread[8], peak = 0.f, norm = 0.f;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    mean[i] = mean_smem[lane * 8 + i];
    inverse_spread[i] = inverse_smem[lane * 8 + i];
  }
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    float x[8], square = 0.f;
    unpack8(raw[i], x);
#pragma unroll
    for (int e = 0; e < 8; e++) {
      x[e] = key0 + i * ROWS_AT_ONCE < p.k_len ? (x[e] - mean[e]) * inverse_spread[e] : 0.f;
      peak = fmaxf(peak, fabsf(x[e]));
      square = fmaf(x[e], x[e], square);
    }
#pragma unroll
    for (int d = ROW_LANES / 2; d; d >>= 1) square += __shfl_xor_sync(FULL_WARP, square, d);
    norm = max_nan(norm, square);
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    peak = fmaxf(peak, __shfl_xor_sync(FULL_WARP, peak, d));
    norm = max_nan(norm, __shfl_xor_sync(FULL_WARP, norm, d));
  }
  if ((t & 31) == 0) {
    peak_smem[tile][in_tile / 32] = peak;
    norm_smem[tile][in_tile / 32] = norm;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; i++) {
    peak = fmaxf(peak, peak_smem[tile][i]);
    norm = max_nan(norm, norm_smem[tile][i]);
  }
  // A NaN or an infinity in K makes the mean NaN and so every norm: the scale becomes NaN, which
  // no comparison of the gate can drop.
  const bool finite = norm < __int_as_float(0x7f800000);
  const float scale = finite ? fmaxf(__fdiv_rn(peak, 127.f), 1.17549435e-38f) : NAN;
  const float inverse = 1.f / scale;
  if (t % TILE_THREADS == 0) {
    float* meta = meta_gmem + ((i64)head * gridDim.x + blockIdx.x) * GROUP_META;
    meta[tile / 2 * 4 + tile % 2] = scale;
    meta[tile / 2 * 4 + 2 + tile % 2] = finite ? sqrtf(norm) * INT8_MARGIN : NAN;
  }
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    const int key = key0 + i * ROWS_AT_ONCE;
    if (key >= p.k_len) continue;
    // Unpacked anew: kept as floats from above, the tile would not fit the registers.
    asm volatile("" : "+r"(raw[i].x), "+r"(raw[i].y), "+r"(raw[i].z), "+r"(raw[i].w));
    float x[8];
    unpack8(raw[i], x);
    u32 packed[2] = {};
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const float centred = (x[e] - mean[e]) * inverse_spread[e];
      // One Newton step makes the product the correctly rounded quotient, as the reference's is.
      const float guess = centred * inverse;
      const float quotient = fmaf(fmaf(-guess, scale, centred), inverse, guess);
      packed[e / 4] |= (u32)(__float2int_rn(quotient) & 255) << (e % 4 * 8);
    }
    *(uint2*)(k8_gmem + ((i64)head * p.k_len + key) * ROW_BYTES + lane * 8) =
        make_uint2(packed[0], packed[1]);
  }
}
