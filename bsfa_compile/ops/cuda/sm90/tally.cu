// What a tile mask holds: counts the dropped tiles of each head, or (FILL = 1) writes the mask that
// keeps every visible tile. A warp per mask row, a lane per tile.
//
// counts [H, 2] gains (dropped, candidates): candidates are the visible tiles that are not always
// kept. Counting may run beside the end of attend.cu, which starts once the mask is final and only
// then lets this kernel start; what comes after this one finds attention done. Macros: CAUSAL, WINDOW,
// PADDED, FILL.
#include "base.cuh"
#include "spans.cuh"
#include "warps.cuh"

#define WARPS 4

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    tally(const Shape shape, u32* mask_gmem, u64* counts_gmem, int heads, int batch_rows) {
  allow_next_kernel();
  const int lane = threadIdx.x & 31, line = blockIdx.x * WARPS + (threadIdx.x >> 5);
  if (line >= batch_rows * heads * shape.rows) return;  // other warps wait below
  const int i = line % shape.rows, head = line / shape.rows % heads;
  const int batch = line / shape.rows / heads;
  const Span span = span_of(shape, start_of(shape), i);
  const int2 bounds = bounds_of(shape, batch);
  u32* words = mask_gmem + (i64)line * shape.words;
  u32 dropped = 0, candidates = 0;
  for (int w = span.tile_lo / 32; w * 32 < span.tile_hi; w++) {
    const int j = w * 32 + lane;
    const bool seen = visible(shape, span, batch, j);
    const u32 free = __ballot_sync(FULL_WARP, seen && !always_kept(shape, span, bounds, j));
    candidates += __popc(free);
    if (FILL) {
      const u32 all = __ballot_sync(FULL_WARP, seen);
      if (lane == 0) words[w] = all;
    } else {
      dropped += __popc(free & ~words[w]);
    }
  }
  if (lane == 0 && candidates) {
    if (dropped) atomicAdd(counts_gmem + 2 * head, (u64)dropped);
    atomicAdd(counts_gmem + 2 * head + 1, (u64)candidates);
  }
  wait_for_previous_kernel();
}
