// Stands for warps.cuh: named barriers; registers and the order of kernels mean nothing here.
#include "base.cuh"

struct NamedBarriers {
  Meeting at[16];
};

DEVICE u32 uniform(u32 x) { return __shfl_sync(FULL_WARP, x, 0); }
template <int N> DEVICE void registers_down() {}
template <int N> DEVICE void registers_up() {}
DEVICE void named_sync(int id, int threads) {
  of_cta<NamedBarriers>().at[id].sync(threads, "a named barrier");
}
DEVICE void named_arrive(int id, int threads) { of_cta<NamedBarriers>().at[id].arrive(threads); }
DEVICE void wait_for_previous_kernel() {}
DEVICE void allow_next_kernel() {}
