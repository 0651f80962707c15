// A norm whose statistics are shares of those of each cell (a channel of a sample), of all cells of its sample, and of the
// batch. What is done with the cells is little, but as operations on small tensors takes as long as the passes over x.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "operators.h"

namespace normzoo {
namespace {

const float* data(const Tensor& t, int64_t count) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() == count, "expected ", count,
              " contiguous float32 numbers, got ", t.numel(), " of ", t.scalar_type());
  return t.const_data_ptr<float>();
}

struct Cells {
  int64_t samples, channels;
  const float *mean, *var, *batch_mean, *batch_var, *p, *q;

  Cells(const Tensor& mean, const Tensor& var, const Tensor& batch_mean, const Tensor& batch_var, const Tensor& p,
        const Tensor& q)
      : samples(mean.size(0)), channels(mean.size(1)), mean(data(mean, samples * channels)),
        var(data(var, samples * channels)), batch_mean(data(batch_mean, channels)), batch_var(data(batch_var, channels)),
        p(data(p, 3)), q(data(q, 3)) {}

  // Mean and variance of a sample.
  std::pair<float, float> sample(int64_t b) const {
    const float *m = mean + b * channels, *v = var + b * channels;
    double sum = 0, squares = 0;
    for (int64_t c = 0; c < channels; ++c) sum += m[c];
    const float middle = (float)(sum / channels);
    for (int64_t c = 0; c < channels; ++c) squares += v[c] + (m[c] - middle) * (m[c] - middle);
    return {middle, (float)(squares / channels)};
  }
};

// Mean and variance of the batch, from those of the cells.
std::pair<Tensor, Tensor> pool(const Tensor& mean, const Tensor& var) {
  const int64_t samples = mean.size(0), channels = mean.size(1);
  const float *m = mean.const_data_ptr<float>(), *v = var.const_data_ptr<float>();
  std::pair<Tensor, Tensor> batch{at::empty({channels}, mean.options()), at::empty({channels}, mean.options())};
  float *middle = batch.first.mutable_data_ptr<float>(), *spread = batch.second.mutable_data_ptr<float>();
  std::vector<double> sums(2 * channels);
  double* squares = sums.data() + channels;
  for (int64_t b = 0, i = 0; b < samples; ++b)
    for (int64_t c = 0; c < channels; ++c, ++i) sums[c] += m[i];
  for (int64_t c = 0; c < channels; ++c) middle[c] = (float)(sums[c] / samples);
  for (int64_t b = 0, i = 0; b < samples; ++b)
    for (int64_t c = 0; c < channels; ++c, ++i) squares[c] += v[i] + (m[i] - middle[c]) * (m[i] - middle[c]);
  for (int64_t c = 0; c < channels; ++c) spread[c] = (float)(squares[c] / samples);
  return batch;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixture(
    const Tensor& x, const Maybe& batch_mean, const Maybe& batch_var, const Tensor& p, const Tensor& q,
    const Maybe& weight, const Maybe& bias, c10::IntArrayRef axes, int64_t channel_dim, double eps) {
  static const auto moments = find<Measure>("normzoo::moments");
  static const auto rescale = find<Rescale>("normzoo::rescale");
  const auto [mean, var, number] = moments.call(x, {}, axes, channel_dim, true, eps);
  const bool given = batch_mean && batch_var;
  const auto [middle, spread] = given ? std::pair(*batch_mean, *batch_var) : pool(mean, var);
  const Cells cells(mean, var, middle, spread, p, q);
  const Tensor centre = at::empty_like(mean), scale = at::empty_like(var);
  float *to_centre = centre.mutable_data_ptr<float>(), *to_scale = scale.mutable_data_ptr<float>();
  for (int64_t b = 0, i = 0; b < cells.samples; ++b) {
    const auto [sample_mean, sample_var] = cells.sample(b);
    for (int64_t c = 0; c < cells.channels; ++c, ++i) {
      to_centre[i] = cells.p[0] * cells.mean[i] + cells.p[1] * sample_mean + cells.p[2] * cells.batch_mean[c];
      const float v = cells.q[0] * cells.var[i] + cells.q[1] * sample_var + cells.q[2] * cells.batch_var[c];
      to_scale[i] = 1 / std::sqrt(v + (float)eps);
    }
  }
  const Tensor y = rescale.call(x, centre, scale, {}, weight, bias, {}, axes, channel_dim);
  if (!given) return {y, mean, var, centre, scale, middle, spread};
  const auto none = [&] { return at::empty({0}, mean.options()); };  // an operator returns nothing that it was given
  return {y, mean, var, centre, scale, none(), none()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixture_backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var, const Tensor& centre, const Tensor& scale,
    const Tensor& batch_mean, const Tensor& batch_var, const Tensor& p, const Tensor& q, const Maybe& weight,
    c10::IntArrayRef axes, int64_t channel_dim, bool given) {
  static const auto measure = find<GradientSums>("normzoo::gradient_sums");
  static const auto gradient = find<Gradient>("normzoo::gradient");
  const auto [total, product, to_weight, to_bias] = measure.call(dy, x, weight, {}, centre, scale, axes, channel_dim);
  const Cells cells(mean, var, batch_mean, batch_var, p, q);
  const int64_t channels = cells.channels, count = cells.samples * channels;
  const float *sum = data(total, count), *dscale = data(product, count), *factor = data(scale, count);
  const Tensor to_mean = at::empty_like(mean), to_var = at::empty_like(var);
  float *dmean = to_mean.mutable_data_ptr<float>(), *dvar = to_var.mutable_data_ptr<float>();
  std::vector<double> to_batch(2 * channels);
  double dp[3] = {}, dq[3] = {};
  for (int64_t b = 0, first = 0; b < cells.samples; ++b, first += channels) {
    const auto [middle, spread] = cells.sample(b);
    double sum_mean = 0, sum_var = 0;
    for (int64_t c = 0, i = first; c < channels; ++c, ++i) {  // of the mixed mean and variance
      dmean[i] = -factor[i] * sum[i];
      dvar[i] = -0.5f * (dscale[i] * factor[i]) * factor[i] * factor[i];
      sum_mean += dmean[i];
      sum_var += dvar[i];
      dp[0] += (double)dmean[i] * cells.mean[i];
      dq[0] += (double)dvar[i] * cells.var[i];
      to_batch[c] += dmean[i];
      to_batch[channels + c] += dvar[i];
    }
    dp[1] += sum_mean * middle;
    dq[1] += sum_var * spread;
    const float from_middle = (float)(cells.p[1] * sum_mean / channels), share = (float)(cells.q[1] * sum_var / channels);
    for (int64_t i = first; i < first + channels; ++i) {
      dmean[i] = cells.p[0] * dmean[i] + from_middle + 2 * share * (cells.mean[i] - middle);
      dvar[i] = cells.q[0] * dvar[i] + share;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    dp[2] += to_batch[c] * cells.batch_mean[c];
    dq[2] += to_batch[channels + c] * cells.batch_var[c];
  }
  const float positions = (float)(x.numel() / count);
  for (int64_t b = 0, i = 0; b < cells.samples; ++b)
    for (int64_t c = 0; c < channels; ++c, ++i) {
      if (!given) {
        const float share = (float)(cells.q[2] * to_batch[channels + c] / cells.samples);
        dmean[i] += (float)(cells.p[2] * to_batch[c] / cells.samples) + 2 * share * (cells.mean[i] - cells.batch_mean[c]);
        dvar[i] += share;
      }
      dmean[i] /= positions;
      dvar[i] *= 2 / positions;
    }
  const Tensor dx = gradient.call(dy, x, weight, {}, mean, scale, to_var, to_mean, axes, channel_dim);
  const Tensor to_p = at::empty_like(p), to_q = at::empty_like(q);
  for (int i = 0; i < 3; ++i) to_p.mutable_data_ptr<float>()[i] = (float)dp[i];
  for (int i = 0; i < 3; ++i) to_q.mutable_data_ptr<float>()[i] = (float)dq[i];
  return {dx, to_p, to_q, to_weight, to_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(normzoo, m) {
  m.def(
      "mixture(Tensor x, Tensor? batch_mean, Tensor? batch_var, Tensor p, Tensor q, Tensor? weight, Tensor? bias, "
      "int[] axes, int channel_dim, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mixture_backward(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor centre, Tensor scale, Tensor batch_mean, "
      "Tensor batch_var, Tensor p, Tensor q, Tensor? weight, int[] axes, int channel_dim, bool given) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(normzoo, CPU, m) {
  m.impl("mixture", &mixture);
  m.impl("mixture_backward", &mixture_backward);
}

}  // namespace normzoo
