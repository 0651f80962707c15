// As many floats at a time as a register holds, in the vector types of GCC and Clang: one source for AVX-512, AVX2 and
// NEON. Wider types than the machine's are compiled badly.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace normzoo {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));
typedef uint8_t vb __attribute__((vector_size(kLanes)));

#define NORMZOO_INLINE inline __attribute__((always_inline))
// What it calls is inlined, closures too that see every vector.
#define NORMZOO_FLATTEN __attribute__((flatten))

// Floats that begin with a cache line, for a vector that crosses one is read twice, and are not set unless a value is
// given.
template <class T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  template <class U>
  void construct(U* p) {
    ::new ((void*)p) U;
  }
  template <class U, class V>
  void construct(U* p, V&& value) {
    ::new ((void*)p) U(std::forward<V>(value));
  }
  bool operator==(const Aligned&) const { return true; }
};
using Floats = std::vector<float, Aligned<float>>;

// How much of a vector is meant: all of it, or the first lanes of it.
struct Full {};
struct Tail {
  int64_t lanes;
};

NORMZOO_INLINE int64_t lanes_of(Full) { return kLanes; }
NORMZOO_INLINE int64_t lanes_of(Tail part) { return part.lanes; }

NORMZOO_INLINE vf splat(float x) { return x - vf{}; }

template <class V, class T>
NORMZOO_INLINE V read(const T* p, Full) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
NORMZOO_INLINE V read(const T* p, Tail part) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(V) == 32) return (V)_mm256_maskz_loadu_epi16((__mmask16)((1u << part.lanes) - 1), p);
#endif
  V v{};
  std::memcpy(&v, p, part.lanes * sizeof(T));
  return v;
}
template <class V, class T>
NORMZOO_INLINE void write(T* p, V v, Full) {
  std::memcpy(p, &v, sizeof(V));
}
template <class V, class T>
NORMZOO_INLINE void write(T* p, V v, Tail part) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(V) == 32) return _mm256_mask_storeu_epi16(p, (__mmask16)((1u << part.lanes) - 1), (__m256i)v);
#endif
  std::memcpy(p, &v, part.lanes * sizeof(T));
}

// Zero in the lanes that are not meant.
NORMZOO_INLINE vf only(vf v, Full) { return v; }
NORMZOO_INLINE vf only(vf v, Tail part) {
  static constexpr int32_t kNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (vf)((vi)v & (read<vi>(kNumbers, Full{}) < (int32_t)part.lanes));
}

template <class Part>
NORMZOO_INLINE vf load(const float* p, Part part) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<Part, Tail>) return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << part.lanes) - 1), p);
#endif
  return read<vf>(p, part);
}
template <class Part>
NORMZOO_INLINE void store(float* p, vf v, Part part) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<Part, Tail>) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << part.lanes) - 1), (__m512)v);
    return;
  }
#endif
  write(p, v, part);
}

template <class Part>
NORMZOO_INLINE vf load(const c10::BFloat16* p, Part part) {
#if defined(__AVX512F__)
  return (vf)((vu)_mm512_cvtepu16_epi32((__m256i)read<vh>(p, part)) << 16);
#elif defined(__AVX2__)
  return (vf)((vu)_mm256_cvtepu16_epi32((__m128i)read<vh>(p, part)) << 16);
#else
  return (vf)(__builtin_convertvector(read<vh>(p, part), vu) << 16);
#endif
}
template <class T>
NORMZOO_INLINE vh narrow(vf v);
template <>
NORMZOO_INLINE vh narrow<c10::BFloat16>(vf v) {
#ifdef __AVX512BF16__
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  const vu bits = (vu)v;
  const vu nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
  const vu nan = (bits >> 16) | 0x40;
  return __builtin_convertvector((vu)(v != v ? (vi)nan : (vi)nearest), vh);
#endif
}

template <class Part>
NORMZOO_INLINE vf load(const c10::Half* p, Part part) {
  const vh half = read<vh>(p, part);
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)half);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)half);
#else
  vf v;
  for (int64_t i = 0; i < kLanes; ++i) v[i] = c10::detail::fp16_ieee_to_fp32_value(half[i]);
  return v;
#endif
}
template <>
NORMZOO_INLINE vh narrow<c10::Half>(vf v) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  vh half;
  for (int64_t i = 0; i < kLanes; ++i) half[i] = c10::detail::fp16_ieee_from_fp32_value(v[i]);
  return half;
#endif
}
template <class T, class Part>
NORMZOO_INLINE void store(T* p, vf v, Part part) {
  write(p, narrow<T>(v), part);
}

// Zero where the mask is false.
template <class Part>
NORMZOO_INLINE vf where(const uint8_t* mask, vf v, Part part) {
#if defined(__AVX512F__)
  // GCC converts byte by byte; and a load under a mask register, which it may make of this, waits for the mask
  const __m128i one = _mm_min_epu8((__m128i)read<vb>(mask, part), _mm_set1_epi8(1));
  return (vf)((vi)v & -(vi)_mm512_cvtepu8_epi32(one));
#else
  return (vf)((vi)v & (__builtin_convertvector(read<vb>(mask, part), vi) != 0));
#endif
}

NORMZOO_INLINE float sum(vf v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)v);
#else
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
#endif
}

// The sums of two, for little more than that of one.
NORMZOO_INLINE std::pair<float, float> sums(vf a, vf b) {
#ifdef __AVX512F__
  const __m512 c = (__m512)a, d = (__m512)b;
  __m512 both = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  both = _mm512_add_ps(both, _mm512_shuffle_f32x4(both, both, 0xb1));
  both = _mm512_add_ps(both, _mm512_permute_ps(both, 0x4e));
  both = _mm512_add_ps(both, _mm512_permute_ps(both, 0xb1));
  return {_mm512_cvtss_f32(both), _mm_cvtss_f32(_mm512_extractf32x4_ps(both, 2))};
#else
  return {sum(a), sum(b)};
#endif
}

// The sum of kMany vectors, in pairs.
template <int kMany>
NORMZOO_INLINE vf tree(const vf* v) {
  if constexpr (kMany == 1)
    return v[0];
  else
    return tree<kMany / 2>(v) + tree<kMany - kMany / 2>(v + kMany / 2);
}
template <int kMany>
NORMZOO_INLINE vf tree(const vf (&v)[kMany]) {
  return tree<kMany>(static_cast<const vf*>(v));
}

// Call f(i) for i < kMany, each a constant.
template <int kMany, class F>
NORMZOO_INLINE void unrolled(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kMany>{});
}

// One lane of a or b after the other, those of b counted on from those of a: which(i) is taken for the lane i.
template <class Which>
NORMZOO_INLINE vf lanes(vf a, vf b, Which which) {
  return [&]<int... i>(std::integer_sequence<int, i...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, which(i)...);
#else
    return __builtin_shuffle(a, b, vi{which(i)...});
#endif
  }(std::make_integer_sequence<int, kLanes>{});
}

// The sums of as many vectors as one has lanes, the sum of each in its lane; overwrites them.
template <int kHalf = kLanes / 2>
NORMZOO_INLINE vf each_sum(vf* v) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    constexpr auto first = [](int i) { return i & kHalf ? i - kHalf + (int)kLanes : i; };
    constexpr auto second = [](int i) { return i & kHalf ? i + (int)kLanes : i + kHalf; };
    for (int i = 0; i < kHalf; ++i)
      v[i] = lanes(v[i], v[i + kHalf], first) + lanes(v[i], v[i + kHalf], second);
    return each_sum<kHalf / 2>(v);
  }
}

// The sums of kEach lanes that lie together, in all of them.
template <int kEach>
NORMZOO_INLINE vf sum_together(vf v) {
  if constexpr (kEach > 1) {
    v = sum_together<kEach / 2>(v);
    v += lanes(v, v, [](int i) { return i ^ (kEach / 2); });
  }
  return v;
}

// One number for kEach lanes that lie together, from and to memory.
template <int kEach, class Part>
NORMZOO_INLINE vf load_for_each(const float* p, Part part) {
  const vf v = load(p, Tail{lanes_of(part) / kEach});
  return lanes(v, v, [](int i) { return i / kEach; });
}
template <int kEach, class Part>
NORMZOO_INLINE void store_of_each(float* p, vf v, Part part) {
  store(p, lanes(v, v, [](int i) { return i * kEach % (int)kLanes; }), Tail{lanes_of(part) / kEach});
}

NORMZOO_INLINE vf root(vf v) {
#ifdef __AVX512F__
  return (vf)_mm512_sqrt_ps((__m512)v);
#else
  for (int64_t i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// Call f(i, j, part) for every vector of n elements: i is its first element, j < 4 names an accumulator.
template <class F>
NORMZOO_INLINE void vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    f(i, 0, Full{});
    f(i + kLanes, 1, Full{});
    f(i + 2 * kLanes, 2, Full{});
    f(i + 3 * kLanes, 3, Full{});
  }
  for (; i + kLanes <= n; i += kLanes) f(i, 0, Full{});
  if (i < n) f(i, 0, Tail{n - i});
}

// Call f(i, many, part) for kMany vectors at a time, and for what is left for one: i is the first element.
template <int kMany, class F>
NORMZOO_INLINE void strips(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kMany * kLanes <= n; i += kMany * kLanes) f(i, std::integral_constant<int, kMany>{}, Full{});
  for (; i + kLanes <= n; i += kLanes) f(i, std::integral_constant<int, 1>{}, Full{});
  if (i < n) f(i, std::integral_constant<int, 1>{}, Tail{n - i});
}

}  // namespace normzoo
