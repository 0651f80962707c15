// The three loops over memory that every pattern becomes, forward and backward.
//
// Forward:   y  = ((x - mean) scale + shift) weight + bias, then the floor where there is one
// Backward:  dx = p weight dy + q (x - mean) + r, with p, q, r from the sums of weight dy and weight dy (x - mean)
//
// mean, scale, shift, p, q and r belong to a statistic, weight, bias and floor to a channel.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "plan.h"
#include "simd.h"

namespace normzoo {

// Gradients of the channels' parameters, one share for each thread.
struct Shares {
  int64_t channels = 0;
  Floats data;

  Shares(int64_t threads, int64_t channels) : channels(channels), data(threads * 3 * channels, 0.f) {}
  float* weight() { return data.data() + at::get_thread_num() * 3 * channels; }
  float* bias() { return weight() + channels; }
  float* floor() { return weight() + 2 * channels; }

  // The sum over the threads, in the first share.
  void merge() {
    for (size_t i = 3 * channels; i < data.size(); ++i) data[i % (3 * channels)] += data[i];
  }
};

enum class Do { all, sums, apply };  // both passes while the data is in the cache, or one of them

template <class T>
struct Forward {
  const T* x;
  T* y;
  const uint8_t* mask;   // or null
  const float* weight;   // ones where there is none
  const float* bias;     // zeros where there is none
  const float* floor;    // or null
  float *mean, *var;     // of each statistic: written, or read when they are known
  float* number;         // real elements of each statistic, under a mask
  const float *scale, *shift;  // or null: 1 / sqrt(var + eps) and 0
  bool known, centred;
  Do what;
  double eps;
  bool stream;
};

template <class T>
struct Backward {
  const T *dy, *x;
  T* dx;
  const uint8_t* mask;
  const float *weight, *bias, *floor;
  const float *mean, *var, *number;
  const float* scale;        // Do::sums: in place of 1 / sqrt(var + eps)
  float *sum, *product;      // Do::sums: of weight dy and of weight dy (x - mean)
  const float *p, *q, *r;    // Do::apply
  bool constant, centred;    // constant: the statistics do not depend on x
  Do what;
  double eps;
  bool stream;
  Shares* shares;
};

// A mean is far from the shift when its square swamps the variance: then the sums are taken again, shifted by the mean.
constexpr double kFar = 16;
constexpr int64_t kBlock = 4096;  // elements or rows summed in float32 before they join a total
constexpr int64_t kRows = 256;
constexpr int64_t kListed = 2048;  // rows, of which some that lie far apart are read together
constexpr int64_t kNear = 1 << 20;  // bytes that the second pass still finds in a cache of the core
constexpr int kStrip = 4;  // vectors of a row that are read together
constexpr uint64_t kPage = 4096;  // bytes
constexpr int64_t kShortRun = 16 * kLanes, kManyShort = 64;

// Where results go. A large one is streamed past the caches, which spares reading the lines that are written.
template <class T>
struct Out {
  T* to;
  bool stream;

  Out() = default;
  Out(T* to, bool stream) : to(to), stream(stream && reinterpret_cast<uintptr_t>(to) % 64 == 0) {}

  template <class Part>
  NORMZOO_INLINE void put(int64_t i, vf v, Part part) const {
#ifdef __AVX512F__
    if constexpr (std::is_same_v<Part, Full>) {
      if (!stream) return store(to + i, v, part);
      if constexpr (std::is_same_v<T, float>)
        _mm512_stream_ps(to + i, (__m512)v);
      else
        _mm256_stream_si256((__m256i*)(to + i), (__m256i)narrow<T>(v));
      return;
    }
#endif
    store(to + i, v, part);
  }

  // Write f(i, part) for every vector of n elements.
  template <class F>
  NORMZOO_INLINE void each(int64_t n, F&& f) const {
#ifdef __AVX512F__
    if (stream) return vectors(n, [&](int64_t i, int, auto part) { put(i, f(i, part), part); });
#endif
    vectors(n, [&](int64_t i, int, auto part) { store(to + i, f(i, part), part); });
  }
};

// Sums, then settled coefficients, then the pass that uses them. One task is one set of statistics; where there are
// fewer of them than threads, threads share the runs of each.
template <class Work>
void drive(Work& work, int64_t tasks, int64_t reduced, int64_t elements, Do what) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (threads == 1 || tasks >= 2 * threads || reduced < threads) {
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements / std::max<int64_t>(1, tasks)));
    at::parallel_for(0, tasks, grain, [&](int64_t from, int64_t to) {
      auto part = work.part();
      for (int64_t k = from; k < to; ++k) {
        work.begin(k, part);
        if (what != Do::apply)
          do work.add(k, 0, reduced, part);
          while (!work.settle(k, part));
        if (what != Do::sums) work.apply(k, 0, reduced, part);
      }
    });
    return;
  }
  const int64_t share = (reduced + threads - 1) / threads;
  std::vector<decltype(work.part())> parts;
  for (int64_t i = 0; i < threads; ++i) parts.push_back(work.part());
  const auto each = [&](auto&& f) {
    at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) f(parts[i], std::min(reduced, i * share), std::min(reduced, (i + 1) * share));
    });
  };
  for (int64_t k = 0; k < tasks; ++k) {
    work.begin(k, parts[0]);
    if (what != Do::apply)
      do {
        for (int64_t i = 1; i < threads; ++i) parts[i] = parts[0];
        each([&](auto& part, int64_t from, int64_t to) {
          work.enter(part);
          work.add(k, from, to, part);
        });
        for (int64_t i = 1; i < threads; ++i) parts[0].merge(parts[i]);
      } while (!work.settle(k, parts[0]));
    if (what != Do::sums) each([&](auto&, int64_t from, int64_t to) { work.apply(k, from, to, parts[0]); });
  }
}

// The same where the runs of a statistic lie far apart: in the order of the memory, with all statistics at once.
template <class Work>
void sweep(Work& work, const Plan& plan, Do what) {
  using Part = decltype(work.part());
  const int64_t tasks = plan.kept.size(), runs = tasks * plan.reduced.size();
  const int64_t threads = at::in_parallel_region() ? 1 : std::min<int64_t>(at::get_num_threads(), runs);
  const int64_t share = (runs + threads - 1) / threads;
  std::vector<std::vector<Part>> parts(threads, std::vector<Part>(tasks, work.part()));
  std::vector<char> settled(tasks, what == Do::apply);
  const auto each = [&](auto&& f) {
    at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        Cursor run(plan, std::min(runs, i * share));
        for (int64_t k = 0; k < tasks; ++k) work.enter(parts[i][k]);
        for (int64_t left = std::min(runs - i * share, share); left > 0; --left, run.next()) f(parts[i], run);
        for (int64_t k = 0; k < tasks; ++k) work.join(parts[i][k]);
      }
    });
  };
  for (int64_t k = 0; k < tasks; ++k) work.begin(k, parts[0][k]);
  while (std::find(settled.begin(), settled.end(), 0) != settled.end()) {
    for (int64_t i = 1; i < threads; ++i) parts[i] = parts[0];
    each([&](auto& own, const Cursor& run) {
      if (!settled[run.kept]) work.add(run.start, own[run.kept]);
    });
    for (int64_t k = 0; k < tasks; ++k) {
      if (settled[k]) continue;
      for (int64_t i = 1; i < threads; ++i) parts[0][k].merge(parts[i][k]);
      settled[k] = work.settle(k, parts[0][k]);
    }
  }
  if (what != Do::sums) each([&](auto&, const Cursor& run) { work.apply(run.start, parts[0][run.kept]); });
}

template <class Work>
void drive_runs(Work& work, const Plan& plan, Do what) {
  int64_t together = 1;  // runs of a statistic that lie side by side
  for (size_t i = plan.order.size(); i-- > 0 && plan.order[i].kept == 0;) together *= plan.order[i].size;
  if (together < plan.reduced.size() && together * plan.width <= 4 * kBlock)
    sweep(work, plan, what);
  else
    drive(work, plan.kept.size(), plan.reduced.size(), plan.count * plan.statistics(), what);
}

// ---- runs: a statistic is made of runs of memory, each in one channel --------------------------------------------

struct RunsPart {
  double s1 = 0, s2 = 0, number = 0;
  float shift = 0, mean = 0, scale = 0, add = 0;  // forward: add is the shift of the result
  float p = 0, q = 0, r = 0;
  int passes = 0;
  Start start;
  // sums that have not joined the total, all of one channel
  vf a{}, b{};
  int64_t pending = 0, channel = 0;
  float* share = nullptr;  // backward: of this thread in the gradients of the parameters

  void merge(const RunsPart& other) {
    s1 += other.s1;
    s2 += other.s2;
    number += other.number;
  }
};

// Four vectors of each of two sums.
struct Sums {
  vf a[4], b[4];

  Sums() : a{}, b{} {}
};

inline double count_mask(const uint8_t* mask, int64_t n) {
  uint32_t number = 0;  // narrow, for the compiler to vectorise
  for (int64_t i = 0; i < n; ++i) number += mask[i];
  return number;
}

template <class T, bool kMask>
struct RunsForward {
  const Plan& plan;
  const Forward<T>& args;

  RunsPart part() const { return RunsPart(); }
  void enter(RunsPart&) const {}

  void begin(int64_t k, RunsPart& part) const {
    part = RunsPart();
    part.start = plan.kept[k];
    if (args.known) {
      part.mean = args.mean[k];
      part.scale = args.scale ? args.scale[k] : (float)(1 / std::sqrt(args.var[k] + args.eps));
      part.add = args.shift ? args.shift[k] : 0;
    } else if (args.centred && !(kMask && !args.mask[part.start.mask])) {
      part.shift = (float)args.x[part.start.memory];
    }
  }

  void join(RunsPart& part) const {
    if (part.pending == 0) return;
    const auto [s1, s2] = sums(part.a, part.b);
    part.s1 += s1;
    part.s2 += s2;
    part.a = part.b = vf{};
    part.pending = 0;
  }

  void add(const Start& start, RunsPart& part) const {
    const vf shift = splat(part.shift);
    for (int64_t at = 0; at < plan.width; at += kBlock) {
      const int64_t n = std::min(kBlock, plan.width - at);
      const T* x = args.x + start.memory + at;
      const uint8_t* mask = kMask ? args.mask + start.mask + at : nullptr;
      Sums sums;
      vectors(n, [&](int64_t i, int j, auto whole) {
        vf v = only(load(x + i, whole) - shift, whole);
        if constexpr (kMask) v = where(mask + i, v, whole);
        sums.a[j] += v;
        sums.b[j] += v * v;
      });
      part.a += tree(sums.a);
      part.b += tree(sums.b);
      if ((part.pending += n) >= kBlock) join(part);
      if constexpr (kMask) part.number += count_mask(mask, n);
    }
  }

  void add(int64_t, int64_t from, int64_t to, RunsPart& part) const {
    for (int64_t r = from; r < to; ++r) add(part.start + plan.reduced[r], part);
    join(part);
  }

  bool settle(int64_t k, RunsPart& part) const {
    const double n = kMask ? part.number : (double)plan.count, share = n > 0 ? 1 / n : 0;
    const double off = args.centred ? part.s1 * share : 0;
    double var = part.s2 * share - off * off;
    if (part.passes++ == 0 && off * off > kFar * (var + args.eps)) {
      part.shift += (float)off;
      part.s1 = part.s2 = part.number = 0;
      return false;
    }
    if (var < 0) var = 0;
    part.mean = args.mean[k] = n > 0 ? part.shift + (float)off : 0;
    args.var[k] = (float)var;
    part.scale = 1 / std::sqrt((float)(var + args.eps));
    if (kMask) args.number[k] = (float)n;
    return true;
  }

  void apply(const Start& start, const RunsPart& part) const {
    const auto [at, c, masked] = start;
    const uint8_t* mask = kMask ? args.mask + masked : nullptr;
    const vf mean = splat(part.mean), scale = splat(part.scale * args.weight[c]);
    const vf add = splat(part.add * args.weight[c] + args.bias[c]);
    const vf floor = splat(args.floor ? args.floor[c] : -INFINITY);
    const T* x = args.x + at;
    const Out<T> out(args.y + at, args.stream);
    out.each(plan.width, [&](int64_t i, auto whole) {
      vf v = (load(x + i, whole) - mean) * scale + add;
      v = v < floor ? floor : v;
      if constexpr (kMask) v = where(mask + i, v, whole);
      return v;
    });
  }

  void apply(int64_t, int64_t from, int64_t to, const RunsPart& part) const {
    for (int64_t r = from; r < to; ++r) apply(part.start + plan.reduced[r], part);
  }
};

template <class T, bool kMask, bool kLimited>
struct RunsBackward {
  const Plan& plan;
  const Backward<T>& args;

  RunsPart part() const { return RunsPart(); }
  void enter(RunsPart& part) const {
    if (args.what != Do::apply) part.share = args.shares->weight();
  }

  void begin(int64_t k, RunsPart& part) const {
    part = RunsPart();
    part.start = plan.kept[k];
    enter(part);
    part.mean = args.mean[k];
    if (args.scale) part.scale = args.scale[k];
    if (args.var) part.scale = 1 / std::sqrt((float)(args.var[k] + args.eps));
    if (args.what == Do::apply) part.p = args.p[k], part.q = args.q[k], part.r = args.r[k];
  }

  // dy as it reaches the affine part
  template <class Part>
  NORMZOO_INLINE vf gradient(const T* dy, const uint8_t* mask, vf off, vf scale, vf bias, vf floor, Part whole) const {
    vf g = load(dy, whole);
    if constexpr (kMask) g = where(mask, g, whole);
    if constexpr (kLimited) g = off * scale + bias < floor ? vf{} : g;
    return g;
  }

  void join(RunsPart& part) const {
    if (part.pending == 0) return;
    const auto [s1, s2] = sums(part.a, part.b);
    float* share = part.share + part.channel;
    share[0] += s2 * part.scale;
    share[plan.channels] += s1;
    const double weight = args.weight[part.channel];
    part.s1 += s1 * weight;
    part.s2 += s2 * weight;
    part.a = part.b = vf{};
    part.pending = 0;
  }

  void add(const Start& start, RunsPart& part) const {
    const auto [at, c, masked] = start;
    if (part.channel != c) join(part);
    part.channel = c;
    const vf mean = splat(part.mean), scale = splat(part.scale * args.weight[c]), bias = splat(args.bias[c]);
    const vf floor = splat(kLimited ? args.floor[c] : 0);
    vf below{};
    for (int64_t from = 0; from < plan.width; from += kBlock) {
      const int64_t n = std::min(kBlock, plan.width - from);
      const T *x = args.x + at + from, *dy = args.dy + at + from;
      const uint8_t* mask = kMask ? args.mask + masked + from : nullptr;
      Sums sums;
      vectors(n, [&](int64_t i, int j, auto whole) {
        vf off = load(x + i, whole) - mean;
        if constexpr (kMask) off = where(mask + i, off, whole);  // no NaN from there
        const vf g = gradient(dy + i, kMask ? mask + i : nullptr, off, scale, bias, floor, whole);
        sums.a[j] += g;
        sums.b[j] += g * off;
        if constexpr (kLimited) {
          vf whole_g = load(dy + i, whole);
          if constexpr (kMask) whole_g = where(mask + i, whole_g, whole);
          below += whole_g - g;
        }
      });
      part.a += tree(sums.a);
      part.b += tree(sums.b);
      if ((part.pending += n) >= kBlock) join(part);
    }
    if constexpr (kLimited) part.share[2 * plan.channels + c] += sum(below);
  }

  void add(int64_t, int64_t from, int64_t to, RunsPart& part) const {
    for (int64_t r = from; r < to; ++r) add(part.start + plan.reduced[r], part);
    join(part);
  }

  bool settle(int64_t k, RunsPart& part) const {
    if (args.what == Do::sums) args.sum[k] = (float)part.s1, args.product[k] = (float)part.s2;
    const double share = 1 / std::max(1.0, args.number ? (double)args.number[k] : (double)plan.count);
    const double scale = part.scale;
    part.p = part.scale;
    part.q = args.constant ? 0 : (float)(-scale * scale * scale * part.s2 * share);
    part.r = args.constant || !args.centred ? 0 : (float)(-scale * part.s1 * share);
    return true;
  }

  void apply(const Start& start, const RunsPart& part) const {
    const auto [at, c, masked] = start;
    const uint8_t* mask = kMask ? args.mask + masked : nullptr;
    const vf mean = splat(part.mean), q = splat(part.q), rest = splat(part.r);
    const vf scale = splat(part.scale * args.weight[c]), bias = splat(args.bias[c]);
    const vf p = splat(part.p * args.weight[c]), floor = splat(kLimited ? args.floor[c] : 0);
    const T *x = args.x + at, *dy = args.dy + at;
    const Out<T> out(args.dx + at, args.stream);
    out.each(plan.width, [&](int64_t i, auto whole) {
      const vf off = load(x + i, whole) - mean;
      vf v = gradient(dy + i, kMask ? mask + i : nullptr, off, scale, bias, floor, whole) * p + (off * q + rest);
      if constexpr (kMask) v = where(mask + i, v, whole);
      return v;
    });
  }

  void apply(int64_t, int64_t from, int64_t to, const RunsPart& part) const {
    for (int64_t r = from; r < to; ++r) apply(part.start + plan.reduced[r], part);
  }
};

// ---- short runs: statistics of adjacent runs, with a few vectors in each ------------------------------------------

// Many runs at a time, so that what each of them needs once is done by vectors: their sums, and from these what is
// multiplied and added. The runs are those of whole statistics of one sample.
// kWhole: how many whole vectors a run has, where they are few; otherwise -1.
template <class T, int kWhole>
struct ShortRuns {
  enum { kMean, kFirst, kSecond, kP, kQ, kR, kFields };

  const Plan& plan;
  const int64_t together, groups, step;  // runs of a statistic; statistics of a sample, and of those done at a time
  Floats room;

  explicit ShortRuns(const Plan& plan)
      : plan(plan), together(plan.adjacent()), groups(plan.channels / together),
        step(std::min(groups, std::max<int64_t>(1, kManyShort / together))), room(kFields * step * together) {}

  float* at(int field) { return room.data() + field * step * together; }

  // Call f(work, place, channel, statistic, statistics) for the runs from a place in memory on.
  template <class F>
  static void each(const Plan& plan, F&& f) {
    const ShortRuns first(plan);
    const int64_t units = (first.groups + first.step - 1) / first.step;
    const int64_t all = plan.kept.size() / first.groups * units;
    const int64_t grain = std::max<int64_t>(1, 32768 / (first.step * first.together * plan.width));
    at::parallel_for(0, all, grain, [&](int64_t from, int64_t to) {
      ShortRuns work(plan);
      for (; from < to; ++from) {
        const int64_t sample = from / units, group = from % units * work.step, k = sample * work.groups + group;
        f(work, k * work.together * plan.width, group * work.together, k, std::min(work.step, work.groups - group));
      }
    });
  }

  // Call f(i, part) for every vector of a run.
  template <class F>
  NORMZOO_INLINE static void run(int64_t width, F&& f) {
    if constexpr (kWhole < 0) {
      vectors(width, [&](int64_t i, int, auto part) { f(i, part); });
    } else {
      for (int64_t i = 0; i < kWhole; ++i) f(i * kLanes, Full{});
      if (width > kWhole * kLanes) f(kWhole * kLanes, Tail{width - kWhole * kLanes});
    }
  }

  // The two sums of each run: f(i, part, mean, a, b) adds the vector at i in memory to them.
  template <class F>
  NORMZOO_INLINE void sum_runs(int64_t place, int64_t runs, F f) {
    const float* means = at(kMean);
    float *to1 = at(kFirst), *to2 = at(kSecond);
    const int64_t width = plan.width;
    for (int64_t first = 0; first < runs; first += kLanes) {
      vf a[kLanes]{}, b[kLanes]{};
      for (int64_t j = 0; j < std::min(kLanes, runs - first); ++j, place += width) {
        const vf mean = splat(means[first + j]);
        vf s1{}, s2{};
        run(width, [&](int64_t i, auto part) { f(place + i, part, mean, s1, s2); });
        a[j] = s1;
        b[j] = s2;
      }
      const Tail several{std::min(kLanes, runs - first)};
      store(to1 + first, each_sum(a), several);
      store(to2 + first, each_sum(b), several);
    }
  }

  // Write the runs: f(j) is a function of place and part for the run j.
  template <class F>
  NORMZOO_INLINE void each_run(T* to, bool stream, int64_t place, int64_t runs, F f) {
    const int64_t width = plan.width;
    for (int64_t j = 0; j < runs; ++j, place += width) {
      const auto value = f(j);
      const Out<T> out(to + place, stream);
      run(width, [&](int64_t i, auto part) { out.put(i, value(place + i, part), part); });
    }
  }

  // From the sums of runs to those of statistics.
  void gather(int field, int64_t statistics) {
    if (together == 1) return;
    float* sums = at(field);
    for (int64_t g = 0; g < statistics; ++g) {
      vf total{};
      vectors(together, [&](int64_t i, int, auto part) { total += load(sums + g * together + i, part); });
      sums[g] = sum(total);
    }
  }

  // And back, from what belongs to statistics to the same for each run.
  void spread(int field, int64_t statistics) {
    if (together == 1) return;
    float* values = at(field);
    for (int64_t g = statistics; g-- > 0;) std::fill_n(values + g * together, together, values[g]);
  }

  void standardize(const Forward<T>& args, int64_t place, int64_t c, int64_t k, int64_t statistics) {
    const int64_t runs = statistics * together;
    const float share = 1 / (float)plan.count;
    float *mean = args.mean + k, *var = args.var + k;
    for (int64_t g = 0; g < statistics; ++g)
      mean[g] = args.centred ? (float)args.x[place + g * together * plan.width] : 0;
    for (bool far = true, again = false; far; again = true) {
      std::copy_n(mean, statistics, at(kMean));
      spread(kMean, statistics);
      sum_runs(place, runs, [x = args.x](int64_t i, auto part, vf shift, vf& s1, vf& s2) {
        const vf v = only(load(x + i, part) - shift, part);
        s1 += v;
        s2 += v * v;
      });
      gather(kFirst, statistics);
      gather(kSecond, statistics);
      vi out_of_reach{};
      vectors(statistics, [&](int64_t i, int, auto part) {
        const vf off = args.centred ? load(at(kFirst) + i, part) * share : vf{};
        const vf v = load(at(kSecond) + i, part) * share - off * off, found = v < 0 ? vf{} : v;
        out_of_reach |= (vi)only((vf)(off * off > (float)kFar * (found + (float)args.eps)), part);
        store(mean + i, load(mean + i, part) + off, part);
        store(var + i, found, part);
        store(at(kP) + i, 1 / root(found + (float)args.eps), part);
      });
      far = !again && sum(out_of_reach ? splat(1) : vf{}) > 0;
    }
    std::copy_n(mean, statistics, at(kMean));
    spread(kMean, statistics);
    spread(kP, statistics);
    vectors(runs, [&](int64_t i, int, auto part) {
      store(at(kP) + i, load(at(kP) + i, part) * load(args.weight + c + i, part), part);
    });
    const float *means = at(kMean), *scales = at(kP), *bias = args.bias + c;
    each_run(args.y, args.stream, place, runs, [=, x = args.x](int64_t j) {
      const vf shift = splat(means[j]), scale = splat(scales[j]), add = splat(bias[j]);
      return [=](int64_t i, auto part) { return (load(x + i, part) - shift) * scale + add; };
    });
  }

  void differentiate(const Backward<T>& args, int64_t place, int64_t c, int64_t k, int64_t statistics) {
    const int64_t runs = statistics * together;
    std::copy_n(args.mean + k, statistics, at(kMean));
    spread(kMean, statistics);
    vectors(statistics, [&](int64_t i, int, auto part) {
      store(at(kP) + i, 1 / root(load(args.var + k + i, part) + (float)args.eps), part);
    });
    std::copy_n(at(kP), statistics, at(kR));
    spread(kP, statistics);
    sum_runs(place, runs, [x = args.x, dy = args.dy](int64_t i, auto part, vf mean, vf& s1, vf& s2) {
      const vf g = load(dy + i, part);
      s1 += g;
      s2 += g * (load(x + i, part) - mean);
    });
    float *to_weight = args.shares->weight() + c, *to_bias = args.shares->bias() + c;
    vectors(runs, [&](int64_t i, int, auto part) {
      const vf s1 = load(at(kFirst) + i, part), s2 = load(at(kSecond) + i, part), scale = load(at(kP) + i, part);
      const vf weight = load(args.weight + c + i, part);
      store(to_weight + i, load(to_weight + i, part) + s2 * scale, part);
      store(to_bias + i, load(to_bias + i, part) + s1, part);
      store(at(kFirst) + i, s1 * weight, part);
      store(at(kSecond) + i, s2 * weight, part);
      store(at(kP) + i, scale * weight, part);
    });
    gather(kFirst, statistics);
    gather(kSecond, statistics);
    const float share = args.constant ? 0 : 1 / (float)plan.count;
    vectors(statistics, [&](int64_t i, int, auto part) {
      const vf scale = load(at(kR) + i, part), ratio = scale * share;
      store(at(kQ) + i, -(load(at(kSecond) + i, part) * scale) * ratio * scale, part);
      store(at(kR) + i, args.centred ? -ratio * load(at(kFirst) + i, part) : vf{}, part);
    });
    spread(kQ, statistics);
    spread(kR, statistics);
    const float *means = at(kMean), *ps = at(kP), *qs = at(kQ), *rs = at(kR);
    each_run(args.dx, args.stream, place, runs, [=, x = args.x, dy = args.dy](int64_t j) {
      const vf mean = splat(means[j]), p = splat(ps[j]), q = splat(qs[j]), r = splat(rs[j]);
      return [=](int64_t i, auto part) { return load(dy + i, part) * p + ((load(x + i, part) - mean) * q + r); };
    });
  }
};

// Whether these loops serve: few statistics are left to those in which threads share one.
inline bool are_short(const Plan& plan) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  return plan.width <= kShortRun && plan.adjacent() > 0 && (threads == 1 || plan.kept.size() >= 2 * threads);
}

template <class T, class F>
void drive_short(const Plan& plan, F&& f) {
  switch (plan.width / kLanes) {
    case 0: return ShortRuns<T, 0>::each(plan, f);
    case 1: return ShortRuns<T, 1>::each(plan, f);
    case 2: return ShortRuns<T, 2>::each(plan, f);
    case 3: return ShortRuns<T, 3>::each(plan, f);
    default: return ShortRuns<T, -1>::each(plan, f);
  }
}

// ---- rows: groups of adjacent channels, each reduced by itself ---------------------------------------------------

// A statistic: its elements in memory, its first channel and its number.
struct Row {
  int64_t at, channel, which;
};

// What belongs to the channels of rows of kVectors vectors, and stays in registers from row to row; 0 is nothing.
template <int kVectors>
struct OfChannels {
  vf weight[std::max(kVectors, 1)], bias[std::max(kVectors, 1)];  // backward: the gradients
};

// What a thread does with its share of the rows, which lie one after the other. Those of kVectors vectors stay in
// registers, and where they are of the same channels what belongs to these does too; 0 stands for any length.
template <class Work, int kVectors, bool kAlike, class Part, class Args>
void drive_rows(const Plan& plan, const Args& args, Part part) {
  const int64_t grain = std::max<int64_t>(1, 32768 / plan.width), n = plan.width / plan.groups;
  at::parallel_for(0, plan.kept.size(), grain, [&](int64_t from, int64_t to) {
    Work work(plan, args);
    while (from < to) {
      const int64_t end = std::min(from + kRows, to);
      auto channels = work.template channels<kAlike ? kVectors : 0>(part);
      for (; from < end; ++from) {
        const bool real = !args.mask || args.mask[from];
        for (int64_t g = 0; g < plan.groups; ++g) {
          const Row row{from * plan.width + g * n, g * n, from * plan.groups + g};
          if (!real) {
            work.skip(row);
          } else if constexpr (kVectors > 0) {
            work.template held<kVectors>(row, channels, part);
          } else {
            work.read(row);
          }
        }
      }
      work.join(channels, part);
    }
  });
}

// As many statistics at a time as a vector has lanes, where nothing is skipped: what each of them needs once is done by
// the vector.
template <class Work, int kVectors, bool kAlike, class Part, class Args>
void drive_many(const Plan& plan, const Args& args, Part part) {
  const int64_t grain = std::max<int64_t>(1, 32768 / plan.width), n = plan.width / plan.groups;
  at::parallel_for(0, plan.kept.size(), grain, [&](int64_t from, int64_t to) {
    Work work(plan, args);
    while (from < to) {
      const int64_t end = std::min(from + kRows, to), last = end * plan.groups;
      auto channels = work.template channels<kAlike ? kVectors : 0>(part);
      for (int64_t k = from * plan.groups; k < last; k += kLanes)
        work.template many<kVectors>({k * n, k % plan.groups * n, k}, std::min(kLanes, last - k), channels, part);
      work.join(channels, part);
      from = end;
    }
  });
}

template <class Work, int kVectors, class Part, class Args>
void drive_held(const Plan& plan, const Args& args, Part part) {
  if (!args.mask && Work::plain(args) && !args.stream)  // what is streamed had better alternate with what is read
    return plan.groups == 1 ? drive_many<Work, kVectors, true>(plan, args, part)
                            : drive_many<Work, kVectors, false>(plan, args, part);
  plan.groups == 1 ? drive_rows<Work, kVectors, true>(plan, args, part)
                   : drive_rows<Work, kVectors, false>(plan, args, part);
}

// Groups of kEach channels, as many of them at a time as a vector holds.
template <class Work, int kEach, class Args>
void drive_groups(const Plan& plan, const Args& args) {
  const int64_t grain = std::max<int64_t>(1, 32768 / plan.width);
  at::parallel_for(0, plan.kept.size(), grain, [&](int64_t from, int64_t to) {
    Work work(plan, args);
    while (from < to) {
      const int64_t end = std::min(from + kRows, to);
      for (; from < end; ++from)
        vectors(plan.width, [&](int64_t i, int, auto part) {
          work.template several<kEach>({from * plan.width + i, i, from * plan.groups + i / kEach}, part);
        });
      work.join(OfChannels<0>(), Full{});
    }
  });
}

template <class Work, class Args>
void drive_rows(const Plan& plan, Args args) {
  const int64_t n = plan.width / plan.groups;
  args.stream = args.stream && sizeof(*args.x) == sizeof(float);  // measured: rows of less are slower streamed
  if (!args.mask && Work::plain(args)) {
    if (n == 2) return drive_groups<Work, 2>(plan, args);
    if (n == 4) return drive_groups<Work, 4>(plan, args);
    if (n == 8 && kLanes > 8) return drive_groups<Work, 8>(plan, args);
  }
  if (n < kLanes) return drive_held<Work, 1>(plan, args, Tail{n});
  switch (n % kLanes ? 0 : n / kLanes) {
    case 1: return drive_held<Work, 1>(plan, args, Full{});
    case 2: return drive_held<Work, 2>(plan, args, Full{});
    case 3: return drive_held<Work, 3>(plan, args, Full{});
    case 4: return drive_held<Work, 4>(plan, args, Full{});
    case 6: return drive_held<Work, 6>(plan, args, Full{});
    case 8: return drive_held<Work, 8>(plan, args, Full{});
    default: return drive_rows<Work, 0, false>(plan, args, Full{});
  }
}

template <class T>
struct RowsForward {
  const Forward<T> args;  // of this thread: what is written cannot change it
  const int64_t n, width;
  const float share, eps;

  RowsForward(const Plan& plan, const Forward<T>& args)
      : args(args), n(plan.width / plan.groups), width(plan.width), share(1.f / n), eps((float)args.eps) {}

  NORMZOO_INLINE float scale(const Row& row, float var) const {
    return args.scale ? args.scale[row.which] : 1 / std::sqrt(var + eps);
  }
  NORMZOO_INLINE void keep(const Row& row, float mean, float var, bool real) const {
    args.mean[row.which] = mean;
    args.var[row.which] = var;
    if (args.number) args.number[row.which] = real ? n : 0;
  }

  void skip(const Row& row) const {
    if (!args.known) keep(row, 0, 0, false);
    if (args.what != Do::sums) std::fill_n(args.y + row.at, n, T(0));
  }

  template <int kVectors, class Part>
  NORMZOO_INLINE OfChannels<kVectors> channels(Part part) const {
    OfChannels<kVectors> own;
    unrolled<kVectors>([&](auto i) {
      own.weight[i] = load(args.weight + i * kLanes, part);
      own.bias[i] = load(args.bias + i * kLanes, part);
    });
    return own;
  }

  // In one go from a shift, so that nothing waits for the mean but the result.
  template <int kVectors, int kKnown, class Part>
  NORMZOO_INLINE void held(const Row& row, const OfChannels<kKnown>& own, Part part) const {
    const T* x = args.x + row.at;
    const float shift = args.known ? args.mean[row.which] : args.centred ? (float)*x : 0;
    float off = 0, var = 0;
    vf v[kVectors], a[kVectors], b[kVectors];
    unrolled<kVectors>([&](auto i) { v[i] = load(x + i * kLanes, part) - splat(shift); });
    if (args.known) {
      if (!args.scale) var = args.var[row.which];
    } else {
      unrolled<kVectors>([&](auto i) {
        a[i] = only(v[i], part);
        b[i] = a[i] * a[i];
      });
      const auto [s1, s2] = sums(tree(a), tree(b));
      off = args.centred ? s1 * share : 0;
      var = s2 * share - off * off;
      if (off * off > (float)kFar * (var + eps)) return read(row);
      var = std::max(var, 0.f);
      keep(row, shift + off, var, true);
    }
    if (args.what == Do::sums) return;
    const float *weight = args.weight + row.channel, *bias = args.bias + row.channel, factor = scale(row, var);
    const vf scales = splat(factor), add = splat((args.shift ? args.shift[row.which] : 0) - off * factor);
    const Out<T> out(args.y + row.at, args.stream);
    unrolled<kVectors>([&](auto i) {
      const vf z = v[i] * scales + add;
      if constexpr (kKnown > 0)
        out.put(i * kLanes, z * own.weight[i] + own.bias[i], part);
      else
        out.put(i * kLanes, z * load(weight + i * kLanes, part) + load(bias + i * kLanes, part), part);
    });
  }

  static bool plain(const Forward<T>& args) { return !args.known && args.what == Do::all; }

  // The statistics from the first one on. As in held, from a shift each; their elements are read twice.
  template <int kVectors, int kKnown, class Part>
  NORMZOO_INLINE void many(const Row& first, int64_t count, const OfChannels<kKnown>& own, Part part) const {
    const T* x = args.x + first.at;
    const Tail several{count};
    alignas(64) float shifts[kLanes]{}, factors[kLanes], adds[kLanes];
    vf a[kLanes]{}, b[kLanes]{};
    for (int64_t j = 0; j < count; ++j, x += n) {
      const vf shift = splat(shifts[j] = args.centred ? (float)*x : 0);
      vf s1{}, s2{};
      unrolled<kVectors>([&](auto i) {
        const vf v = only(load(x + i * kLanes, part) - shift, part);
        s1 += v;
        s2 += v * v;
      });
      a[j] = s1;
      b[j] = s2;
    }
    const vf off = args.centred ? each_sum(a) * share : vf{}, var = each_sum(b) * share - off * off;
    const vf least = var < 0 ? vf{} : var, factor = 1 / root(least + eps);
    store(args.mean + first.which, load(shifts, Full{}) + off, several);
    store(args.var + first.which, least, several);
    store(factors, factor, Full{});
    store(adds, -off * factor, Full{});
    x = args.x + first.at;
    int64_t at = first.at, channel = first.channel;
    for (int64_t j = 0; j < count; ++j, at += n, x += n) {
      const vf shift = splat(shifts[j]), scale = splat(factors[j]), add = splat(adds[j]);
      const Out<T> out(args.y + at, args.stream);
      unrolled<kVectors>([&](auto i) {
        const vf z = (load(x + i * kLanes, part) - shift) * scale + add;
        if constexpr (kKnown > 0)
          out.put(i * kLanes, z * own.weight[i] + own.bias[i], part);
        else
          out.put(i * kLanes, z * load(args.weight + channel + i * kLanes, part) +
                                  load(args.bias + channel + i * kLanes, part), part);
      });
      if constexpr (kKnown == 0)
        if ((channel += n) == width) channel = 0;
    }
    const vf far = only(off * off > (float)kFar * (var + eps) ? splat(1) : vf{}, several);
    if (sum(far) == 0) return;
    for (int64_t j = 0; j < count; ++j)
      if (far[j] != 0) read({first.at + j * n, (first.channel + j * n) % width, first.which + j});
  }

  // The first of several statistics of kEach channels, which a vector holds.
  template <int kEach, class Part>
  NORMZOO_INLINE void several(const Row& row, Part part) const {
    const vf x = load(args.x + row.at, part), mean = args.centred ? sum_together<kEach>(x) * share : vf{};
    const vf off = x - mean, var = sum_together<kEach>(off * off) * share;
    store_of_each<kEach>(args.mean + row.which, mean, part);
    store_of_each<kEach>(args.var + row.which, var, part);
    const vf weight = load(args.weight + row.channel, part), bias = load(args.bias + row.channel, part);
    Out<T>(args.y + row.at, args.stream).put(0, off / root(var + eps) * weight + bias, part);
  }

  void read(const Row& row) const {
    const T* x = args.x + row.at;
    float mean = 0, var = 0;
    if (args.known) {
      mean = args.mean[row.which];
      if (!args.scale) var = args.var[row.which];
    } else {
      vf a[4] = {};
      if (args.centred) {
        vectors(n, [&](int64_t i, int j, auto whole) { a[j] += load(x + i, whole); });
        mean = sum(tree(a)) / n;
      }
      const vf middle = splat(mean);
      vf b[4] = {};
      vectors(n, [&](int64_t i, int j, auto whole) {
        const vf off = only(load(x + i, whole) - middle, whole);
        b[j] += off * off;
      });
      var = sum(tree(b)) * share;
      keep(row, mean, var, true);
    }
    if (args.what == Do::sums) return;
    const float *weight = args.weight + row.channel, *bias = args.bias + row.channel;
    const vf middle = splat(mean), factor = splat(scale(row, var));
    const vf add = splat(args.shift ? args.shift[row.which] : 0);
    const Out<T> out(args.y + row.at, args.stream);
    out.each(n, [&](int64_t i, auto whole) {
      const vf v = (load(x + i, whole) - middle) * factor + add;
      return v * load(weight + i, whole) + load(bias + i, whole);
    });
  }

  template <int kVectors, class Part>
  void join(const OfChannels<kVectors>&, Part) const {}
};

template <class T>
struct RowsBackward {
  const Backward<T> args;
  const int64_t n, run, width;
  const float share, eps;
  Floats parameters;  // gradients of the weight and the bias from rows that have not joined the total

  RowsBackward(const Plan& plan, const Backward<T>& args)
      : args(args), n(plan.width / plan.groups), run(plan.width), width((run + kLanes - 1) / kLanes * kLanes),
        share(1.f / n), eps((float)args.eps), parameters(2 * width, 0.f) {}

  void skip(const Row& row) const {
    if (args.what != Do::sums) std::fill_n(args.dx + row.at, n, T(0));
    if (args.what == Do::sums) args.sum[row.which] = args.product[row.which] = 0;
  }

  NORMZOO_INLINE float scale_of(const Row& row) const {
    return args.var ? 1 / std::sqrt(args.var[row.which] + eps) : args.scale ? args.scale[row.which] : 1;
  }

  // What a vector of d and one of x - mean add to the gradients of the parameters.
  template <class Part>
  NORMZOO_INLINE void count(int64_t c, vf d, vf both, vf scale, Part part) {
    float *dweight = parameters.data() + c, *dbias = dweight + width;
    store(dweight, load(dweight, part) + both * scale, part);
    store(dbias, load(dbias, part) + d, part);
  }

  template <int kVectors, class Part>
  NORMZOO_INLINE OfChannels<kVectors> channels(Part) const {
    OfChannels<kVectors> own;
    unrolled<kVectors>([&](auto i) { own.weight[i] = own.bias[i] = vf{}; });
    return own;
  }

  struct Coefficients {
    float p, q, r;
  };
  NORMZOO_INLINE Coefficients coefficients(const Row& row, float rstd, float s1, float s2) const {
    if (args.what == Do::apply) return {args.p[row.which], args.q[row.which], args.r[row.which]};
    if (args.what == Do::sums) args.sum[row.which] = s1, args.product[row.which] = s2;
    // in this order: the cube of a scale leaves float32
    return {rstd, args.constant ? 0 : -(s2 * rstd * share) * rstd * rstd,
            args.constant || !args.centred ? 0 : -rstd * s1 * share};
  }

  template <int kVectors, int kKnown, class Part>
  NORMZOO_INLINE void held(const Row& row, OfChannels<kKnown>& own, Part part) {
    const T *x = args.x + row.at, *dy = args.dy + row.at;
    const float *weight = args.weight + row.channel, rstd = scale_of(row);
    const vf mean = splat(args.mean[row.which]), scale = splat(rstd);
    vf off[kVectors], d[kVectors], both[kVectors];
    unrolled<kVectors>([&](auto i) {
      const vf g = load(dy + i * kLanes, part);
      off[i] = load(x + i * kLanes, part) - mean;
      d[i] = g * load(weight + i * kLanes, part);
      both[i] = d[i] * off[i];
      if constexpr (kKnown > 0) {
        own.weight[i] += g * off[i] * scale;
        own.bias[i] += g;
      } else if (args.what != Do::apply) {
        count(row.channel + i * kLanes, g, g * off[i], scale, part);
      }
    });
    const auto [s1, s2] = sums(tree(d), tree(both));
    const auto [p, q, r] = coefficients(row, rstd, s1, s2);
    if (args.what == Do::sums) return;
    const vf vp = splat(p), vq = splat(q), vr = splat(r);
    const Out<T> out(args.dx + row.at, args.stream);
    unrolled<kVectors>([&](auto i) { out.put(i * kLanes, d[i] * vp + (off[i] * vq + vr), part); });
  }

  static bool plain(const Backward<T>& args) { return args.what == Do::all; }

  template <int kVectors, int kKnown, class Part>
  NORMZOO_INLINE void many(const Row& first, int64_t count, OfChannels<kKnown>& own, Part part) {
    const Tail several{count};
    const vf scale = 1 / root(load(args.var + first.which, several) + eps);
    alignas(64) float ps[kLanes], qs[kLanes], rs[kLanes];
    store(ps, scale, Full{});
    vf a[kLanes]{}, b[kLanes]{};
    const T *x = args.x + first.at, *dy = args.dy + first.at;
    int64_t channel = first.channel;
    const auto next = [&] {
      x += n;
      dy += n;
      if constexpr (kKnown == 0)
        if ((channel += n) == run) channel = 0;
    };
    for (int64_t j = 0; j < count; ++j, next()) {
      const vf mean = splat(args.mean[first.which + j]), scale = splat(ps[j]);
      vf s1{}, s2{};
      unrolled<kVectors>([&](auto i) {
        const vf g = load(dy + i * kLanes, part), w = load(args.weight + channel + i * kLanes, part);
        const vf both = g * (load(x + i * kLanes, part) - mean);
        s1 += g * w;
        s2 += both * w;
        if constexpr (kKnown > 0) {
          own.weight[i] += both * scale;
          own.bias[i] += g;
        } else {
          this->count(channel + i * kLanes, g, both, scale, part);
        }
      });
      a[j] = s1;
      b[j] = s2;
    }
    const vf ratio = args.constant ? vf{} : scale * share;
    store(qs, -(each_sum(b) * scale) * ratio * scale, Full{});
    store(rs, args.centred ? -ratio * each_sum(a) : vf{}, Full{});
    x = args.x + first.at;
    dy = args.dy + first.at;
    channel = first.channel;
    for (int64_t j = 0; j < count; ++j, next()) {
      const vf mean = splat(args.mean[first.which + j]), p = splat(ps[j]), q = splat(qs[j]), r = splat(rs[j]);
      const Out<T> out(args.dx + (x - args.x), args.stream);
      unrolled<kVectors>([&](auto i) {
        const vf d = load(dy + i * kLanes, part) * load(args.weight + channel + i * kLanes, part);
        out.put(i * kLanes, d * p + ((load(x + i * kLanes, part) - mean) * q + r), part);
      });
    }
  }

  template <int kEach, class Part>
  NORMZOO_INLINE void several(const Row& row, Part part) {
    const vf g = load(args.dy + row.at, part), d = g * load(args.weight + row.channel, part);
    const vf off = load(args.x + row.at, part) - load_for_each<kEach>(args.mean + row.which, part);
    const vf scale = 1 / root(load_for_each<kEach>(args.var + row.which, part) + eps);
    count(row.channel, g, g * off, scale, part);
    const vf ratio = args.constant ? vf{} : scale * share;
    const vf q = -(sum_together<kEach>(d * off) * scale) * ratio * scale;
    const vf r = args.centred ? -ratio * sum_together<kEach>(d) : vf{};
    Out<T>(args.dx + row.at, args.stream).put(0, d * scale + (off * q + r), part);
  }

  void read(const Row& row) {
    const T *x = args.x + row.at, *dy = args.dy + row.at;
    const float *weight = args.weight + row.channel, rstd = scale_of(row);
    const vf mean = splat(args.mean[row.which]), scale = splat(rstd);
    Sums own;
    if (args.what != Do::apply)
      vectors(n, [&](int64_t i, int j, auto whole) {
        const vf d = load(dy + i, whole), w = load(weight + i, whole), both = d * (load(x + i, whole) - mean);
        own.a[j] += w * d;
        own.b[j] += w * both;
        count(row.channel + i, d, both, scale, whole);
      });
    const auto [s1, s2] = sums(tree(own.a), tree(own.b));
    const auto [p, q, r] = coefficients(row, rstd, s1, s2);
    if (args.what == Do::sums) return;
    const vf vp = splat(p), vq = splat(q), vr = splat(r);
    const Out<T> out(args.dx + row.at, args.stream);
    out.each(n, [&](int64_t i, auto whole) {
      const vf off = load(x + i, whole) - mean;
      return load(dy + i, whole) * (load(weight + i, whole) * vp) + (off * vq + vr);
    });
  }

  template <int kVectors, class Part>
  void join(const OfChannels<kVectors>& own, Part part) {
    if (args.what == Do::apply) return;
    unrolled<kVectors>([&](auto i) {
      store(parameters.data() + i * kLanes, own.weight[i], part);
      store(parameters.data() + width + i * kLanes, own.bias[i], part);
    });
    float *weight = args.shares->weight(), *bias = args.shares->bias();
    for (int64_t i = 0; i < run; ++i) weight[i] += parameters[i], bias[i] += parameters[width + i];
    std::fill(parameters.begin(), parameters.end(), 0.f);
  }
};

// ---- columns: the innermost run is kept, or is all channels ------------------------------------------------------

// The first are sums, which threads merge: two, or four where there are masks or floors.
enum Column { kS1, kS2, kCount, kBelow, kShift, kMean, kScale, kAdd, kP, kQ, kR, kWeight, kBias, kFloor, kColumns };

struct ColumnsPart {
  int64_t width, sums;
  int64_t block = kS1, pending = 0;  // where rows are being summed, kS1 or kP, and how many they are
  int64_t begin = 0;
  Floats data;  // kColumns rows of the width, from the beginning on
  double rows = 0;
  int passes = 0;

  ColumnsPart(int64_t columns, int64_t sums)
      : width((columns + kLanes - 1) / kLanes * kLanes), sums(sums), data(kColumns * width + kPage / sizeof(float)) {}
  float* at(int which) { return data.data() + begin + which * width; }
  const float* at(int which) const { return data.data() + begin + which * width; }

  // Begin where sums that are stored do not lie, within their page, where the rows are loaded next: a processor takes
  // such a load to depend on the store. Rows of whole pages would meet that at every vector.
  template <class T>
  void avoid(std::initializer_list<const T*> rows) {
    constexpr uint64_t kLine = 64, kAhead = 24 * kLine;
    const auto place = [&] { return reinterpret_cast<uint64_t>(at(kS1)); };
    const auto met = [&](const T* row) { return (place() - reinterpret_cast<uint64_t>(row) - kLine) % kPage < kAhead; };
    while (std::any_of(rows.begin(), rows.end(), met)) begin += kLine / sizeof(float);
  }

  void clear() {
    std::fill_n(at(kS1), sums * width, 0.f);
    block = kS1;
    rows = pending = 0;
  }
  void merge(const ColumnsPart& other) {
    for (int64_t i = 0; i < sums * width; ++i) at(kS1)[i] += other.at(kS1)[i];
    rows += other.rows;
  }
};

NORMZOO_INLINE vf at_least_one(vf v) { return v < 1 ? splat(1) : v; }

// Call f(many, first, step) for rows from to to: so many from the first on, one step apart. Those that are read together
// lie far apart: each is a stream of its own that the processor fetches ahead.
template <int kMany, class F>
void far_apart(int64_t from, int64_t to, F&& f) {
  const int64_t step = (to - from) / kMany;
  for (int64_t i = from; i < from + step; ++i) f(std::integral_constant<int, kMany>{}, i, step);
  for (from += kMany * step; from < to; ++from) f(std::integral_constant<int, 1>{}, from, 1);
}

// Rows that are read together, and how far it is to the next ones: several at once are more than the processor's own
// prefetching can follow.
template <class T, int kMany>
struct Rows {
  const T* at[kMany];
  int64_t next;

  NORMZOO_INLINE explicit Rows(const T* const* rows) : next(rows[kMany] - rows[0]) {
    for (int j = 0; j < kMany; ++j) at[j] = rows[j];
  }
  NORMZOO_INLINE void fetch(int64_t i, int j) const { __builtin_prefetch(at[j] + i + next); }
};

// Go on with a list of rows as it ends, for what is fetched ahead.
template <class T>
void follow(const T** rows, int64_t n, int64_t more) {
  const int64_t step = n > 1 ? rows[n - 1] - rows[n - 2] : 0;
  for (int64_t i = n; i < n + more; ++i) rows[i] = rows[i - 1] + step;
}

// What is the same forward and backward. A task is a kept index, and a piece of a long run that lies in one channel.
template <bool kAcross, bool kMask>
struct Columns {
  const Plan& plan;
  int64_t length = 0, pieces = 1;

  explicit Columns(const Plan& plan) : plan(plan) {
    length = kAcross ? plan.width : std::min<int64_t>(plan.width, 1024);
    pieces = (plan.width + length - 1) / length;
  }
  void enter(ColumnsPart&) const {}
  int64_t tasks() const { return plan.kept.size() * pieces; }
  int64_t start(int64_t k) const { return plan.kept[k / pieces].memory + k % pieces * length; }
  int64_t columns(int64_t k) const { return std::min(length, plan.width - k % pieces * length); }
  // columns with parameters or statistics of their own: the others repeat them
  int64_t distinct(int64_t k) const { return kAcross ? plan.channels : columns(k); }
  int64_t group(int64_t c) const { return kAcross ? plan.group[c] : c; }
  int64_t first(int64_t k) const { return k / pieces * plan.groups + k % pieces * length; }  // statistic
  int64_t statistics(int64_t k) const { return kAcross ? plan.groups : columns(k); }
  int64_t channel(int64_t k, int64_t r) const {
    return kAcross ? 0 : plan.kept[k / pieces].channel + plan.reduced[r].channel;
  }
  const uint8_t* mask(const uint8_t* mask, int64_t k, int64_t r) const {
    return mask + plan.kept[k / pieces].mask + plan.reduced[r].mask + (kAcross ? 0 : k % pieces * length);
  }
  // Statistics, one for each distinct column: where they are if that is what they are, or else in place.
  const float* each(int64_t k, const float* from, float* place) const {
    const int64_t n = distinct(k);
    if (statistics(k) == n) return from;
    if (plan.block > 0) {
      for (int64_t g = 0; g < plan.groups; ++g) std::fill_n(place + g * plan.block, plan.block, from[g]);
    } else {
      for (int64_t c = 0; c < n; ++c) place[c] = from[plan.group[c]];
    }
    return place;
  }
  void gather(int64_t k, const float* from, float* to) const {
    if (each(k, from, to) == from) std::copy_n(from, distinct(k), to);
  }
  // For each statistic the sum of f over its columns.
  template <class F>
  void fold(float* to, F&& f) const {
    if (plan.block > 0) {
      for (int64_t g = 0; g < plan.groups; ++g) {
        vf all{};
        vectors(plan.block, [&](int64_t i, int, auto whole) { all += only(f(g * plan.block + i, whole), whole); });
        to[g] = sum(all);
      }
    } else {
      std::fill_n(to, plan.groups, 0.f);
      for (int64_t c = 0; c < plan.channels; ++c) to[plan.group[c]] += f(c, Tail{1})[0];
    }
  }
  void repeat(ColumnsPart& part, std::initializer_list<Column> which) const {
    for (const auto column : which)
      for (int64_t i = 1; i < plan.repeat; ++i)
        std::copy_n(part.at(column), plan.channels, part.at(column) + i * plan.channels);
  }
  void clear(ColumnsPart& part) const {
    part.clear();
    if (plan.repeat > 1) open(part);
  }
  // Rows are summed in blocks. The first is the total, unless its columns repeat, further ones join it.
  void open(ColumnsPart& part) const {
    part.block = kP;
    part.pending = 0;
    std::fill_n(part.at(kP), 2 * part.width, 0.f);
  }
  void make_room(int64_t k, int64_t rows, ColumnsPart& part) const {
    if (part.pending + rows > kRows) {
      join(k, part);
      open(part);
    }
    part.pending += rows;
  }
  void join(int64_t k, ColumnsPart& part) const {
    if (part.block == kS1) return;
    const int64_t n = distinct(k);
    for (const auto& [total, block] : {std::pair(kS1, kP), std::pair(kS2, kQ)}) {
      float *to = part.at(total), *from = part.at(block);
      for (int64_t i = 0; i < plan.repeat; ++i)
        for (int64_t c = 0; c < n; ++c) to[c] += from[i * n + c];
    }
  }
};

template <class T, bool kAcross, bool kMask>
struct ColumnsForward : Columns<kAcross, kMask> {
  const Forward<T>& args;

  ColumnsForward(const Plan& plan, const Forward<T>& args) : Columns<kAcross, kMask>(plan), args(args) {}

  ColumnsPart part() const { return ColumnsPart(this->length, kMask ? 4 : 2); }

  // The coefficients of each column, from the statistics of its group.
  NORMZOO_FLATTEN void spread(int64_t k, ColumnsPart& part) const {
    const int64_t n = this->distinct(k), first = this->first(k);
    const vf eps = splat((float)args.eps);
    float *means = part.at(kMean), *scales = part.at(kScale), *adds = part.at(kAdd);
    this->gather(k, args.mean + first, means);
    const float* spreads = this->each(k, args.scale ? args.scale + first : args.var + first, scales);
    const float* shifts = args.shift ? this->each(k, args.shift + first, adds) : nullptr;
    vectors(n, [&](int64_t i, int, auto whole) {
      vf scale = load(spreads + i, whole), add{};
      if (!args.scale) scale = 1 / root(scale + eps);
      if (shifts) add = load(shifts + i, whole);
      if constexpr (kAcross) {
        const vf weight = load(args.weight + i, whole);
        scale *= weight;
        add = add * weight + load(args.bias + i, whole);
      }
      store(scales + i, scale, whole);
      store(adds + i, add, whole);
    });
    if (kAcross && args.floor) std::copy_n(args.floor, n, part.at(kFloor));
    this->repeat(part, {kMean, kScale, kAdd, kFloor});
  }

  NORMZOO_FLATTEN void begin(int64_t k, ColumnsPart& part) const {
    this->clear(part);
    part.passes = 0;
    if (args.known) return spread(k, part);
    // the mean of some rows: one alone is often far from that of all, in one of many columns
    constexpr int64_t kMost = 8;
    const int64_t rows = this->plan.reduced.size();
    const int64_t many = args.centred ? std::clamp<int64_t>(rows / 16, 1, kMost) : 0;
    const T* some[kMost];
    const uint8_t* masks[kMost];
    int64_t real = 0;
    for (int64_t i = 0; i < many; ++i) {
      const int64_t r = rows * i / many;
      if constexpr (kMask) {
        masks[real] = this->mask(args.mask, k, r);
        if (kAcross && !*masks[real]) continue;
      }
      some[real++] = args.x + this->start(k) + this->plan.reduced[r].memory;
    }
    const vf share = splat(many > 0 ? 1.f / many : 0);  // the sum of whole values may leave float32
    vectors(this->distinct(k), [&](int64_t c, int, auto whole) {
      vf mean{}, shares{};
      for (int64_t i = 0; i < real; ++i) {
        vf v = load(some[i] + c, whole) * share, one = share;
        if constexpr (kMask && !kAcross) v = where(masks[i] + c, v, whole), one = where(masks[i] + c, one, whole);
        mean += v;
        shares += one;
      }
      if constexpr (kMask) mean /= shares == 0 ? splat(1) : shares;
      store(part.at(kShift) + c, mean, whole);
    });
    this->repeat(part, {kShift});
  }

  template <int kMany>
  void add_rows(const T* const* rows, const uint8_t* const* masks, int64_t step, int64_t n, ColumnsPart& part) const {
    float *t1 = part.at(part.block), *t2 = part.at(part.block + 1), *number = part.at(kCount);
    const float* from = part.at(kShift);
    const T* x[kMany];
    for (int j = 0; j < kMany; ++j) x[j] = rows[j * step];
    strips<kStrip>(n, [&](int64_t i, auto many, auto whole) {
      vf a[many], b[many], base[many], real[many];
      for (int v = 0; v < many; ++v) {
        a[v] = load(t1 + i + v * kLanes, whole);
        b[v] = load(t2 + i + v * kLanes, whole);
        base[v] = load(from + i + v * kLanes, whole);
        real[v] = vf{};
      }
#pragma GCC unroll 8
      for (int j = 0; j < kMany; ++j)
        for (int v = 0; v < many; ++v) {
          vf off = load(x[j] + i + v * kLanes, whole) - base[v];
          if constexpr (kMask && !kAcross) {
            const uint8_t* mask = masks[j * step] + i + v * kLanes;
            off = where(mask, off, whole);
            real[v] += where(mask, splat(1), whole);
          }
          a[v] += off;
          b[v] += off * off;
        }
      for (int v = 0; v < many; ++v) {
        store(t1 + i + v * kLanes, a[v], whole);
        store(t2 + i + v * kLanes, b[v], whole);
        float* count = number + i + v * kLanes;
        if constexpr (kMask && !kAcross) store(count, load(count, whole) + real[v], whole);
      }
    });
  }

  void add(int64_t k, int64_t from, int64_t to, ColumnsPart& part) const {
    constexpr int kMany = kAcross ? 2 : 4;
    const int64_t n = this->columns(k);
    const T* rows[kListed];
    const uint8_t* masks[kListed];
    for (int64_t r = from; r < to;) {
      int64_t many = 0;
      for (; r < to && many < kListed; ++r) {
        if constexpr (kMask) {
          masks[many] = this->mask(args.mask, k, r);
          if (kAcross && !*masks[many]) continue;
        }
        rows[many++] = args.x + this->start(k) + this->plan.reduced[r].memory;
      }
      far_apart<kMany>(0, many, [&](auto together, int64_t first, int64_t step) {
        this->make_room(k, together, part);
        add_rows<together>(rows + first, masks + first, step, n, part);
      });
      part.rows += (double)(many * this->plan.repeat);
    }
    this->join(k, part);
  }

  NORMZOO_FLATTEN bool settle(int64_t k, ColumnsPart& part) const {
    const int64_t n = this->distinct(k), statistics = this->statistics(k), first = this->first(k);
    const float eps = (float)args.eps, rows = std::max(1.f, (float)part.rows);
    constexpr bool kEach = kMask && !kAcross;  // every column has a number of its own
    float *number = part.at(kCount), *from = part.at(kShift);
    // of a column: the mean, from its shift, and the variance
    const auto moments = [&, s1 = part.at(kS1), s2 = part.at(kS2)](int64_t i, auto whole) {
      const vf inverse = 1 / (kEach ? at_least_one(load(number + i, whole)) : splat(rows));
      const vf mean = args.centred ? load(s1 + i, whole) * inverse : vf{};
      return std::pair(mean, load(s2 + i, whole) * inverse - mean * mean);
    };
    if (part.passes++ == 0) {
      vf far{};
      vectors(n, [&](int64_t i, int, auto whole) {
        const auto [mean, var] = moments(i, whole);
        far += only(mean * mean > (float)kFar * (var + eps) ? splat(1) : vf{}, whole);
      });
      if (sum(far) > 0) {
        vectors(n, [&](int64_t i, int, auto whole) {
          store(from + i, load(from + i, whole) + moments(i, whole).first, whole);
        });
        this->repeat(part, {kShift});
        this->clear(part);
        return false;
      }
    }
    float *means = args.mean + first, *vars = args.var + first;
    if (statistics == n) {
      vectors(n, [&](int64_t i, int, auto whole) {  // zero where nothing is real
        const vf count = kEach ? load(number + i, whole) : splat((float)part.rows);
        const auto [mean, var] = moments(i, whole);
        store(means + i, count == 0 ? vf{} : mean + load(from + i, whole), whole);
        store(vars + i, (count == 0) | (var < 0) ? vf{} : var, whole);
      });
    } else if (part.rows == 0) {
      std::fill_n(means, statistics, 0.f);
      std::fill_n(vars, statistics, 0.f);
    } else {  // all from the shift of one column of the group: the means may be large and close to each other
      const float share = (float)statistics / (float)n;
      float *apart = part.at(kMean), *base = part.at(kR), *middle = part.at(kWeight), *column = part.at(kBias);
      if (this->plan.block > 0)
        for (int64_t g = 0; g < statistics; ++g) base[g] = from[g * this->plan.block];
      else
        for (int64_t c = n; c-- > 0;) base[this->group(c)] = from[c];
      this->gather(k, base, column);
      vectors(n, [&](int64_t i, int, auto whole) {
        store(apart + i, moments(i, whole).first + (load(from + i, whole) - load(column + i, whole)), whole);
      });
      this->fold(middle, [&](int64_t i, auto whole) { return load(apart + i, whole); });
      for (int64_t g = 0; g < statistics; ++g) {
        middle[g] *= args.centred ? share : 0;
        means[g] = args.centred ? base[g] + middle[g] : 0;
      }
      this->gather(k, middle, column);
      this->fold(vars, [&](int64_t i, auto whole) {
        const vf off = args.centred ? load(apart + i, whole) - load(column + i, whole) : vf{};
        const vf var = moments(i, whole).second;
        return (var < 0 ? vf{} : var) + off * off;
      });
      for (int64_t g = 0; g < statistics; ++g) vars[g] *= share;
    }
    if (kMask)
      for (int64_t g = 0; g < statistics; ++g)
        args.number[first + g] = kEach ? number[g] : (float)part.rows * n / statistics;
    spread(k, part);
    return true;
  }

  template <int kMany>
  void apply_rows(int64_t k, int64_t first, int64_t step, const ColumnsPart& part) const {
    const int64_t n = this->columns(k);
    const float *means = part.at(kMean), *scales = part.at(kScale), *adds = part.at(kAdd), *floors = part.at(kFloor);
    const T* x[kMany];
    Out<T> y[kMany];
    const uint8_t* mask[kMany];
    vf weight[kMany], bias[kMany];
    for (int j = 0; j < kMany; ++j) {
      const int64_t r = first + j * step, at = this->start(k) + this->plan.reduced[r].memory;
      x[j] = args.x + at;
      y[j] = Out<T>(args.y + at, args.stream);
      mask[j] = kMask ? this->mask(args.mask, k, r) : nullptr;
      weight[j] = splat(kAcross ? 1 : args.weight[this->channel(k, r)]);
      bias[j] = splat(kAcross ? 0 : args.bias[this->channel(k, r)]);
      if (kAcross && kMask && !*mask[j]) return (void)std::fill_n(args.y + at, n, T(0));  // one at a time
    }
    strips<kStrip>(n, [&](int64_t i, auto many, auto whole) {
      vf mean[many], scale[many], add[many];
      for (int v = 0; v < many; ++v) {
        mean[v] = load(means + i + v * kLanes, whole);
        scale[v] = load(scales + i + v * kLanes, whole);
        add[v] = load(adds + i + v * kLanes, whole);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kMany; ++j)
        for (int v = 0; v < many; ++v) {
          const int64_t at = i + v * kLanes;
          vf value = (load(x[j] + at, whole) - mean[v]) * scale[v] + add[v];
          if constexpr (kAcross) {
            if (args.floor) {
              const vf floor = load(floors + at, whole);
              value = value < floor ? floor : value;
            }
          } else {
            value = value * weight[j] + bias[j];
            if constexpr (kMask) value = where(mask[j] + at, value, whole);
          }
          y[j].put(at, value, whole);
        }
    });
  }

  void apply(int64_t k, int64_t from, int64_t to, const ColumnsPart& part) const {
    far_apart<kAcross && kMask ? 1 : 4>(from, to, [&](auto together, int64_t first, int64_t step) {
      apply_rows<together>(k, first, step, part);
    });
  }
};

template <class T, bool kAcross, bool kMask, bool kLimited>
struct ColumnsBackward : Columns<kAcross, kMask> {
  const Backward<T>& args;

  ColumnsBackward(const Plan& plan, const Backward<T>& args) : Columns<kAcross, kMask>(plan), args(args) {}

  ColumnsPart part() const {
    ColumnsPart part(this->length, kLimited ? 4 : 2);
    if constexpr (!kAcross) part.avoid({args.x, args.dy});
    return part;
  }

  NORMZOO_FLATTEN void begin(int64_t k, ColumnsPart& part) const {
    this->clear(part);
    const int64_t n = this->distinct(k), first = this->first(k);
    const vf eps = splat((float)args.eps);
    float *scales = part.at(kScale), *weights = part.at(kWeight);
    this->gather(k, args.mean + first, part.at(kMean));
    if constexpr (kAcross) std::copy_n(args.weight, n, weights);
    if (args.scale) this->gather(k, args.scale + first, scales);
    if (args.var) {
      const float* vars = this->each(k, args.var + first, scales);
      vectors(n, [&](int64_t i, int, auto whole) {
        store(scales + i, 1 / root(load(vars + i, whole) + eps), whole);
      });
    }
    this->repeat(part, {kMean, kScale});
    if (kLimited) {
      std::copy_n(args.bias, n, part.at(kBias));
      std::copy_n(args.floor, n, part.at(kFloor));
      this->repeat(part, {kWeight, kBias, kFloor});
    }
    if (args.what != Do::apply) return;
    this->gather(k, args.p + first, part.at(kP));
    this->gather(k, args.q + first, part.at(kQ));
    this->gather(k, args.r + first, part.at(kR));
    if constexpr (kAcross)
      for (int64_t c = 0; c < n; ++c) part.at(kP)[c] *= weights[c];
    this->repeat(part, {kP, kQ, kR});
  }

  template <class Part>
  NORMZOO_INLINE vf gradient(const T* dy, const ColumnsPart& part, int64_t i, vf off, Part whole) const {
    const vf g = load(dy + i, whole);
    if constexpr (!kLimited) return g;
    const vf value = off * load(part.at(kScale) + i, whole) * load(part.at(kWeight) + i, whole);
    return value + load(part.at(kBias) + i, whole) < load(part.at(kFloor) + i, whole) ? vf{} : g;
  }

  // Rows across the channels.
  template <int kMany>
  void add_across(const T* const* xs, const T* const* dys, int64_t n, ColumnsPart& part) const {
    const Rows<T, kMany> x(xs), dy(dys);
    float *t1 = part.at(part.block), *t2 = part.at(part.block + 1), *under = part.at(kBelow);
    const float* means = part.at(kMean);
    vectors(n, [&](int64_t i, int, auto whole) {
      vf a = load(t1 + i, whole), b = load(t2 + i, whole), dropped{};
      const vf middle = load(means + i, whole);
#pragma GCC unroll 8
      for (int j = 0; j < kMany; ++j) {
        const vf off = load(x.at[j] + i, whole) - middle;
        const vf g = gradient(dy.at[j], part, i, off, whole);
        x.fetch(i, j);
        dy.fetch(i, j);
        a += g;
        b += g * off;
        if constexpr (kLimited) dropped += load(dy.at[j] + i, whole) - g;
      }
      store(t1 + i, a, whole);
      store(t2 + i, b, whole);
      if constexpr (kLimited) store(under + i, load(under + i, whole) + dropped, whole);
    });
  }

  // Rows that lie in one channel each.
  template <int kMany>
  void add_along(const T* const* xs, const T* const* dys, const uint8_t* const* masks, const int64_t* channels,
                 int64_t n, ColumnsPart& part) const {
    const Rows<T, kMany> x(xs), dy(dys);
    float *t1 = part.at(part.block), *t2 = part.at(part.block + 1);
    const float *means = part.at(kMean), *scales = part.at(kScale);
    vf sums[kMany] = {}, products[kMany] = {}, weight[kMany];
    for (int j = 0; j < kMany; ++j) weight[j] = splat(args.weight[channels[j]]);
    vectors(n, [&](int64_t i, int, auto whole) {
      vf a = load(t1 + i, whole), b = load(t2 + i, whole);
      const vf middle = load(means + i, whole), scale = load(scales + i, whole);
#pragma GCC unroll 4
      for (int j = 0; j < kMany; ++j) {
        vf g = load(dy.at[j] + i, whole), off = load(x.at[j] + i, whole) - middle;
        x.fetch(i, j);
        dy.fetch(i, j);
        if constexpr (kMask) {
          g = where(masks[j] + i, g, whole);
          off = where(masks[j] + i, off, whole);
        }
        const vf both = g * off;
        sums[j] += g;
        products[j] += both * scale;
        a += g * weight[j];
        b += both * weight[j];
      }
      store(t1 + i, a, whole);
      store(t2 + i, b, whole);
    });
    for (int j = 0; j < kMany; ++j) {
      args.shares->bias()[channels[j]] += sum(sums[j]);
      args.shares->weight()[channels[j]] += sum(products[j]);
    }
  }

  template <int kMany>
  void add_rows(const T* const* xs, const T* const* dys, const uint8_t* const* masks, const int64_t* channels,
                int64_t n, ColumnsPart& part) const {
    if constexpr (kAcross)
      add_across<kMany>(xs, dys, n, part);
    else
      add_along<kMany>(xs, dys, masks, channels, n, part);
  }

  void add(int64_t k, int64_t from, int64_t to, ColumnsPart& part) const {
    constexpr int kMany = kAcross ? 4 : 1;
    const int64_t n = this->columns(k), start = this->start(k);
    const T *xs[kRows + kMany], *dys[kRows + kMany];
    const uint8_t* masks[kRows];
    int64_t channels[kRows];
    for (int64_t r = from; r < to;) {
      int64_t many = 0;
      for (; r < to && many < kRows; ++r) {
        if constexpr (kMask) {
          masks[many] = this->mask(args.mask, k, r);
          if (kAcross && !*masks[many]) continue;
        }
        channels[many] = this->channel(k, r);
        xs[many] = args.x + start + this->plan.reduced[r].memory;
        dys[many++] = args.dy + start + this->plan.reduced[r].memory;
      }
      if (many == 0) continue;
      follow(xs, many, kMany);
      follow(dys, many, kMany);
      this->make_room(k, many, part);
      int64_t j = 0;
      for (; j + kMany <= many; j += kMany) add_rows<kMany>(xs + j, dys + j, masks + j, channels + j, n, part);
      for (; j < many; ++j) add_rows<1>(xs + j, dys + j, masks + j, channels + j, n, part);
    }
    this->join(k, part);
    if constexpr (kLimited) {
      float* under = part.at(kBelow);
      for (int64_t i = this->plan.channels; i < n; ++i) {
        under[i % this->plan.channels] += under[i];
        under[i] = 0;
      }
    }
  }

  NORMZOO_FLATTEN bool settle(int64_t k, ColumnsPart& part) const {
    const int64_t n = this->distinct(k), statistics = this->statistics(k), first = this->first(k);
    const float *s1 = part.at(kS1), *s2 = part.at(kS2), *scale = part.at(kScale);
    // the sum of a column, its rows weighted or else itself
    const auto weighted = [weight = part.at(kWeight)](const float* from, int64_t i, auto whole) {
      return kAcross ? load(from + i, whole) * load(weight + i, whole) : load(from + i, whole);
    };
    if constexpr (kAcross) {
      float *dweight = args.shares->weight(), *dbias = args.shares->bias(), *dfloor = args.shares->floor();
      for (int64_t c = 0; c < n; ++c) {
        dbias[c] += s1[c];
        dweight[c] += s2[c] * scale[c];
        if (kLimited) dfloor[c] += part.at(kBelow)[c];
      }
    }
    const bool alone = statistics == n, only_sums = args.what == Do::sums;
    float *sums = only_sums ? args.sum + first : part.at(kShift);
    float *products = only_sums ? args.product + first : sums + statistics;
    if (!alone) {
      this->fold(sums, [&](int64_t i, auto whole) { return weighted(s1, i, whole); });
      this->fold(products, [&](int64_t i, auto whole) { return weighted(s2, i, whole); });
    } else if (only_sums) {
      vectors(n, [&](int64_t i, int, auto whole) {
        store(sums + i, weighted(s1, i, whole), whole);
        store(products + i, weighted(s2, i, whole), whole);
      });
    }
    if (only_sums) return true;
    const float* a = alone ? s1 : this->each(k, sums, part.at(kCount));
    const float* b = alone ? s2 : this->each(k, products, part.at(kBelow));
    float *p = part.at(kP), *q = part.at(kQ), *r = part.at(kR);
    const float* number = args.number ? this->each(k, args.number + first, part.at(kAdd)) : nullptr;
    const bool moving = !args.constant;
    vectors(n, [&](int64_t i, int, auto whole) {
      const vf sum = alone ? weighted(a, i, whole) : load(a + i, whole);
      const vf product = alone ? weighted(b, i, whole) : load(b + i, whole);
      const vf count = number ? at_least_one(load(number + i, whole)) : splat((float)this->plan.count);
      const vf factor = load(scale + i, whole), ratio = moving ? factor / count : vf{};
      store(p + i, weighted(scale, i, whole), whole);
      store(q + i, -(product * factor) * ratio * factor, whole);  // the cube would leave float32
      store(r + i, args.centred ? -ratio * sum : vf{}, whole);
    });
    this->repeat(part, {kP, kQ, kR});
    return true;
  }

  template <int kMany>
  void apply_rows(int64_t k, int64_t first, int64_t step, const ColumnsPart& part) const {
    const int64_t n = this->columns(k);
    const float *means = part.at(kMean), *ps = part.at(kP), *qs = part.at(kQ), *rs = part.at(kR);
    const T *x[kMany], *dy[kMany];
    Out<T> dx[kMany];
    const uint8_t* mask[kMany];
    vf weight[kMany];
    for (int j = 0; j < kMany; ++j) {
      const int64_t r = first + j * step, at = this->start(k) + this->plan.reduced[r].memory;
      x[j] = args.x + at;
      dy[j] = args.dy + at;
      dx[j] = Out<T>(args.dx + at, args.stream);
      mask[j] = kMask ? this->mask(args.mask, k, r) : nullptr;
      weight[j] = splat(kAcross ? 1 : args.weight[this->channel(k, r)]);
      if (kAcross && kMask && !*mask[j]) return (void)std::fill_n(args.dx + at, n, T(0));  // one at a time
    }
    strips<kStrip>(n, [&](int64_t i, auto many, auto whole) {
      vf mean[many], p[many], q[many], rest[many];
      for (int v = 0; v < many; ++v) {
        mean[v] = load(means + i + v * kLanes, whole);
        p[v] = load(ps + i + v * kLanes, whole);
        q[v] = load(qs + i + v * kLanes, whole);
        rest[v] = load(rs + i + v * kLanes, whole);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kMany; ++j)
        for (int v = 0; v < many; ++v) {
          const int64_t at = i + v * kLanes;
          const vf off = load(x[j] + at, whole) - mean[v];
          vf value = gradient(dy[j], part, at, off, whole) * weight[j] * p[v] + (off * q[v] + rest[v]);
          if constexpr (kMask && !kAcross) value = where(mask[j] + at, value, whole);
          dx[j].put(at, value, whole);
        }
    });
  }

  void apply(int64_t k, int64_t from, int64_t to, const ColumnsPart& part) const {
    // from memory two tensors are enough to follow
    if ((to - from) * this->columns(k) * 2 * (int64_t)sizeof(T) > kNear || (kAcross && kMask)) {
      for (; from < to; ++from) apply_rows<1>(k, from, 1, part);
    } else {
      far_apart<4>(from, to, [&](auto together, int64_t first, int64_t step) {
        apply_rows<together>(k, first, step, part);
      });
    }
  }
};

// ---- the choice among them ---------------------------------------------------------------------------------------

template <class T, bool kMask>
void forward(const Plan& plan, const Forward<T>& args) {
  const int64_t elements = plan.count * plan.statistics();
  const Do what = args.known ? Do::apply : args.what;
  if (plan.family == Family::rows) {
    drive_rows<RowsForward<T>>(plan, args);
  } else if (!kMask && what == Do::all && !args.floor && are_short(plan)) {
    drive_short<T>(plan, [&](auto& work, auto... which) { work.standardize(args, which...); });
  } else if (plan.family == Family::runs) {
    RunsForward<T, kMask> work{plan, args};
    drive_runs(work, plan, what);
  } else if (plan.across) {
    ColumnsForward<T, true, kMask> work(plan, args);
    drive(work, work.tasks(), plan.reduced.size(), elements, what);
  } else {
    ColumnsForward<T, false, kMask> work(plan, args);
    drive(work, work.tasks(), plan.reduced.size(), elements, what);
  }
}

template <class T, bool kMask, bool kLimited>
void backward(const Plan& plan, const Backward<T>& args) {
  const int64_t elements = plan.count * plan.statistics();
  if (plan.family == Family::rows) {
    drive_rows<RowsBackward<T>>(plan, args);
  } else if (!kMask && !kLimited && args.what == Do::all && are_short(plan)) {
    drive_short<T>(plan, [&](auto& work, auto... which) { work.differentiate(args, which...); });
  } else if (plan.family == Family::runs) {
    RunsBackward<T, kMask, kLimited> work{plan, args};
    drive_runs(work, plan, args.what);
  } else if (plan.across) {
    ColumnsBackward<T, true, kMask, kLimited> work(plan, args);
    drive(work, work.tasks(), plan.reduced.size(), elements, args.what);
  } else {
    ColumnsBackward<T, false, kMask, false> work(plan, args);
    drive(work, work.tasks(), plan.reduced.size(), elements, args.what);
  }
}

template <class T>
void forward(const Plan& plan, const Forward<T>& args) {
  args.mask ? forward<T, true>(plan, args) : forward<T, false>(plan, args);
}

template <class T>
void backward(const Plan& plan, const Backward<T>& args) {
  if (args.floor)
    args.mask ? backward<T, true, true>(plan, args) : backward<T, false, true>(plan, args);
  else
    args.mask ? backward<T, true, false>(plan, args) : backward<T, false, false>(plan, args);
}

// Each type is compiled in a file of its own, which takes several cores less time.
#define NORMZOO_FAMILIES(EXTERN, T)                                   \
  EXTERN template void forward<T>(const Plan&, const Forward<T>&);   \
  EXTERN template void backward<T>(const Plan&, const Backward<T>&);

NORMZOO_FAMILIES(extern, float)
NORMZOO_FAMILIES(extern, c10::BFloat16)
NORMZOO_FAMILIES(extern, c10::Half)

}  // namespace normzoo
