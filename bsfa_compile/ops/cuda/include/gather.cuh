// Sixteen bytes a lane from the four that each lane of a quad holds: stores of whole sectors.
#include "base.cuh"

// The four lanes of a quad each hold a quarter of four 16-byte pieces; afterwards lane i has all of
// piece i.
DEVICE uint4 gather_quad(const u32 (&x)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  const u32 a = __shfl_xor_sync(FULL_WARP, odd ? x[0] : x[1], 1);
  const u32 b = __shfl_xor_sync(FULL_WARP, odd ? x[2] : x[3], 1);
  const u32 a0 = odd ? a : x[0], a1 = odd ? x[1] : a, b0 = odd ? b : x[2], b1 = odd ? x[3] : b;
  const u32 c = __shfl_xor_sync(FULL_WARP, high ? a0 : b0, 2);
  const u32 d = __shfl_xor_sync(FULL_WARP, high ? a1 : b1, 2);
  return high ? make_uint4(c, d, b0, b1) : make_uint4(a0, a1, c, d);
}
