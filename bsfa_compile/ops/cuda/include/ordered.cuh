// Floats as integers in the same order, for the warp's integer maximum. NaN (as arithmetic makes it:
// positive) comes above +inf, so a maximum carries it.

__device__ __forceinline__ int ordered(float x) {
  const int bits = __float_as_int(x);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

__device__ __forceinline__ float of_ordered(int x) {
  return __int_as_float(x < 0 ? x ^ 0x7fffffff : x);
}
