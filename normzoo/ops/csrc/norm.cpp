// Standardisation over the axes of any pattern as operators of torch, with its gradient.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "families.h"
#include "operators.h"

namespace normzoo {
namespace {

// How a tensor lies in memory: its samples, channels and positions, and whether the channel comes last.
struct Layout {
  int64_t samples, channels, positions;
  bool channels_last, dense;
};

// Whether the strides are those of a contiguous tensor whose channel dimension was moved.
bool moved_contiguous(const Tensor& x, int64_t channel, bool last) {
  int64_t expected = 1;
  const auto check = [&](int64_t d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
    return true;
  };
  if (last && !check(channel)) return false;
  for (int64_t d = x.dim() - 1; d > 0; --d)
    if (d != channel && !check(d)) return false;
  if (!last && !check(channel)) return false;
  return check(0);
}

Layout layout_of(const Tensor& x, int64_t channel_dim) {
  const int64_t channel = channel_dim == -1 ? x.dim() - 1 : 1;
  Layout layout{x.size(0), x.size(channel), 1, channel_dim == -1, true};
  for (int64_t d = 1; d < x.dim(); ++d)
    if (d != channel) layout.positions *= x.size(d);
  if (x.is_contiguous()) return layout;
  if (moved_contiguous(x, channel, !layout.channels_last)) {
    layout.channels_last = !layout.channels_last;
    return layout;
  }
  layout.dense = false;
  return layout;
}

// A tensor that lies as the layout says.
Tensor laid_out(const Tensor& x, const Layout& layout) {
  if (!layout.dense) return x.contiguous();
  return x;
}

Tensor like(const Tensor& t, const Tensor& x, const Layout& layout, int64_t channel_dim) {
  const int64_t channel = channel_dim == -1 ? x.dim() - 1 : 1;
  if (t.scalar_type() == x.scalar_type() && moved_contiguous(t, channel, layout.channels_last)) return t;
  return at::empty_like(x).copy_(t);
}

Tensor as_float(const Tensor& t) {
  return t.scalar_type() == at::kFloat && t.is_contiguous() ? t : t.to(at::kFloat).contiguous();
}

// A parameter of the channels as float32, the value where there is none.
struct Channels {
  Floats made;
  Tensor held;
  const float* data;

  Channels(const Maybe& given, int64_t channels, float value) {
    if (given && given->defined()) {
      TORCH_CHECK(given->numel() == channels, "expected a parameter of ", channels, " channels, got ", given->numel());
      held = as_float(*given);
      data = held.const_data_ptr<float>();
    } else {
      made.assign(channels, value);
      data = made.data();
    }
  }
};

const float* data_or_null(const Maybe& t, Tensor& held) {
  if (!t || !t->defined()) return nullptr;
  held = as_float(*t);
  return held.const_data_ptr<float>();
}

const uint8_t* mask_or_null(const Maybe& mask, Tensor& held) {
  if (!mask || !mask->defined()) return nullptr;
  TORCH_CHECK(mask->scalar_type() == at::kBool, "expected a boolean mask");
  held = mask->contiguous();
  return reinterpret_cast<const uint8_t*>(held.const_data_ptr<bool>());
}

// Whether a result is so large that streaming it past the caches pays, counted with the operation that reads it next.
bool streams(const Tensor& x) { return x.nbytes() >= (8 << 20); }

template <class F>
void dispatch(at::ScalarType type, F&& f) {
  switch (type) {
    case at::kFloat: return f(float{});
    case at::kBFloat16: return f(c10::BFloat16{});
    case at::kHalf: return f(c10::Half{});
    default: TORCH_CHECK(false, "normzoo's CPU kernels take float32, bfloat16 and float16, got ", type);
  }
}

// ---- forward -----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> run_forward(
    const Tensor& input, const Maybe& weight, const Maybe& bias, const Maybe& floor, const Maybe& mask,
    const Maybe& mean, const Maybe& var, const Maybe& scale, const Maybe& shift, c10::IntArrayRef axes,
    int64_t channel_dim, bool centred, double eps, bool statistics_alone) {
  const Layout layout = layout_of(input, channel_dim);
  const Tensor x = laid_out(input, layout);
  const Plan plan = make_plan(axes, layout.samples, layout.channels, layout.positions, layout.channels_last,
                              mask && mask->defined());
  const bool known = mean && mean->defined();
  const auto options = x.options().dtype(at::kFloat);
  const Tensor y = statistics_alone ? Tensor() : at::empty_like(x);
  const Tensor means = known ? as_float(*mean) : at::empty(plan.shape, options);
  const Tensor vars = var && var->defined() ? as_float(*var)
                      : known               ? means
                                            : at::empty(plan.shape, options);
  TORCH_CHECK(means.numel() == plan.statistics() && vars.numel() == plan.statistics(), "expected ", plan.statistics(),
              " statistics, got ", means.numel());
  Tensor held_mask, held_floor, held_scale, held_shift;
  const uint8_t* masked = mask_or_null(mask, held_mask);
  const Tensor number = masked && !known ? at::empty(plan.shape, options) : at::empty({0}, options);
  const Channels w(weight, layout.channels, 1), b(bias, layout.channels, 0);
  const float* limit = data_or_null(floor, held_floor);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Forward<T> args{
        x.const_data_ptr<T>(), statistics_alone ? nullptr : y.mutable_data_ptr<T>(), masked, w.data, b.data, limit,
        means.mutable_data_ptr<float>(), vars.mutable_data_ptr<float>(),
        number.numel() ? number.mutable_data_ptr<float>() : nullptr, data_or_null(scale, held_scale),
        data_or_null(shift, held_shift), known, centred, statistics_alone ? Do::sums : Do::all, eps, streams(x)};
    forward(plan, args);
  });
  return {y, means, vars, number};
}

// Count a batch into running averages: the mean, the unbiased variance and the number of batches. Where nothing is real
// there is no news. The number of elements is that of each statistic, or the count of all.
void track(const Maybe& running_mean, const Tensor& running_var, const Tensor& batches, const Tensor& mean,
           const Tensor& var, const Maybe& number, double count, double weight, bool centred) {
  const bool each = number && number->numel();
  const auto average = [&](const Tensor& running, const Tensor& value, bool unbiased) {
    TORCH_CHECK(running.is_contiguous() && running.scalar_type() == at::kFloat && running.numel() == value.numel(),
                "expected a contiguous running average of ", value.numel(), " float32 numbers");
    float* to = running.mutable_data_ptr<float>();
    const float *from = value.const_data_ptr<float>(), *numbers = each ? number->const_data_ptr<float>() : nullptr;
    const int64_t channels = running.numel();
    const auto move = [&](int64_t c, float n) {
      const float scale = unbiased ? n / std::max(n - 1, 1.f) : 1;
      to[c] += (float)weight * (scale * from[c] - to[c]);
    };
    if (numbers) {
      for (int64_t c = 0; c < channels; ++c)
        if (numbers[c] > 0) move(c, numbers[c]);
    } else {
      for (int64_t c = 0; c < channels; ++c) move(c, (float)count);
    }
  };
  if (running_mean && running_mean->defined()) average(*running_mean, mean, false);
  average(running_var, var, centred);
  if (!each || number->gt(0).any().item<bool>()) ++*batches.mutable_data_ptr<int64_t>();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> standardize(
    const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& floor, const Maybe& mask, const Maybe& mean,
    const Maybe& var, const Maybe& running_mean, const Maybe& running_var, const Maybe& batches, c10::IntArrayRef axes,
    int64_t channel_dim, bool centred, double eps, bool constant, double momentum) {
  auto [y, means, vars, number] = run_forward(x, weight, bias, floor, mask, mean, var, {}, {}, axes, channel_dim,
                                              centred, eps, false);
  if (running_var && running_var->defined())
    track(running_mean, *running_var, *batches, means, vars, number, (double)x.numel() / means.numel(), momentum, centred);
  const auto empty = [&] { return at::empty({0}, means.options()); };
  if (mean && mean->defined()) return {y, empty(), empty(), empty()};  // an operator returns nothing that it was given
  return {y, means, vars, number};
}

std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& x, const Maybe& mask, c10::IntArrayRef axes,
                                           int64_t channel_dim, bool centred, double eps) {
  auto [y, means, vars, number] = run_forward(x, {}, {}, {}, mask, {}, {}, {}, {}, axes, channel_dim, centred, eps, true);
  return {means, vars, number};
}

Tensor rescale(const Tensor& x, const Tensor& mean, const Tensor& scale, const Maybe& shift, const Maybe& weight,
               const Maybe& bias, const Maybe& mask, c10::IntArrayRef axes, int64_t channel_dim) {
  return std::get<0>(
      run_forward(x, weight, bias, {}, mask, mean, {}, scale, shift, axes, channel_dim, true, 0, false));
}

// ---- backward ----------------------------------------------------------------------------------------------------

struct Gradients {
  Tensor dx, weight, bias, floor, sum, product;
};

Gradients run_backward(const Tensor& grad, const Tensor& input, const Maybe& weight, const Maybe& bias,
                       const Maybe& floor, const Maybe& mask, const Tensor& mean, const Maybe& var,
                       const Maybe& scale, const Maybe& number, const Maybe& p, const Maybe& q, const Maybe& r, c10::IntArrayRef axes,
                       int64_t channel_dim, bool centred, double eps, bool constant, Do what) {
  const Layout layout = layout_of(input, channel_dim);
  const Tensor x = laid_out(input, layout);
  const Tensor dy = like(grad, x, layout, channel_dim);
  const Plan plan = make_plan(axes, layout.samples, layout.channels, layout.positions, layout.channels_last,
                              mask && mask->defined());
  const auto options = x.options().dtype(at::kFloat);
  Gradients out;
  if (what != Do::sums) out.dx = at::empty_like(x);
  if (what == Do::sums) out.sum = at::empty(mean.sizes(), options), out.product = at::empty(mean.sizes(), options);
  Tensor held[9];
  const uint8_t* masked = mask_or_null(mask, held[0]);
  const Channels w(weight, layout.channels, 1), b(bias, layout.channels, 0);
  const float* limit = data_or_null(floor, held[1]);
  const bool shared = what != Do::apply;
  Shares shares(shared ? at::get_num_threads() : 0, layout.channels);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Backward<T> args{
        dy.const_data_ptr<T>(), x.const_data_ptr<T>(), what == Do::sums ? nullptr : out.dx.mutable_data_ptr<T>(),
        masked, w.data, b.data, limit, data_or_null(mean, held[2]), data_or_null(var, held[3]),
        number && number->numel() ? data_or_null(number, held[4]) : nullptr, data_or_null(scale, held[8]),
        what == Do::sums ? out.sum.mutable_data_ptr<float>() : nullptr,
        what == Do::sums ? out.product.mutable_data_ptr<float>() : nullptr,
        data_or_null(p, held[5]), data_or_null(q, held[6]), data_or_null(r, held[7]), constant, centred, what, eps,
        streams(x), &shares};
    backward(plan, args);
  });
  if (!shared) return out;
  shares.merge();
  const auto parameter = [&](int64_t which, const Maybe& given) -> Tensor {
    const Tensor gradient = at::empty({layout.channels}, options);
    std::memcpy(gradient.mutable_data_ptr<float>(), shares.data.data() + which * layout.channels,
                layout.channels * sizeof(float));
    return given && given->scalar_type() != at::kFloat ? gradient.to(given->scalar_type()) : gradient;
  };
  if (what == Do::sums || (weight && weight->defined())) out.weight = parameter(0, weight);
  if (what == Do::sums || (bias && bias->defined())) out.bias = parameter(1, bias);
  if (floor && floor->defined()) out.floor = parameter(2, floor);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> standardize_backward(
    const Tensor& dy, const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& floor, const Maybe& mask,
    const Tensor& mean, const Tensor& var, const Maybe& number, c10::IntArrayRef axes, int64_t channel_dim,
    bool centred, double eps, bool constant) {
  auto out = run_backward(dy, x, weight, bias, floor, mask, mean, var, {}, number, {}, {}, {}, axes, channel_dim, centred,
                          eps, constant, Do::all);
  const auto or_empty = [&](const Tensor& t) { return t.defined() ? t : at::empty({0}, mean.options()); };
  return {out.dx, or_empty(out.weight), or_empty(out.bias), or_empty(out.floor)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gradient_sums(const Tensor& dy, const Tensor& x, const Maybe& weight,
                                                         const Maybe& mask, const Tensor& mean, const Tensor& scale,
                                                         c10::IntArrayRef axes, int64_t channel_dim) {
  auto out = run_backward(dy, x, weight, {}, {}, mask, mean, {}, scale, {}, {}, {}, {}, axes, channel_dim, true, 0,
                          false, Do::sums);
  return {out.sum, out.product, out.weight, out.bias};
}

Tensor gradient(const Tensor& dy, const Tensor& x, const Maybe& weight, const Maybe& mask, const Tensor& mean,
                const Tensor& p, const Tensor& q, const Tensor& r, c10::IntArrayRef axes, int64_t channel_dim) {
  return run_backward(dy, x, weight, {}, {}, mask, mean, {}, {}, {}, p, q, r, axes, channel_dim, true, 0, false,
                      Do::apply)
      .dx;
}

// ---- autograd ----------------------------------------------------------------------------------------------------

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using GradientFunction = decltype(torch::autograd::Edge::function);

// Written out: torch::autograd::Function takes as long again as a small norm does.
struct Differentiate : torch::autograd::Node {
  SavedVariable x, weight, bias, floor, mask, mean, var, number;
  c10::SmallVector<int64_t, 24> axes;
  int64_t channel_dim;
  bool centred, constant;
  double eps;

  template <class Pointer>
  static Pointer make() {
    if constexpr (std::is_same_v<Pointer, c10::intrusive_ptr<torch::autograd::Node>>)
      return c10::make_intrusive<Differentiate>();
    else  // before torch 2.13
      return Pointer(new Differentiate, [](auto* node) { deleteNode(node); });
  }

  std::string name() const override { return "normzoo::standardize"; }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list out(num_outputs());
    if (!grads[0].defined()) return out;
    static const auto op = find<StandardizeBackward>("normzoo::standardize_backward");
    const auto maybe = [](const SavedVariable& saved) {
      Tensor t = saved.unpack();
      return t.defined() ? Maybe(std::move(t)) : Maybe();
    };
    // a checkpoint computes the forward pass again when the first of these is asked for
    const Tensor input = x.unpack(), means = mean.unpack(), vars = var.unpack();
    const Maybe gain = maybe(weight), shift = maybe(bias), limit = maybe(floor), real = maybe(mask), count = maybe(number);
    const auto found = [&] {
      std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
      if (!at::GradMode::is_enabled()) guard.emplace();  // otherwise its own gradient is that of the formula
      return op.call(grads[0], input, gain, shift, limit, real, means, vars, count, axes, channel_dim, centred, eps,
                     constant);
    }();
    size_t i = 0;
    const auto put = [&](const Tensor& gradient) {
      if (task_should_compute_output(i)) out[i] = gradient;
      ++i;
    };
    put(std::get<0>(found));
    put(std::get<1>(found));
    put(std::get<2>(found));
    put(std::get<3>(found));
    return out;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto* saved : {&x, &weight, &bias, &floor, &mask, &mean, &var, &number}) saved->reset_data();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> standardize_autograd(
    const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& floor, const Maybe& mask, const Maybe& mean,
    const Maybe& var, const Maybe& running_mean, const Maybe& running_var, const Maybe& batches, c10::IntArrayRef axes,
    int64_t channel_dim, bool centred, double eps, bool constant, double momentum) {
  static const auto op = find<Standardize>("normzoo::standardize");
  auto results = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(x, weight, bias, floor, mask, mean, var, running_mean, running_var, batches, axes, channel_dim,
                   centred, eps, constant, momentum);
  }();
  if (!torch::autograd::compute_requires_grad(x, weight, bias, floor)) return results;
  const auto& [y, means, vars, number] = results;
  const GradientFunction function = Differentiate::make<GradientFunction>();
  auto& node = static_cast<Differentiate&>(*function);
  node.set_next_edges(torch::autograd::collect_next_edges(x, weight, bias, floor));
  const auto keep = [](SavedVariable& to, const Maybe& t) {
    if (t && t->defined()) to = SavedVariable(*t, false);
  };
  keep(node.x, x);
  keep(node.weight, weight);
  keep(node.bias, bias);
  keep(node.floor, floor);
  keep(node.mask, mask);
  const bool known = mean && mean->defined();
  keep(node.mean, known ? mean : means);
  keep(node.var, known ? var : vars);
  if (mask && mask->defined()) keep(node.number, number);
  node.axes.assign(axes.begin(), axes.end());
  node.channel_dim = channel_dim;
  node.centred = centred;
  node.constant = constant;
  node.eps = eps;
  torch::autograd::set_history(y, function);
  return results;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(normzoo, m) {
  m.def(
      "standardize(Tensor x, Tensor? weight, Tensor? bias, Tensor? floor, Tensor? mask, Tensor? mean, Tensor? var, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, int[] axes, int channel_dim, "
      "bool centred, float eps, bool constant, float momentum) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "standardize_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? floor, Tensor? mask, "
      "Tensor mean, Tensor var, Tensor? number, int[] axes, int channel_dim, bool centred, float eps, bool constant) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "track(Tensor(a!)? running_mean, Tensor(b!) running_var, Tensor(c!) batches, Tensor mean, Tensor var, "
      "Tensor? number, float count, float weight, bool centred) -> ()");
  m.def(
      "moments(Tensor x, Tensor? mask, int[] axes, int channel_dim, bool centred, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "rescale(Tensor x, Tensor mean, Tensor scale, Tensor? shift, Tensor? weight, Tensor? bias, Tensor? mask, "
      "int[] axes, int channel_dim) -> Tensor");
  m.def(
      "gradient_sums(Tensor dy, Tensor x, Tensor? weight, Tensor? mask, Tensor mean, Tensor scale, int[] axes, "
      "int channel_dim) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gradient(Tensor dy, Tensor x, Tensor? weight, Tensor? mask, Tensor mean, Tensor p, Tensor q, Tensor r, "
      "int[] axes, int channel_dim) -> Tensor");
}

TORCH_LIBRARY_IMPL(normzoo, CPU, m) {
  m.impl("standardize", &standardize);
  m.impl("standardize_backward", &standardize_backward);
  m.impl("track", &track);
  m.impl("moments", &moments);
  m.impl("rescale", &rescale);
  m.impl("gradient_sums", &gradient_sums);
  m.impl("gradient", &gradient);
}

TORCH_LIBRARY_IMPL(normzoo, Autograd, m) { m.impl("standardize", &standardize_autograd); }

}  // namespace normzoo
