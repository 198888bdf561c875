// Warp specialisation: registers per role, named barriers, and the order of kernels on a stream.
#include "base.cuh"

// What is the same in all lanes, so that the compiler knows.
DEVICE u32 uniform(u32 x) { return __shfl_sync(FULL_WARP, x, 0); }

template <int N> DEVICE void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> DEVICE void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
DEVICE void named_sync(int id, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void named_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Programmatic dependent launch: wait until the kernel before has ended and its writes are seen;
// let the kernel after this one start filling multiprocessors as they fall free.
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void allow_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
