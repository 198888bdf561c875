// A key padding mask as the attention kernel reads it: one bit a key, and the tiles that count.

#define BLOCK_K 64
#define WARPS 32

// One block of threads per batch row. mask [B, Lk] bytes, 1: a real key; bits [B, tiles]: bit c of
// tile j is key 64 j + c; bounds [B, 2]: the tiles between the first and the last real key.
struct Params {
  const unsigned char* mask;
  unsigned long long* bits;
  int* bounds;
  long long stride_b, stride_l;
  int k_len;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) padding(const Params p) {
  __shared__ int first_smem[WARPS], stop_smem[WARPS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int tiles = (p.k_len + BLOCK_K - 1) / BLOCK_K;
  const unsigned char* mask = p.mask + blockIdx.x * p.stride_b;
  int first = tiles, stop = 0;
#pragma unroll 4
  for (int tile = warp; tile < tiles; tile += WARPS) {
    const int key = tile * BLOCK_K + lane;
    const bool low = key < p.k_len && mask[key * p.stride_l];
    const bool high = key + 32 < p.k_len && mask[(key + 32) * p.stride_l];
    const unsigned low_bits = __ballot_sync(0xffffffffu, low);
    const unsigned high_bits = __ballot_sync(0xffffffffu, high);
    if (lane == 0)
      p.bits[static_cast<long long>(blockIdx.x) * tiles + tile] =
          static_cast<unsigned long long>(high_bits) << 32 | low_bits;
    if (low_bits | high_bits) {
      first = min(first, tile);
      stop = tile + 1;
    }
  }
  if (lane == 0) {
    first_smem[warp] = first;
    stop_smem[warp] = stop;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int n = 0; n < WARPS; ++n) {
      first = min(first, first_smem[n]);
      stop = max(stop, stop_smem[n]);
    }
    p.bounds[2 * blockIdx.x] = min(first, stop);
    p.bounds[2 * blockIdx.x + 1] = stop;
  }
}
