// Stands for numeric.cuh: the same functions from the C library, and 16-bit floats by hand.

#define NEG_INF (-INFINITY)
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define LOWEST -3.402823466e38f
#define INT8_MARGIN .8660254037844386f
#define SMALLEST_NORMAL 0x1p-126f

inline float max_nan(float a, float b) { return a != a || b != b ? NAN : fmaxf(a, b); }
inline float min_nan(float a, float b) { return a != a || b != b ? NAN : fminf(a, b); }
inline float reciprocal(float x) { return 1.f / x; }
inline float sqrt_approx(float x) { return sqrtf(x); }
inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < SMALLEST_NORMAL ? 0.f : y;
}
inline float log2_approx(float x) { return log2f(x); }
inline float log2_add(float a, float b) {
  const float high = max_nan(a, b);
  return high == NEG_INF ? high : high + log2_approx(1.f + exp2_approx(-fabsf(a - b)));
}
inline float tanh_exp(float x) { return 1.f - 2.f / (exp2_approx(x * (2.f * LOG2E)) + 1.f); }

// Drops the low `bits` of x, to nearest, ties to even.
inline unsigned round_off(unsigned x, int bits) {
  return (x + (1u << (bits - 1)) - 1 + (x >> bits & 1)) >> bits;
}
inline unsigned to_16bit(float x) {
  const unsigned bits = bits_as<unsigned>(x), sign = bits >> 16 & 0x8000;
  if (x != x) return 0x7fff;
#if BF16
  return round_off(bits & 0x7fffffff, 16) | sign;
#else
  const float size = fabsf(x);
  if (size >= 0x1.ffep15f) return sign | 0x7c00;
  // Subnormal: in units of 2^-24, which rintf rounds to.
  if (size < 0x1p-14f) return sign | (unsigned)rintf(size * 0x1p24f);
  return sign | (round_off(bits & 0x7fffffff, 13) - (112 << 10));
#endif
}
inline float from_16bit(unsigned x) {
#if BF16
  return bits_as<float>(x << 16);
#else
  // 2^112 moves the exponent from fp16's bias to fp32's, subnormals included.
  float size = bits_as<float>((x & 0x7fff) << 13) * 0x1p112f;
  if ((x & 0x7c00) == 0x7c00) size = x & 0x3ff ? NAN : INFINITY;
  return x & 0x8000 ? -size : size;
#endif
}
inline unsigned pack_16bit(float low, float high) { return to_16bit(low) | to_16bit(high) << 16; }

inline float quad_max(float x) {
  x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return max_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
