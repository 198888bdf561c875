// wgmma: warpgroup matrix multiply-accumulate, m64nNk16 (bf16, fp16) and m64nNk32 (int8).
//
// Accumulators in flight must not be touched: call `wgmma_wait` and then `pin` the array, which
// stops the compiler from moving a read above the wait. ACC = false starts from zero.
#include "base.cuh"

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
template <int R> DEVICE void pin(float (&d)[R]) {
#pragma unroll
  for (int i = 0; i < R; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int R> DEVICE void pin(u32 (&d)[R]) {
#pragma unroll
  for (int i = 0; i < R; i++) asm volatile("" : "+r"(d[i])::"memory");
}
template <int R> DEVICE void pin(int (&d)[R]) {
#pragma unroll
  for (int i = 0; i < R; i++) asm volatile("" : "+r"(d[i])::"memory");
}
template <class T, int R, int C> DEVICE void pin(T (&d)[R][C]) {
#pragma unroll
  for (int i = 0; i < R; i++) pin(d[i]);
}

// Descriptors are base + offset, with the offset (bytes, a multiple of 16) a constant: one addition
// each. Shared memory ends below 2^18, so an address needs no mask.
// K-major tile whose rows are ROW_BYTES (64 or 128) wide and swizzled as wide; 32 bytes a k step.
template <int ROW_BYTES> DEVICE u64 k_major(u32 address, u32 offset) {
  constexpr u64 high = (u64)(ROW_BYTES == 128 ? 1 : 2) << 30 | 8 * ROW_BYTES >> 4;
  return high << 32 | (address >> 4 | 1 << 16) + (offset >> 4);
}
// MN-major tile (V as the B operand): 128-byte rows, SLAB bytes from one slab of 64 columns to the
// next; 2048 bytes a step of 16 keys.
template <int SLAB> DEVICE u64 mn_major(u32 address, u32 offset) {
  return 1ull << 62 | 64ull << 32 | (address >> 4 | SLAB >> 4 << 16) + (offset >> 4);
}

#define BSFA_REGS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31 "
#define BSFA_REGS_48 \
  BSFA_REGS_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47 "
#define BSFA_REGS_64 \
  BSFA_REGS_48 ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "
#define BSFA_REGS_96 \
  BSFA_REGS_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95 "
#define BSFA_REGS_128 \
  BSFA_REGS_96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127 "
#define BSFA_ACC8(c, i)                                                                  \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), \
      c(d[i + 7])
#define BSFA_ACC_32(c) BSFA_ACC8(c, 0), BSFA_ACC8(c, 8), BSFA_ACC8(c, 16), BSFA_ACC8(c, 24)
#define BSFA_ACC_48(c) BSFA_ACC_32(c), BSFA_ACC8(c, 32), BSFA_ACC8(c, 40)
#define BSFA_ACC_64(c) BSFA_ACC_48(c), BSFA_ACC8(c, 48), BSFA_ACC8(c, 56)
#define BSFA_ACC_96(c) \
  BSFA_ACC_64(c), BSFA_ACC8(c, 64), BSFA_ACC8(c, 72), BSFA_ACC8(c, 80), BSFA_ACC8(c, 88)
#define BSFA_ACC_128(c) \
  BSFA_ACC_96(c), BSFA_ACC8(c, 96), BSFA_ACC8(c, 104), BSFA_ACC8(c, 112), BSFA_ACC8(c, 120)

#if !BF16
#define BSFA_HALF ".f16.f16"
#else
#define BSFA_HALF ".bf16.bf16"
#endif
#define BSFA_PREDICATE(acc) "{ .reg .pred p; setp.ne.b32 p, " acc ", 0; wgmma.mma_async.sync.aligned."

// Both operands from shared memory, both K-major.
#define BSFA_SS(R, N, a, b, c, acc)                                                             \
  asm volatile(BSFA_PREDICATE(acc) "m64n" #N "k16.f32" BSFA_HALF " {" BSFA_REGS_##R "}, " a ", " b \
               ", p, 1, 1, 0, 0; }"                                                             \
               : BSFA_ACC_##R(c)                                                                \
               : "l"(x), "l"(y))
template <bool ACC> DEVICE void wgmma_ss(float (&d)[32], u64 x, u64 y) {
  if constexpr (ACC) BSFA_SS(32, 64, "%32", "%33", "+f", "1");
  else BSFA_SS(32, 64, "%32", "%33", "=f", "0");
}
template <bool ACC> DEVICE void wgmma_ss(float (&d)[64], u64 x, u64 y) {
  if constexpr (ACC) BSFA_SS(64, 128, "%64", "%65", "+f", "1");
  else BSFA_SS(64, 128, "%64", "%65", "=f", "0");
}

// A (16 bits, four registers) from registers, B MN-major from shared memory; always accumulates.
#define BSFA_RS(R, N, a0, a1, a2, a3, b)                                                       \
  asm volatile(BSFA_PREDICATE("1") "m64n" #N "k16.f32" BSFA_HALF " {" BSFA_REGS_##R "}, {" a0 ", " a1 \
               ", " a2 ", " a3 "}, " b ", p, 1, 1, 1; }"                                       \
               : BSFA_ACC_##R("+f")                                                            \
               : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(y))
DEVICE void wgmma_rs(float (&d)[32], const u32* x, u64 y) {
  BSFA_RS(32, 64, "%32", "%33", "%34", "%35", "%36");
}
DEVICE void wgmma_rs(float (&d)[48], const u32* x, u64 y) {
  BSFA_RS(48, 96, "%48", "%49", "%50", "%51", "%52");
}
DEVICE void wgmma_rs(float (&d)[64], const u32* x, u64 y) {
  BSFA_RS(64, 128, "%64", "%65", "%66", "%67", "%68");
}
DEVICE void wgmma_rs(float (&d)[96], const u32* x, u64 y) {
  BSFA_RS(96, 192, "%96", "%97", "%98", "%99", "%100");
}
DEVICE void wgmma_rs(float (&d)[128], const u32* x, u64 y) {
  BSFA_RS(128, 256, "%128", "%129", "%130", "%131", "%132");
}

// int8: A from registers, B K-major from shared memory.
#define BSFA_S8(R, N, a0, a1, a2, a3, b, c, acc)                                            \
  asm volatile(BSFA_PREDICATE(acc) "m64n" #N "k32.s32.s8.s8 {" BSFA_REGS_##R "}, {" a0 ", " a1 ", " a2 \
               ", " a3 "}, " b ", p; }"                                                     \
               : BSFA_ACC_##R(c)                                                            \
               : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(y))
template <bool ACC> DEVICE void wgmma_s8(int (&d)[32], const u32* x, u64 y) {
  if constexpr (ACC) BSFA_S8(32, 64, "%32", "%33", "%34", "%35", "%36", "+r", "1");
  else BSFA_S8(32, 64, "%32", "%33", "%34", "%35", "%36", "=r", "0");
}
template <bool ACC> DEVICE void wgmma_s8(int (&d)[64], const u32* x, u64 y) {
  if constexpr (ACC) BSFA_S8(64, 128, "%64", "%65", "%66", "%67", "%68", "+r", "1");
  else BSFA_S8(64, 128, "%64", "%65", "%66", "%67", "%68", "=r", "0");
}
