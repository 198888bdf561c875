// mbarrier: phases that count arrivals and bytes, between the copy engine and warps.
#include "base.cuh"

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes the initialised barriers visible to the copy engine; a CTA barrier must follow.
DEVICE void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
#define BSFA_ASK(instruction, done, barrier, parity)                                           \
  asm volatile("{ .reg .pred p; mbarrier." instruction ".parity.shared::cta.b64 p, [%1], %2; " \
               "selp.u32 %0, 1, 0, p; }"                                                       \
               : "=r"(done)                                                                    \
               : "r"(barrier), "r"(parity)                                                     \
               : "memory")
// Whether the phase of this parity has ended; may wait for it a while.
DEVICE bool barrier_try(u32 barrier, u32 parity) {
  u32 done;
  BSFA_ASK("try_wait", done, barrier, parity);
  return done;
}
// The same, but never waits.
DEVICE bool barrier_test(u32 barrier, u32 parity) {
  u32 done;
  BSFA_ASK("test_wait", done, barrier, parity);
  return done;
}
// Waits for the phase of this parity to end. A pipeline that never gets there traps, since a
// kernel that hangs takes the whole card with it.
DEVICE void barrier_wait(u32 barrier, u32 parity) {
  if (barrier_try(barrier, parity)) return;
#pragma unroll 1
  for (int n = 0; n < 4000000; n++)
    if (barrier_try(barrier, parity)) return;
  __trap();
}
