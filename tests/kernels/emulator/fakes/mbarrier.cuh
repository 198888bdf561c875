// Stands for mbarrier.cuh: barriers of eight bytes that complain of what hardware leaves undefined.
#include "base.cuh"

struct Barrier {
  u32 expected : 12, pending : 12, phase : 8;
  int bytes;  // announced but not there yet; negative: there, but not announced

  void end_phase_if_complete() {
    if (pending || bytes) return;
    phase++;
    pending = expected;
  }
};

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
  shared<Barrier>(barrier) = {arrivals, arrivals, 0, 0};
}
DEVICE void barrier_init_done() {}
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  Barrier& b = shared<Barrier>(barrier);
  if (b.pending == 0) fail("more arrivals at barrier %u than expected", barrier);
  b.pending--;
  b.bytes += bytes;
  b.end_phase_if_complete();
}
DEVICE void barrier_arrive(u32 barrier) { barrier_expect(barrier, 0); }
DEVICE void barrier_bytes(u32 barrier, u32 bytes) {
  Barrier& b = shared<Barrier>(barrier);
  b.bytes -= bytes;
  b.end_phase_if_complete();
}
DEVICE bool barrier_test(u32 barrier, u32 parity) {
  return (shared<Barrier>(barrier).phase & 1) != parity;
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
  wait_until("an mbarrier", [&] { return barrier_test(barrier, parity); });
}
