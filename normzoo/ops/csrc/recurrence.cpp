// A whole recurrence as one operation: LSTM, GRU and tanh cells with a norm at each of three points, and its gradient.
//
// At step t, with u and v the products with the input x_t and with the state h_{t-1}, and a norm at each point:
//   u' = norm(u) + bias_input,  v' = norm(v) + bias_hidden
//   LSTM  i, f, o = sigmoid(u' + v');  g = tanh(u'_g + v'_g);  c_t = f c + i g;  h_t = o tanh(norm(c_t) + bias_cell)
//   GRU   r, z = sigmoid(u' + v');  n = tanh(u'_n + r v'_n);  h_t = (1 - z) n + z h
//   tanh  h_t = tanh(u' + v')
// The products run in tiles of registers against weights packed once a call. Everything else of a step is done on a
// few rows while they are in the cache, or on all of them where a norm looks along the batch.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <mutex>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "simd.h"

namespace normzoo {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

// Floats that begin with a line of the cache, so that no vector lies across two.
template <class T>
struct Lines {
  using value_type = T;
  static constexpr std::align_val_t line{64};
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), line)); }
  void deallocate(T* p, size_t) { ::operator delete(p, line); }
  bool operator==(const Lines&) const = default;
};
using Floats = std::vector<float, Lines<float>>;

// ---- sigmoid and tanh ------------------------------------------------------------------------------------------------

// exp(x) for |x| < 88, to one unit in the last place; the polynomial is minimax on half a ln 2 to either side of zero.
NORMZOO_INLINE vf exp_(vf x) {
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number, found in the lowest bits
  const vf shifted = x * 1.44269504f + magic;
  const vf k = shifted - magic;
  const vf r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  const vf tail = ((((r * 1.3814467e-3f + 8.3687808e-3f) * r + 4.1668393e-2f) * r + 1.6666520e-1f) * r + 4.9999994e-1f);
  const vi power = ((vi)shifted << 23) + (127 << 23);
  return (r * r * tail + r + 1.f) * (vf)power;
}

NORMZOO_INLINE vf clamp(vf x, float limit) {  // NaN stays NaN
#ifdef __AVX512F__
  return (vf)_mm512_max_ps((__m512)splat(-limit), _mm512_min_ps((__m512)splat(limit), (__m512)x));
#else
  x = x > limit ? splat(limit) : x;
  return x < -limit ? splat(-limit) : x;
#endif
}

NORMZOO_INLINE vf sigmoid(vf x) { return 1.f / (1.f + exp_(clamp(-x, 87.f))); }

NORMZOO_INLINE vf tanh_(vf x) {
  const vi sign = (vi)x & (int32_t)0x80000000;
  const vf a = (vf)((vi)x ^ sign);
  const vf z = a * a;
  const vf half = ((z * 2.14296160e-3f - 8.17739777e-3f) * z + 2.17007026e-2f) * z - 5.39467633e-2f;
  const vf p = (half * z + 1.33332059e-1f) * z - 3.33333313e-1f;
  const vf small = a + a * z * p;  // the polynomial is minimax up to .625
  const vf large = 1.f - 2.f / (exp_(clamp(2.f * a, 87.f)) + 1.f);
  return (vf)((vi)(a < .625f ? small : large) ^ sign);
}

// ---- products --------------------------------------------------------------------------------------------------------

// One register; compilers do not keep sums in vectors that are wider than that.
#if defined(__AVX512F__)
typedef vf Register;
#elif defined(__AVX__)
typedef float Register __attribute__((vector_size(32)));
#else
typedef float Register __attribute__((vector_size(16)));
#endif
constexpr int64_t kFloats = sizeof(Register) / sizeof(float);

// A tile of sums that stays in registers: 32 of them, or 16.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kRows = 8, kColumns = 2;
#else
constexpr int kRows = 6, kColumns = 2;
#endif
constexpr int64_t kPanel = kColumns * kFloats;
constexpr int64_t kDepth = 512;  // rows of a panel that stay in the nearest cache

int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

// Rows that are a power of two apart would share a few sets of the cache.
int64_t spaced(int64_t n) { return padded(n) + kLanes; }

struct Left {  // element (i, k) is at[i * row + k * step]
  const float* at;
  int64_t row, step;
};

template <int M>
void tile(int64_t depth, Left a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t columns, bool add) {
  Register sums[M][kColumns] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Register right[kColumns];
    for (int j = 0; j < kColumns; ++j) right[j] = read<Register>(b + k * ldb + j * kFloats, Full{});
    for (int i = 0; i < M; ++i) {
      const float left = a.at[i * a.row + k * a.step];
      for (int j = 0; j < kColumns; ++j) sums[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < kColumns; ++j) {
      float* p = c + i * ldc + j * kFloats;
      const auto put = [&](auto part) { write(p, add ? read<Register>(p, part) + sums[i][j] : sums[i][j], part); };
      if (columns >= (j + 1) * kFloats)
        put(Full{});
      else if (columns > j * kFloats)
        put(Tail{columns - j * kFloats});
    }
}

// c (+)= a b with b in panels of kPanel columns, `panel` apart, each with rows `ldb` apart.
void product(int64_t rows, int64_t columns, int64_t depth, Left a, const float* b, int64_t panel, int64_t ldb, float* c,
             int64_t ldc, bool add) {
  const int64_t panels = padded(columns) / kPanel;
  const int64_t grain = std::max<int64_t>(1, (1 << 21) / std::max<int64_t>(1, rows * depth * kPanel));
  at::parallel_for(0, panels, grain, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t width = std::min(kPanel, columns - p * kPanel);
      const float* right = b + p * panel;
      float* out = c + p * kPanel;
      for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t some = std::min(kDepth, depth - k);
        int64_t i = 0;
        const auto run = [&]<int M>() {
          for (; i + M <= rows; i += M)
            tile<M>(some, {a.at + i * a.row + k * a.step, a.row, a.step}, right + k * ldb, ldb, out + i * ldc, ldc,
                    width, add || k);
        };
        run.template operator()<kRows>();
        run.template operator()<kRows / 2>();
        run.template operator()<1>();
      }
    }
  });
}

// The right side of a product, in panels that are read from front to back.
struct Packed {
  int64_t depth = 0, columns = 0;
  Floats data;

  // Element (k, j) of the right side is w[k * step + j * column].
  void pack(const float* w, int64_t depth_, int64_t columns_, int64_t step, int64_t column) {
    depth = depth_, columns = columns_;
    data.assign(padded(columns) * depth, 0.f);
    for (int64_t j = 0; j < columns; ++j) {
      float* to = data.data() + j / kPanel * kPanel * depth + j % kPanel;
      for (int64_t k = 0; k < depth; ++k) to[k * kPanel] = w[k * step + j * column];
    }
  }

  void times(int64_t rows, const float* a, int64_t lda, float* c, int64_t ldc, bool add = false) const {
    product(rows, columns, depth, {a, lda, 1}, data.data(), kPanel * depth, kPanel, c, ldc, add);
  }
};

// ---- the problem -----------------------------------------------------------------------------------------------------

enum Cell { lstm, gru, rnn };
enum Kind { none, layer, rms, batch, running };  // running: by given statistics at every step
enum At { input, hidden, cell_state };

struct Point {
  Kind kind;
  int64_t channels;
  double eps;
  const float* gain;  // or null
  const float* bias;  // or null
  float* stats;       // (T, 2, N or channels): mean and inverse standard deviation
  bool tracked;       // a step that one sequence alone reaches has given statistics too
  const float* moving;  // (S, 2, channels): running mean and variance, updated on the way
  int64_t moving_steps;
  double momentum;

  bool rowwise() const { return kind == layer || kind == rms; }
  bool columnwise() const { return kind == batch || kind == running; }
};

struct Problem {
  Cell cell;
  int64_t batch, steps, features, width, gates;  // N, T, F, H and the number of gates
  std::array<Point, 3> points;
  const float* x;
  bool project;        // x is not yet multiplied with the input's weights
  const bool* mask;    // (N, T) or null
  std::vector<int64_t> real;  // sequences at each step
  float *out, *u, *v, *acts, *c;  // (N, T, H), and (T, N, .) of what is kept, or null

  int64_t rows() const { return gates * width; }
  int64_t act_width() const { return cell == rnn ? 0 : 4 * width; }
  bool is_real(int64_t n, int64_t t) const { return !mask || mask[n * steps + t]; }
  bool frozen(const Point& point, int64_t t) const {
    return point.kind == running || (point.tracked && real[t] < std::min<int64_t>(2, batch));
  }
  bool together() const {
    return std::any_of(points.begin(), points.end(), [](const Point& p) { return p.columnwise(); });
  }
};

const float* data(const Maybe& tensor) { return tensor ? tensor->const_data_ptr<float>() : nullptr; }
float* room(const Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr<float>() : nullptr; }

Maybe dense(const Maybe& tensor) { return tensor ? Maybe(tensor->contiguous()) : Maybe(); }

using Three = std::array<Maybe, 3>;

Problem describe(const Tensor& x, const Maybe& weight_ih, const Tensor& weight_hh, const Three& gain, const Three& bias,
                 const Maybe& mask, int64_t cell, at::IntArrayRef kinds, at::ArrayRef<double> eps) {
  constexpr int64_t gates[] = {4, 3, 1};
  TORCH_CHECK(0 <= cell && cell <= rnn && kinds.size() == 3 && eps.size() == 3, "normzoo::recurrence: no such cell");
  TORCH_CHECK(x.dim() == 3 && weight_hh.dim() == 2, "normzoo::recurrence: x is (N, T, F), the weights are matrices");
  Problem p{};
  p.cell = (Cell)cell;
  p.batch = x.size(0), p.steps = x.size(1), p.features = x.size(2);
  p.width = weight_hh.size(1);
  p.gates = gates[cell];
  p.project = weight_ih.has_value();
  const auto fits = [&](const Maybe& tensor, at::IntArrayRef shape, const char* name) {
    TORCH_CHECK(!tensor || tensor->sizes() == shape, "normzoo::recurrence: ", name, " has shape ", tensor->sizes(),
                ", expected ", shape);
  };
  fits(weight_hh, {p.rows(), p.width}, "weight_hh");
  if (p.project)
    fits(weight_ih, {p.rows(), p.features}, "weight_ih");
  else
    fits(x, {p.batch, p.steps, p.rows()}, "x without weight_ih");
  fits(mask, {p.batch, p.steps}, "mask");
  p.x = x.const_data_ptr<float>();
  p.mask = mask ? mask->const_data_ptr<bool>() : nullptr;
  p.real.assign(p.steps, p.batch);
  for (int64_t t = 0; p.mask && t < p.steps; ++t) {
    p.real[t] = 0;
    for (int64_t n = 0; n < p.batch; ++n) p.real[t] += p.is_real(n, t);
  }
  for (int i = 0; i < 3; ++i) {
    Point& point = p.points[i];
    point.kind = (Kind)kinds[i];
    point.channels = i == cell_state ? p.width : p.rows();
    point.eps = eps[i];
    fits(gain[i], {point.channels}, "a gain");
    fits(bias[i], {point.channels}, "a bias");
    point.gain = data(gain[i]), point.bias = data(bias[i]);
  }
  return p;
}

// What of a norm is ready to use at one step: y = ((x - row_mean - mean) row_scale) scale + bias.
struct Frame {
  Floats row_mean, row_scale;     // of each row
  Floats mean, spread, scale, bias;  // of each channel; spread is the inverse deviation, scale has the gain

  Frame(const Point& point, int64_t rows)
      : row_mean(rows, 0.f), row_scale(rows, 1.f), mean(point.channels, 0.f), spread(point.channels, 1.f),
        scale(point.channels, 1.f), bias(point.channels, 0.f) {
    if (point.gain) scale.assign(point.gain, point.gain + point.channels);
    if (point.bias) bias.assign(point.bias, point.bias + point.channels);
  }

  void use(const Point& point, const float* m, const float* s) {
    std::copy(m, m + point.channels, mean.begin());
    std::copy(s, s + point.channels, spread.begin());
    for (int64_t j = 0; j < point.channels; ++j) scale[j] = point.gain ? s[j] * point.gain[j] : s[j];
  }

  template <class Part>
  NORMZOO_INLINE vf apply(int64_t r, int64_t j, vf x, Part part) const {
    return (x - row_mean[r] - load(&mean[j], part)) * row_scale[r] * load(&scale[j], part) + load(&bias[j], part);
  }
};

template <class F>
NORMZOO_INLINE void each(int64_t n, F&& f) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) f(j, Full{});
  if (j < n) f(j, Tail{n - j});
}

// ---- one step, on the rows of one thread -----------------------------------------------------------------------------

// Everything that forward and backward share. Rows are counted from the thread's first.
struct Steps {
  const Problem& p;
  const int64_t first, rows;
  std::array<Frame, 3> frames;

  Steps(const Problem& p, int64_t first, int64_t last)
      : p(p), first(first), rows(last - first),
        frames{Frame(p.points[0], rows), Frame(p.points[1], rows), Frame(p.points[2], rows)} {}

  bool is_real(int64_t r, int64_t t) const { return p.is_real(first + r, t); }
  const float* x(int64_t r, int64_t t) const { return p.x + ((first + r) * p.steps + t) * p.features; }
  float* out(int64_t r, int64_t t) const { return p.out + ((first + r) * p.steps + t) * p.width; }
  float* kept(float* all, int64_t t, int64_t channels) const { return all + (t * p.batch + first) * channels; }

  // Call f(begin, end) for the rows, a few at a time; for all at once where a norm looks along the batch.
  template <class F>
  NORMZOO_INLINE void blocks(F&& f) const {
    const int64_t size = p.together() ? rows : 4;
    for (int64_t r = 0; r < rows; r += size) f(r, std::min(rows, r + size));
  }

  // r, z, n and v'_n; or i, f, g and o.
  [[gnu::flatten]] void activate(const float* u, const float* v, float* acts, int64_t begin, int64_t end) const {
    const int64_t H = p.width, G = p.rows();
    const Frame &fu = frames[input], &fv = frames[hidden];
    for (int64_t r = begin; r < end; ++r) {
      const float *ur = u + r * G, *vr = v + r * G;
      float* act = acts + r * p.act_width();
      each(H, [&](int64_t j, auto part) {
        const auto at = [&](const Frame& frame, const float* row, int64_t gate) {
          const float* place = row + gate * H + j;
          __builtin_prefetch(place + 2 * G);  // the gates are too many streams for the processor to see them coming
          return frame.apply(r, gate * H + j, load(place, part), part);
        };
        const auto left = [&](int64_t gate) { return at(fu, ur, gate); };
        const auto right = [&](int64_t gate) { return at(fv, vr, gate); };
        if (p.cell == lstm) {
          store(act + j, sigmoid(left(0) + right(0)), part);
          store(act + H + j, sigmoid(left(1) + right(1)), part);
          store(act + 2 * H + j, tanh_(left(2) + right(2)), part);
          store(act + 3 * H + j, sigmoid(left(3) + right(3)), part);
        } else {
          const vf reset = sigmoid(left(0) + right(0)), candidate = right(2);
          store(act + j, reset, part);
          store(act + H + j, sigmoid(left(1) + right(1)), part);
          store(act + 2 * H + j, tanh_(left(2) + reset * candidate), part);
          store(act + 3 * H + j, candidate, part);
        }
      });
    }
  }
};

// ---- forward ---------------------------------------------------------------------------------------------------------

struct Forward : Steps {
  Floats h, xs, ubuf, vbuf, abuf, cbuf;
  std::array<float*, 3> moving;  // what the running statistics become
  Floats sums;

  Forward(const Problem& p, int64_t first, int64_t last, std::array<float*, 3> moving)
      : Steps(p, first, last), h(rows * p.width, 0.f), xs(p.project ? rows * spaced(p.features) : 0),
        ubuf(rows * p.rows()), vbuf(rows * p.rows()), abuf(rows * p.act_width()), cbuf(2 * rows * p.width, 0.f),
        moving(moving) {}

  // Statistics of rows [begin, end), which are all of them along the batch.
  [[gnu::flatten]] void measure(At at, int64_t t, const float* x, int64_t begin, int64_t end) {
    const Point& point = p.points[at];
    Frame& frame = frames[at];
    const int64_t C = point.channels;
    if (point.rowwise()) {
      float* stats = point.stats ? point.stats + t * 2 * p.batch + first : nullptr;
      for (int64_t r = begin; r < end; ++r) {
        const float* row = x + r * C;
        vf total[4] = {};
        if (point.kind == layer) vectors(C, [&](int64_t j, int64_t k, auto part) { total[k] += load(row + j, part); });
        const float mean = sum((total[0] + total[1]) + (total[2] + total[3])) / C;
        vf square[4] = {};
        vectors(C, [&](int64_t j, int64_t k, auto part) {
          const vf d = only(load(row + j, part) - mean, part);
          square[k] += d * d;
        });
        const float var = sum((square[0] + square[1]) + (square[2] + square[3])) / C;
        frame.row_mean[r] = mean;
        frame.row_scale[r] = 1.f / std::sqrt(var + (float)point.eps);
        if (stats) stats[r] = mean, stats[p.batch + r] = frame.row_scale[r];
      }
    } else if (point.columnwise()) {
      along_the_batch(at, t, x);
    }
  }

  [[gnu::flatten]] void along_the_batch(At at, int64_t t, const float* x) {
    const Point& point = p.points[at];
    const int64_t C = point.channels;
    sums.assign(2 * C, 0.f);
    float *mean = sums.data(), *var = mean + C;
    float* run = moving[at] ? moving[at] + std::min(t, point.moving_steps - 1) * 2 * C : nullptr;
    if (p.frozen(point, t)) {
      std::copy(run, run + 2 * C, mean);
    } else {
      const float n = std::max<int64_t>(1, p.real[t]);
      columns(t, x, C, [&](int64_t j, vf v, auto part) { store(mean + j, load(mean + j, part) + v, part); });
      for (int64_t j = 0; j < C; ++j) mean[j] /= n;
      columns(t, x, C, [&](int64_t j, vf v, auto part) {
        const vf d = v - load(mean + j, part);
        store(var + j, load(var + j, part) + d * d, part);
      });
      for (int64_t j = 0; j < C; ++j) var[j] /= n;
      if (run && p.real[t] > 0) {
        const float unbiased = (double)p.real[t] / std::max<int64_t>(1, p.real[t] - 1), w = point.momentum;
        for (int64_t j = 0; j < C; ++j) {
          run[j] += w * (mean[j] - run[j]);
          run[C + j] += w * (var[j] * unbiased - run[C + j]);
        }
      }
    }
    const float eps = point.eps;
    for (int64_t j = 0; j < C; ++j) var[j] = 1.f / std::sqrt(var[j] + eps);
    frames[at].use(point, mean, var);
    if (point.stats) std::copy(mean, mean + 2 * C, point.stats + t * 2 * C);
  }

  template <class F>
  NORMZOO_INLINE void columns(int64_t t, const float* x, int64_t C, F&& f) const {
    for (int64_t r = 0; r < rows; ++r)
      if (is_real(r, t)) each(C, [&](int64_t j, auto part) { f(j, load(x + r * C + j, part), part); });
  }

  void run(const Packed& w_ih, const Packed& w_hh) {
    const int64_t H = p.width, G = p.rows(), F = p.features, A = p.act_width();
    float* c = cbuf.data();
    for (int64_t t = 0; t < p.steps; ++t) {
      float* u = p.u ? kept(p.u, t, G) : ubuf.data();
      float* v = p.v ? kept(p.v, t, G) : vbuf.data();
      float* acts = p.acts ? kept(p.acts, t, A) : abuf.data();
      float* next = p.c ? kept(p.c, t, H) : cbuf.data() + (t + 1) % 2 * rows * H;
      for (int64_t r = 0; r < rows; ++r)
        std::copy_n(x(r, t), F, p.project ? &xs[r * spaced(F)] : u + r * G);
      if (p.project) w_ih.times(rows, xs.data(), spaced(F), u, G);
      w_hh.times(rows, h.data(), H, v, G);
      blocks([&](int64_t begin, int64_t end) {
        measure(input, t, u, begin, end);
        measure(hidden, t, v, begin, end);
        if (p.cell == rnn) {
          plain(t, u, v, begin, end);
          return;
        }
        activate(u, v, acts, begin, end);
        if (p.cell == gru) {
          gated(t, acts, begin, end);
          return;
        }
        remember(t, acts, c, next, begin, end);
        measure(cell_state, t, next, begin, end);
        show(t, acts, next, begin, end);
      });
      c = next;
    }
  }

  NORMZOO_INLINE void hold(int64_t r, int64_t t) { std::copy_n(&h[r * p.width], p.width, out(r, t)); }

  [[gnu::flatten]] void plain(int64_t t, const float* u, const float* v, int64_t begin, int64_t end) {
    const int64_t H = p.width;
    for (int64_t r = begin; r < end; ++r) {
      if (is_real(r, t))
        each(H, [&](int64_t j, auto part) {
          const vf left = frames[input].apply(r, j, load(u + r * H + j, part), part);
          store(&h[r * H + j], tanh_(left + frames[hidden].apply(r, j, load(v + r * H + j, part), part)), part);
        });
      hold(r, t);
    }
  }

  [[gnu::flatten]] void gated(int64_t t, const float* acts, int64_t begin, int64_t end) {
    const int64_t H = p.width;
    for (int64_t r = begin; r < end; ++r) {
      const float* act = acts + r * 4 * H;
      if (is_real(r, t))
        each(H, [&](int64_t j, auto part) {
          const vf z = load(act + H + j, part), n = load(act + 2 * H + j, part);
          store(&h[r * H + j], (1.f - z) * n + z * load(&h[r * H + j], part), part);
        });
      hold(r, t);
    }
  }

  [[gnu::flatten]]
  void remember(int64_t t, const float* acts, const float* c, float* next, int64_t begin, int64_t end) {
    const int64_t H = p.width;
    for (int64_t r = begin; r < end; ++r) {
      const float* act = acts + r * 4 * H;
      if (!is_real(r, t)) {
        std::copy_n(c + r * H, H, next + r * H);
        continue;
      }
      each(H, [&](int64_t j, auto part) {
        const vf i = load(act + j, part), f = load(act + H + j, part), g = load(act + 2 * H + j, part);
        store(next + r * H + j, f * load(c + r * H + j, part) + i * g, part);
      });
    }
  }

  [[gnu::flatten]] void show(int64_t t, const float* acts, const float* c, int64_t begin, int64_t end) {
    const int64_t H = p.width;
    for (int64_t r = begin; r < end; ++r) {
      if (is_real(r, t))
        each(H, [&](int64_t j, auto part) {
          const vf m = frames[cell_state].apply(r, j, load(c + r * H + j, part), part);
          store(&h[r * H + j], load(acts + r * 4 * H + 3 * H + j, part) * tanh_(m), part);
        });
      hold(r, t);
    }
  }
};

// ---- backward --------------------------------------------------------------------------------------------------------

struct Gradients {
  Floats w_ih, w_hh;
  std::array<Floats, 3> gain, bias;

  explicit Gradients(const Problem& p) : w_ih(p.project ? p.rows() * p.features : 0), w_hh(p.rows() * p.width) {
    for (int i = 0; i < 3; ++i) gain[i].resize(p.points[i].channels), bias[i].resize(p.points[i].channels);
  }
};

struct Backward : Steps {
  const float* dout;
  float* dx;  // or null
  Gradients sums;
  const int64_t capacity;  // rows of several steps are gathered for one product with the weights' gradients
  int64_t used = 0;
  Floats xs, hs, du, dv;         // the gathered rows
  Floats dh, dc, dm, abuf, zeros;  // of one step
  Floats centre, slope;

  Backward(const Problem& p, int64_t first, int64_t last, const float* dout, float* dx)
      : Steps(p, first, last), dout(dout), dx(dx), sums(p),
        capacity(std::max<int64_t>(1, std::max<int64_t>(64, p.width / 2) / rows) * rows),
        xs(p.project ? capacity * spaced(p.features) : 0), hs(capacity * spaced(p.width)),
        du(capacity * spaced(p.rows())), dv(capacity * spaced(p.rows())), dh(rows * p.width, 0.f),
        dc(rows * p.width, 0.f), dm(rows * p.width), abuf(rows * p.act_width()), zeros(rows * p.width, 0.f) {}

  void recall(At at, int64_t t) {
    const Point& point = p.points[at];
    if (point.rowwise()) {
      const float* stats = point.stats + t * 2 * p.batch + first;
      std::copy_n(stats, rows, frames[at].row_mean.begin());
      std::copy_n(stats + p.batch, rows, frames[at].row_scale.begin());
    } else if (point.columnwise()) {
      const float* stats = point.stats + t * 2 * point.channels;
      frames[at].use(point, stats, stats + point.channels);
    }
  }

  // From the gradient of the norm's output to that of its input x, in place.
  [[gnu::flatten]]
  void through(At at, int64_t t, const float* x, float* dy, int64_t stride, int64_t begin, int64_t end) {
    const Point& point = p.points[at];
    const Frame& frame = frames[at];
    const int64_t C = point.channels;
    float *dgain = sums.gain[at].data(), *dbias = sums.bias[at].data();
    if (point.kind == none) {
      for (int64_t r = begin; r < end; ++r)
        each(C, [&](int64_t j, auto part) {
          store(dbias + j, load(dbias + j, part) + load(dy + r * stride + j, part), part);
        });
    } else if (point.rowwise()) {
      const float* gain = frame.scale.data();
      for (int64_t r = begin; r < end; ++r) {
        if (!is_real(r, t)) continue;
        const float *row = x + r * C, mean = frame.row_mean[r], spread = frame.row_scale[r];
        float* grad = dy + r * stride;
        vf s1[4] = {}, s2[4] = {};
        vectors(C, [&](int64_t j, int64_t k, auto part) {
          const vf g = load(grad + j, part), standard = (load(row + j, part) - mean) * spread;
          const vf scaled = g * load(gain + j, part);
          store(dbias + j, load(dbias + j, part) + g, part);
          store(dgain + j, load(dgain + j, part) + g * standard, part);
          s1[k] += scaled;
          s2[k] += scaled * standard;
        });
        const float centre = point.kind == layer ? sum((s1[0] + s1[1]) + (s1[2] + s1[3])) / C : 0.f;
        const float slope = sum((s2[0] + s2[1]) + (s2[2] + s2[3])) / C;
        vectors(C, [&](int64_t j, int64_t, auto part) {
          const vf standard = (load(row + j, part) - mean) * spread;
          store(grad + j, spread * (load(grad + j, part) * load(gain + j, part) - centre - slope * standard), part);
        });
      }
    } else {
      const float *mean = frame.mean.data(), *spread = frame.spread.data(), *scale = frame.scale.data();
      centre.assign(C, 0.f), slope.assign(C, 0.f);
      float *sum_dy = centre.data(), *sum_dyx = slope.data();
      for (int64_t r = begin; r < end; ++r)
        if (is_real(r, t))
          vectors(C, [&](int64_t j, int64_t, auto part) {
            const vf g = load(dy + r * stride + j, part);
            const vf standard = (load(x + r * C + j, part) - load(mean + j, part)) * load(spread + j, part);
            store(sum_dy + j, load(sum_dy + j, part) + g, part);
            store(sum_dyx + j, load(sum_dyx + j, part) + g * standard, part);
          });
      const float share = p.frozen(point, t) ? 0.f : 1.f / std::max<int64_t>(1, p.real[t]);
      for (int64_t j = 0; j < C; ++j) {
        dbias[j] += sum_dy[j], dgain[j] += sum_dyx[j];
        sum_dy[j] *= share, sum_dyx[j] *= share;
      }
      for (int64_t r = begin; r < end; ++r)
        if (is_real(r, t))
          vectors(C, [&](int64_t j, int64_t, auto part) {
            float* grad = dy + r * stride + j;
            const vf standard = (load(x + r * C + j, part) - load(mean + j, part)) * load(spread + j, part);
            const vf rest = load(grad, part) - load(sum_dy + j, part) - standard * load(sum_dyx + j, part);
            store(grad, rest * load(scale + j, part), part);
          });
    }
  }

  void flush() {
    const int64_t H = p.width, G = p.rows(), F = p.features, ld = spaced(G);
    product(G, H, used, {dv.data(), 1, ld}, hs.data(), kPanel, spaced(H), sums.w_hh.data(), H, true);
    if (p.project) product(G, F, used, {du.data(), 1, ld}, xs.data(), kPanel, spaced(F), sums.w_ih.data(), F, true);
    used = 0;
  }

  void run(const Packed& w_ih, const Packed& w_hh) {
    const int64_t H = p.width, G = p.rows(), F = p.features, A = p.act_width(), ld = spaced(G);
    for (int64_t t = p.steps - 1; t >= 0; --t) {
      float *du_t = &du[used * ld], *dv_t = &dv[used * ld], *h = &hs[used * spaced(H)];
      for (int64_t r = 0; r < rows; ++r) {
        if (t) std::copy_n(out(r, t - 1), H, h + r * spaced(H));
        else std::fill_n(h + r * spaced(H), H, 0.f);
        if (p.project) std::copy_n(x(r, t), F, &xs[(used + r) * spaced(F)]);
      }
      const float* u = p.u ? kept(p.u, t, G) : nullptr;
      const float* v = p.v ? kept(p.v, t, G) : nullptr;
      const float* c = p.c ? kept(p.c, t, H) : nullptr;
      const float* before = p.c && t ? kept(p.c, t - 1, H) : zeros.data();
      float* acts = p.acts ? kept(p.acts, t, A) : abuf.data();
      for (At at : {input, hidden, cell_state}) recall(at, t);
      blocks([&](int64_t begin, int64_t end) {
        if (!p.acts && A) activate(u, v, acts, begin, end);
        for (int64_t r = begin; r < end; ++r) {
          each(H, [&](int64_t j, auto part) {
            const float* more = dout + ((first + r) * p.steps + t) * H + j;
            __builtin_prefetch(more + 2 * p.steps * H);
            store(&dh[r * H + j], load(&dh[r * H + j], part) + load(more, part), part);
          });
          if (!is_real(r, t)) {  // the state was held: so is its gradient
            std::fill_n(du_t + r * ld, G, 0.f);
            std::fill_n(dv_t + r * ld, G, 0.f);
            if (p.cell == lstm) std::fill_n(&dm[r * H], H, 0.f);
          } else if (p.cell == rnn) {
            plain(r, out(r, t), du_t + r * ld, dv_t + r * ld);
          } else if (p.cell == gru) {
            gated(r, acts + r * A, h + r * spaced(H), du_t + r * ld, dv_t + r * ld);
          } else {
            shown(r, acts + r * A, c + r * H, dv_t + r * ld);
          }
        }
        if (p.cell == lstm) {
          through(cell_state, t, c, dm.data(), H, begin, end);
          for (int64_t r = begin; r < end; ++r)
            if (is_real(r, t)) remembered(r, acts + r * A, before + r * H, du_t + r * ld, dv_t + r * ld);
        }
        through(input, t, u, du_t, ld, begin, end);
        through(hidden, t, v, dv_t, ld, begin, end);
      });
      w_hh.times(rows, dv_t, ld, dh.data(), H, true);
      if (dx && p.project) w_ih.times(rows, du_t, ld, dx + (first * p.steps + t) * F, p.steps * F);
      if (dx && !p.project)
        for (int64_t r = 0; r < rows; ++r) std::copy_n(du_t + r * ld, F, dx + ((first + r) * p.steps + t) * F);
      used += rows;
      if (used == capacity) flush();
    }
    flush();
  }

  // Each leaves in dh what reaches the state before on another way than through the hidden product.

  [[gnu::flatten]] void plain(int64_t r, const float* h, float* du, float* dv) {
    each(p.width, [&](int64_t j, auto part) {
      float* grad = &dh[r * p.width + j];
      const vf y = load(h + j, part), g = load(grad, part) * (1.f - y * y);
      store(du + j, g, part);
      store(dv + j, g, part);
      store(grad, vf{}, part);
    });
  }

  [[gnu::flatten]] void gated(int64_t r, const float* act, const float* h, float* du, float* dv) {
    const int64_t H = p.width;
    each(H, [&](int64_t j, auto part) {
      float* grad = &dh[r * H + j];
      const vf reset = load(act + j, part), z = load(act + H + j, part), n = load(act + 2 * H + j, part);
      const vf g = load(grad, part);
      const vf dn = g * (1.f - z) * (1.f - n * n);
      const vf dr = dn * load(act + 3 * H + j, part) * reset * (1.f - reset);
      const vf dz = g * (load(h + j, part) - n) * z * (1.f - z);
      store(du + j, dr, part), store(dv + j, dr, part);
      store(du + H + j, dz, part), store(dv + H + j, dz, part);
      store(du + 2 * H + j, dn, part), store(dv + 2 * H + j, dn * reset, part);
      store(grad, g * z, part);
    });
  }

  // The output gate, and the gradient of the cell's norm into dm.
  [[gnu::flatten]] void shown(int64_t r, const float* act, const float* c, float* dv) {
    const int64_t H = p.width;
    each(H, [&](int64_t j, auto part) {
      float* grad = &dh[r * H + j];
      __builtin_prefetch(c + j + 2 * H);
      const vf o = load(act + 3 * H + j, part), g = load(grad, part);
      const vf y = tanh_(frames[cell_state].apply(r, j, load(c + j, part), part));
      store(&dm[r * H + j], g * o * (1.f - y * y), part);
      store(dv + 3 * H + j, g * y * o * (1.f - o), part);
      store(grad, vf{}, part);
    });
  }

  [[gnu::flatten]] void remembered(int64_t r, const float* act, const float* before, float* du, float* dv) {
    const int64_t H = p.width;
    each(H, [&](int64_t j, auto part) {
      const vf i = load(act + j, part), f = load(act + H + j, part), g = load(act + 2 * H + j, part);
      __builtin_prefetch(before + j + 2 * H);
      const vf d = load(&dc[r * H + j], part) + load(&dm[r * H + j], part);
      const vf di = d * g * i * (1.f - i), df = d * load(before + j, part) * f * (1.f - f), dg = d * i * (1.f - g * g);
      store(du + j, di, part), store(dv + j, di, part);
      store(du + H + j, df, part), store(dv + H + j, df, part);
      store(du + 2 * H + j, dg, part), store(dv + 2 * H + j, dg, part);
      store(du + 3 * H + j, load(dv + 3 * H + j, part), part);
      store(&dc[r * H + j], d * f, part);
    });
  }
};

// ---- the operators ---------------------------------------------------------------------------------------------------

// Sequences do not see each other unless a norm looks along the batch: each thread takes some of them to the end.
template <class F>
void over_sequences(const Problem& p, F f) {
  if (p.together()) {
    f(0, p.batch);
    return;
  }
  const int64_t tiles = (p.batch + kRows - 1) / kRows;
  const int64_t work = p.steps * p.rows() * (p.width + p.features) * kRows;
  const int64_t grain = std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(1, work));
  at::parallel_for(0, tiles, grain, [&](int64_t from, int64_t to) {
    f(from * kRows, std::min(p.batch, to * kRows));
  });
}

using Ten = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Ten recurrence(const Tensor& x_, const Maybe& weight_ih_, const Tensor& weight_hh_, const Maybe& gain_input_,
               const Tensor& bias_input_, const Maybe& gain_hidden_, const Tensor& bias_hidden_,
               const Maybe& gain_cell_, const Maybe& bias_cell_, const Maybe& mask_, const Maybe& running_input,
               const Maybe& running_hidden, const Maybe& running_cell, int64_t cell, at::IntArrayRef kinds,
               at::ArrayRef<double> eps, at::ArrayRef<double> momentum, bool keep) {
  const Tensor x = x_.contiguous(), weight_hh = weight_hh_.contiguous();
  const Maybe weight_ih = dense(weight_ih_), mask = dense(mask_);
  const Three gain = {dense(gain_input_), dense(gain_hidden_), dense(gain_cell_)};
  const Three bias = {bias_input_.contiguous(), bias_hidden_.contiguous(), dense(bias_cell_)};
  const Three running_stats = {running_input, running_hidden, running_cell};
  Problem p = describe(x, weight_ih, weight_hh, gain, bias, mask, cell, kinds, eps);
  const int64_t N = p.batch, T = p.steps, H = p.width, G = p.rows();
  const auto make = [&](bool needed, at::IntArrayRef shape) {
    return needed ? at::empty(shape, x.options()) : at::empty({0}, x.options());
  };
  const bool raw_u = p.points[input].kind != none, raw_v = p.points[hidden].kind != none;
  const Tensor out = make(true, {N, T, H});
  const Tensor u = make(keep && raw_u, {T, N, G}), v = make(keep && raw_v, {T, N, G});
  const Tensor acts = make(keep && p.cell != rnn && !(raw_u && raw_v), {T, N, p.act_width()});
  const Tensor c = make(keep && p.cell == lstm, {T, N, H});
  p.out = room(out), p.u = room(u), p.v = room(v), p.acts = room(acts), p.c = room(c);
  std::array<Tensor, 3> stats, moved;
  std::array<float*, 3> moving;
  for (int i = 0; i < 3; ++i) {
    Point& point = p.points[i];
    point.tracked = running_stats[i].has_value();
    point.momentum = momentum[i];
    const bool fits = !point.tracked || (running_stats[i]->dim() == 3 && running_stats[i]->size(0) > 0 &&
                                         running_stats[i]->size(1) == 2 && running_stats[i]->size(2) == point.channels);
    TORCH_CHECK(fits && (point.kind != running || point.tracked),
                "normzoo::recurrence: running statistics are (S, 2, ", point.channels, "), and have to be given");
    stats[i] = make(keep && point.kind != none, {T, 2, point.rowwise() ? N : point.channels});
    moved[i] = point.tracked ? running_stats[i]->clone(at::MemoryFormat::Contiguous) : make(false, {});
    point.stats = room(stats[i]), moving[i] = room(moved[i]);
    point.moving_steps = point.tracked ? moved[i].size(0) : 0;
  }
  Packed w_ih, w_hh;
  if (weight_ih) w_ih.pack(data(weight_ih), p.features, G, 1, p.features);
  w_hh.pack(weight_hh.const_data_ptr<float>(), H, G, 1, H);
  over_sequences(p, [&](int64_t from, int64_t to) { Forward(p, from, to, moving).run(w_ih, w_hh); });
  return {out, u, v, acts, c, stats[0], stats[1], stats[2], moved[0], moved[1], moved[2]};
}

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Nine recurrence_backward(const Tensor& dout_, const Tensor& out, const Tensor& u, const Tensor& v, const Tensor& acts,
                         const Tensor& c, const Tensor& stats_input, const Tensor& stats_hidden,
                         const Tensor& stats_cell, const Tensor& x_, const Maybe& weight_ih_, const Tensor& weight_hh_,
                         const Maybe& gain_input_, const Tensor& bias_input_, const Maybe& gain_hidden_,
                         const Tensor& bias_hidden_, const Maybe& gain_cell_, const Maybe& bias_cell_,
                         const Maybe& mask_, int64_t cell, at::IntArrayRef kinds, at::ArrayRef<double> eps,
                         at::IntArrayRef tracked, bool needs_x) {
  const Tensor dout = dout_.contiguous(), x = x_.contiguous(), weight_hh = weight_hh_.contiguous();
  const Maybe weight_ih = dense(weight_ih_), mask = dense(mask_);
  const Three gain = {dense(gain_input_), dense(gain_hidden_), dense(gain_cell_)};
  const Three bias = {bias_input_.contiguous(), bias_hidden_.contiguous(), dense(bias_cell_)};
  const std::array<Tensor, 3> stats = {stats_input, stats_hidden, stats_cell};
  Problem p = describe(x, weight_ih, weight_hh, gain, bias, mask, cell, kinds, eps);
  p.out = room(out), p.u = room(u), p.v = room(v), p.acts = room(acts), p.c = room(c);
  for (int i = 0; i < 3; ++i) {
    p.points[i].stats = room(stats[i]);
    p.points[i].tracked = tracked[i];
  }
  const int64_t H = p.width, G = p.rows(), F = p.features;
  const auto zeros = [&](bool needed, at::IntArrayRef shape) {
    return needed ? at::zeros(shape, x.options()) : at::empty({0}, x.options());
  };
  const Tensor dx = needs_x ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  const Tensor dw_ih = zeros(p.project, {G, F}), dw_hh = zeros(true, {G, H});
  std::array<Tensor, 3> dgain, dbias;
  for (int i = 0; i < 3; ++i) {
    dgain[i] = zeros(gain[i].has_value(), {p.points[i].channels});
    dbias[i] = zeros(bias[i].has_value(), {p.points[i].channels});
  }
  Packed w_ih, w_hh;
  if (p.project && needs_x) w_ih.pack(data(weight_ih), G, F, F, 1);
  w_hh.pack(weight_hh.const_data_ptr<float>(), G, H, H, 1);
  std::mutex one_at_a_time;
  over_sequences(p, [&](int64_t from, int64_t to) {
    Backward part(p, from, to, dout.const_data_ptr<float>(), room(dx));
    part.run(w_ih, w_hh);
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const auto add = [](const Floats& share, const Tensor& to) {
      float* total = room(to);
      for (size_t i = 0; total && i < share.size(); ++i) total[i] += share[i];
    };
    add(part.sums.w_ih, dw_ih), add(part.sums.w_hh, dw_hh);
    for (int i = 0; i < 3; ++i) add(part.sums.gain[i], dgain[i]), add(part.sums.bias[i], dbias[i]);
  });
  return {dx, dw_ih, dw_hh, dgain[0], dbias[0], dgain[1], dbias[1], dgain[2], dbias[2]};
}

// Give each step's running mean and variance their new values, and count its batches: hundreds of small tensors, which
// one call of torch each would take as long as a tenth of a training step.
void recurrence_count(at::TensorList statistics, at::TensorList counters, const Tensor& moved, at::IntArrayRef times) {
  const int64_t C = moved.size(-1);
  TORCH_CHECK((int64_t)statistics.size() * C == moved.numel() && counters.size() == times.size(),
              "normzoo::recurrence_count: as many statistics as there are new ones, as many counters as times");
  const float* from = moved.const_data_ptr<float>();
  for (size_t i = 0; i < statistics.size(); ++i) {
    TORCH_CHECK(statistics[i].numel() == C && statistics[i].is_contiguous(), "normzoo::recurrence_count: not ", C);
    std::copy_n(from + i * C, C, statistics[i].mutable_data_ptr<float>());
    statistics[i].unsafeGetTensorImpl()->bump_version();
  }
  for (size_t i = 0; i < counters.size(); ++i) {
    *counters[i].mutable_data_ptr<int64_t>() += times[i];
    counters[i].unsafeGetTensorImpl()->bump_version();
  }
}

TORCH_LIBRARY_FRAGMENT(normzoo, m) {
  m.def("recurrence_count(Tensor(a!)[] statistics, Tensor(b!)[] counters, Tensor moved, int[] times) -> ()");
  m.def(
      "recurrence(Tensor x, Tensor? weight_ih, Tensor weight_hh, Tensor? gain_input, Tensor bias_input, "
      "Tensor? gain_hidden, Tensor bias_hidden, Tensor? gain_cell, Tensor? bias_cell, Tensor? mask, "
      "Tensor? running_input, Tensor? running_hidden, Tensor? running_cell, int cell, int[] kinds, float[] eps, "
      "float[] momentum, bool keep) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "recurrence_backward(Tensor dout, Tensor out, Tensor u, Tensor v, Tensor acts, Tensor c, Tensor stats_input, "
      "Tensor stats_hidden, Tensor stats_cell, Tensor x, Tensor? weight_ih, Tensor weight_hh, Tensor? gain_input, "
      "Tensor bias_input, Tensor? gain_hidden, Tensor bias_hidden, Tensor? gain_cell, Tensor? bias_cell, Tensor? mask, "
      "int cell, int[] kinds, float[] eps, int[] tracked, bool needs_x) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(normzoo, CPU, m) {
  m.impl("recurrence", &recurrence);
  m.impl("recurrence_backward", &recurrence_backward);
  m.impl("recurrence_count", &recurrence_count);
}

}  // namespace
}  // namespace normzoo
