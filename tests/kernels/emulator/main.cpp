// A kernel (macro KERNEL) as a function of the CPU: one CTA that does all items.
#include "emulator.h"

#include "kernel.inc"  // its source and its headers, some of them fakes

struct Arguments {
  TensorMap maps[3];
  Params p;
};
static Arguments arguments;

static void thread() {
  KERNEL(arguments.maps[0], arguments.maps[1], arguments.maps[2], arguments.p);
}

// Null, or what went wrong. param_bytes: as many as `params` has where it was packed.
extern "C" __attribute__((visibility("default"))) const char* emulate(
    const TensorMap* maps, const Params* params, int param_bytes, unsigned seed) {
  if (param_bytes != sizeof(Params)) return "the parameters are packed as another struct";
  arguments = {{maps[0], maps[1], maps[2]}, *params};
  if (const char* failure = run_cta(thread, seed)) return failure;
  for (const Meeting& named : of_cta<NamedBarriers>().at)
    if (named.count) return "arrivals are left at a named barrier";
  return nullptr;
}
