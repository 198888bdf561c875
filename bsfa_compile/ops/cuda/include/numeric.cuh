// Scalar arithmetic: maxima that carry NaN, base-2 exponential, tanh, packing to 16 bits.

#define NEG_INF __int_as_float(0xff800000)
#define LOWEST -3.402823466e38f  // the lowest finite float
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define INT8_MARGIN .8660254037844386f  // reference.py's, of a rounding: 3 / sqrt(12)

__device__ __forceinline__ float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

__device__ __forceinline__ float min_nan(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// x, but nothing known of it: keeps the compiler from computing it again, or ahead of time.
__device__ __forceinline__ unsigned opaque(unsigned x) {
  asm volatile("mov.b32 %0, %0;" : "+r"(x));
  return x;
}
__device__ __forceinline__ int opaque(int x) {
  asm volatile("mov.b32 %0, %0;" : "+r"(x));
  return x;
}
__device__ __forceinline__ const char* opaque(const char* x) {
  asm volatile("mov.b64 %0, %0;" : "+l"(x));
  return x;
}

// base + a * b bytes in one instruction.
__device__ __forceinline__ const char* mad_wide(int a, int b, const char* base) {
  const char* r;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(r) : "r"(a), "r"(b), "l"(base));
  return r;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float log2_approx(float x) {
  float r;
  asm("lg2.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// log2(2^a + 2^b).
__device__ __forceinline__ float log2_add(float a, float b) {
  const float high = max_nan(a, b);
  return high == NEG_INF ? high : high + log2_approx(1.f + exp2_approx(-fabsf(a - b)));
}

__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float sqrt_approx(float x) {
  float r;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// tanh to about 1e-7: tanh.approx is only good to 5e-4, which a softcap of 50 would make 0.025.
__device__ __forceinline__ float tanh_exp(float x) {
  return 1.f - 2.f * reciprocal(exp2_approx(x * (2.f * LOG2E)) + 1.f);
}

// Two floats to 16-bit, `low` in the low half. BF16=1: bfloat16, else float16.
__device__ __forceinline__ unsigned pack_16bit(float low, float high) {
  unsigned r;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
  return r;
}

// Maximum over the four lanes that share an accumulator row.
__device__ __forceinline__ float quad_max(float x) {
  x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return max_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
