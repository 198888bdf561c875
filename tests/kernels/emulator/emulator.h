// CUDA on the CPU: the threads of one CTA are fibers that take turns, so that every wait is seen.
//
// A fiber runs until it must wait for others; what it wrote, all see. Errors of logic show (a wrong
// phase, a stage given back too early or never), errors of memory order and of timing cannot.
// Macros: CTA_THREADS, SMEM_BYTES of dynamic shared memory.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <utility>
#include <vector>

using std::max;
using std::min;

#define __global__
#define __shared__
#define __device__
#define __forceinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n)

struct uint3 {
  unsigned x, y, z;
};
struct int2 {
  int x, y;
};
struct uint2 {
  unsigned x, y;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  unsigned x, y, z, w;
};
static float2 make_float2(float x, float y) { return {x, y}; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static int2 make_int2(int x, int y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static uint3 threadIdx;
alignas(1024) unsigned char dynamic_smem[SMEM_BYTES];

// --- Fibers ---

// Why a fiber does not run.
struct Wait {
  const char* what;  // null: it has ended
  bool (*is_over)(const void* condition);
  const void* condition;
};
struct Cta {
  static constexpr size_t STACK = 128 << 10;
  ucontext_t scheduler, fibers[CTA_THREADS];
  Wait waits[CTA_THREADS];
  std::unique_ptr<char[]> stacks;
  void (*kernel)();
  unsigned launch;
  char failure[200];
};
static Cta cta;

// State that a CTA starts with afresh.
template <class T> T& of_cta() {
  static std::unique_ptr<T> state;
  static unsigned launch = 0;
  if (launch != cta.launch) state = std::make_unique<T>();
  launch = cta.launch;
  return *state;
}

// Ends the emulation: what is said here comes back from `run_cta`.
[[noreturn]] static void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  const int n = snprintf(cta.failure, sizeof cta.failure, "thread %u: ", threadIdx.x);
  vsnprintf(cta.failure + n, sizeof cta.failure - n, format, values);
  va_end(values);
  setcontext(&cta.scheduler);
  __builtin_unreachable();
}

template <class F> void wait_until(const char* what, F is_so) {
  if (is_so()) return;
  cta.waits[threadIdx.x] = {what, [](const void* f) { return (*(const F*)f)(); }, &is_so};
  swapcontext(&cta.fibers[threadIdx.x], &cta.scheduler);
}

static void fiber() {
  cta.kernel();
  cta.waits[threadIdx.x].what = nullptr;
  setcontext(&cta.scheduler);
}

// Runs all threads to their end; null, or what went wrong. seed 0: warps take turns evenly; others
// let some of them rest for a while, now these and now those.
static const char* run_cta(void (*kernel)(), unsigned seed) {
  constexpr int REST = 50, MOST_IDLE = 100 * REST;  // rounds
  cta.launch++;
  cta.kernel = kernel;
  cta.failure[0] = 0;
  cta.stacks = std::make_unique<char[]>(CTA_THREADS * Cta::STACK);
  memset(dynamic_smem, 0xff, SMEM_BYTES);  // NaN, and no barrier
  for (int i = 0; i < CTA_THREADS; i++) {
    cta.waits[i] = {"its start", [](const void*) { return true; }, nullptr};
    getcontext(&cta.fibers[i]);
    cta.fibers[i].uc_stack.ss_sp = &cta.stacks[i * Cta::STACK];
    cta.fibers[i].uc_stack.ss_size = Cta::STACK;
    makecontext(&cta.fibers[i], fiber, 0);
  }
  std::mt19937 random(seed);
  unsigned resting = 0, left = CTA_THREADS;  // resting: a bit a warp
  for (int round = 0, idle = 0; left && idle < MOST_IDLE; round++) {
    if (seed && round % REST == 0) resting = random();
    idle++;
    left = 0;
    for (unsigned i = 0; i < CTA_THREADS; i++) {
      const Wait& wait = cta.waits[i];
      if (!wait.what) continue;
      left++;
      if ((resting >> i / 32 & 1) || !wait.is_over(wait.condition)) continue;
      threadIdx = {i, 0, 0};
      swapcontext(&cta.scheduler, &cta.fibers[i]);
      if (cta.failure[0]) return cta.failure;
      idle = 0;
    }
  }
  if (!left) return nullptr;
  int n = snprintf(cta.failure, sizeof cta.failure, "stuck:");
  for (int i = 0; i < CTA_THREADS && n < (int)sizeof cta.failure; i++)
    if (cta.waits[i].what && i % 32 == 0)
      n += snprintf(cta.failure + n, sizeof cta.failure - n, " warp %d waits for %s,", i / 32,
                    cta.waits[i].what);
  return cta.failure;
}

// A point where a number of threads meet, time and again.
struct Meeting {
  int count = 0;
  unsigned generation = 0;

  void arrive(int expected) {
    if (++count < expected) return;
    count = 0;
    generation++;
  }
  void sync(int expected, const char* what) {
    const unsigned mine = generation;
    arrive(expected);
    wait_until(what, [&] { return generation != mine; });
  }
};

// --- What CUDA has built in ---

template <class To, class From> To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
static float __uint_as_float(unsigned x) { return bits_as<float>(x); }
static float __int_as_float(int x) { return bits_as<float>(x); }
static unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
static unsigned __byte_perm(unsigned low, unsigned high, unsigned picks) {
  const unsigned long long from = (unsigned long long)high << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) out |= (unsigned)(from >> (picks >> 4 * i & 7) * 8 & 255) << 8 * i;
  return out;
}
static int __vimax3_s32(int a, int b, int c) { return max(max(a, b), c); }
static int __vimax_s32_relu(int a, int b) { return max(max(a, b), 0); }
static int __popc(unsigned x) { return __builtin_popcount(x); }
static int __ffs(unsigned x) { return __builtin_ffs(x); }
static int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
static int atomicAdd(int* to, int x) { return std::exchange(*to, *to + x); }
static unsigned atomicOr(unsigned* to, unsigned x) { return std::exchange(*to, *to | x); }
[[noreturn]] static void __trap() { fail("trap"); }
static void __syncthreads() { of_cta<Meeting>().sync(CTA_THREADS, "its CTA"); }

struct Warps {
  struct {
    Meeting meeting;
    unsigned values[2][32];  // a lane may be one exchange ahead of another
  } at[CTA_THREADS / 32];
};
// The values of all lanes.
static const unsigned* exchange(unsigned value) {
  auto& warp = of_cta<Warps>().at[threadIdx.x / 32];
  unsigned* values = warp.values[warp.meeting.generation & 1];
  values[threadIdx.x % 32] = value;
  warp.meeting.sync(32, "the lanes of its warp");
  return values;
}
static void __syncwarp() { exchange(0); }
template <class T> T __shfl_sync(unsigned, T x, int lane) {
  return bits_as<T>(exchange(bits_as<unsigned>(x))[lane]);
}
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) {
  const int lane = threadIdx.x % 32 ^ mask;
  return bits_as<T>(exchange(bits_as<unsigned>(x))[lane]);
}
static unsigned __ballot_sync(unsigned, bool x) {
  const unsigned* all = exchange(x);
  unsigned word = 0;
  for (int i = 0; i < 32; i++) word |= all[i] << i;
  return word;
}
static bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
static unsigned __reduce_or_sync(unsigned, unsigned x) {
  const unsigned* all = exchange(x);
  unsigned word = 0;
  for (int i = 0; i < 32; i++) word |= all[i];
  return word;
}
static int __reduce_add_sync(unsigned, int x) {
  const unsigned* all = exchange(x);
  int sum = 0;
  for (int i = 0; i < 32; i++) sum += (int)all[i];
  return sum;
}
static int __reduce_min_sync(unsigned, int x) {
  const unsigned* all = exchange(x);
  int least = (int)all[0];
  for (int i = 1; i < 32; i++) least = min(least, (int)all[i]);
  return least;
}
