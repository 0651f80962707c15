// Moments of cells, of which there is one for each channel of each sample, taken together and mixed: a few numbers, which
// as many operations on small tensors take as long as the pass over the input.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace normzoo {
namespace {

using at::Tensor;

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

// Mean and variance of all samples, or of all channels.
std::tuple<Tensor, Tensor> pool(const Tensor& mean, const Tensor& var, bool over_samples) {
  const int64_t samples = mean.size(0), channels = mean.size(1);
  const float *m = data(mean, samples * channels), *v = data(var, samples * channels);
  const int64_t kept = over_samples ? channels : samples;
  const double share = 1.0 / std::max<int64_t>(1, over_samples ? samples : channels);
  const Tensor pooled_mean = over_samples ? at::empty({1, channels, 1}, mean.options())
                                          : at::empty({samples, 1, 1}, mean.options());
  const Tensor pooled_var = at::empty_like(pooled_mean);
  std::vector<double> sums(2 * kept);
  double* squares = sums.data() + kept;
  for (int64_t b = 0, i = 0; b < samples; ++b)
    for (int64_t c = 0; c < channels; ++c, ++i) sums[over_samples ? c : b] += m[i];
  float *to_mean = pooled_mean.mutable_data_ptr<float>(), *to_var = pooled_var.mutable_data_ptr<float>();
  for (int64_t k = 0; k < kept; ++k) to_mean[k] = (float)(sums[k] * share);
  for (int64_t b = 0, i = 0; b < samples; ++b)
    for (int64_t c = 0; c < channels; ++c, ++i) {
      const int64_t k = over_samples ? c : b;
      squares[k] += v[i] + (m[i] - to_mean[k]) * (m[i] - to_mean[k]);
    }
  for (int64_t k = 0; k < kept; ++k) to_var[k] = (float)(squares[k] * share);
  return {pooled_mean, pooled_var};
}

std::tuple<Tensor, Tensor> pool_backward(const Tensor& to_mean, const Tensor& to_var, const Tensor& mean,
                                         const Tensor& pooled_mean, bool over_samples) {
  const int64_t samples = mean.size(0), channels = mean.size(1), kept = over_samples ? channels : samples;
  const float *dmean = data(to_mean, kept), *dvar = data(to_var, kept), *middle = data(pooled_mean, kept);
  const float *m = data(mean, samples * channels), share = 1.f / std::max<int64_t>(1, over_samples ? samples : channels);
  const Tensor cell_mean = at::empty_like(mean), cell_var = at::empty_like(mean);
  float *to_m = cell_mean.mutable_data_ptr<float>(), *to_v = cell_var.mutable_data_ptr<float>();
  for (int64_t b = 0, i = 0; b < samples; ++b)
    for (int64_t c = 0; c < channels; ++c, ++i) {
      const int64_t k = over_samples ? c : b;
      to_m[i] = share * (dmean[k] + 2 * dvar[k] * (m[i] - middle[k]));
      to_v[i] = share * dvar[k];
    }
  return {cell_mean, cell_var};
}

std::tuple<Tensor, Tensor> mixture(const Tensor& mean, const Tensor& var, const Tensor& batch_mean,
                                   const Tensor& batch_var, const Tensor& p, const Tensor& q, double eps) {
  const Cells cells(mean, var, batch_mean, batch_var, p, q);
  const Tensor centre = at::empty_like(mean), scale = at::empty_like(var);
  float *to_centre = centre.mutable_data_ptr<float>(), *to_scale = scale.mutable_data_ptr<float>();
  for (int64_t b = 0, i = 0; b < cells.samples; ++b) {
    const auto [middle, spread] = cells.sample(b);
    for (int64_t c = 0; c < cells.channels; ++c, ++i) {
      to_centre[i] = cells.p[0] * cells.mean[i] + cells.p[1] * middle + cells.p[2] * cells.batch_mean[c];
      const float v = cells.q[0] * cells.var[i] + cells.q[1] * spread + cells.q[2] * cells.batch_var[c];
      to_scale[i] = 1 / std::sqrt(v + (float)eps);
    }
  }
  return {centre, scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixture_backward(
    const Tensor& to_centre, const Tensor& to_scale, const Tensor& mean, const Tensor& var, const Tensor& batch_mean,
    const Tensor& batch_var, const Tensor& p, const Tensor& q, const Tensor& scale) {
  const Cells cells(mean, var, batch_mean, batch_var, p, q);
  const int64_t channels = cells.channels, count = cells.samples * channels;
  const float *dcentre = data(to_centre, count), *dscale = data(to_scale, count), *factor = data(scale, count);
  const Tensor to_mean = at::empty_like(mean), to_var = at::empty_like(var);
  const Tensor to_batch_mean = at::zeros_like(batch_mean), to_batch_var = at::zeros_like(batch_var);
  const Tensor to_p = at::empty_like(p), to_q = at::empty_like(q);
  float *dmean = to_mean.mutable_data_ptr<float>(), *dvar = to_var.mutable_data_ptr<float>();
  float *dbatch_mean = to_batch_mean.mutable_data_ptr<float>(), *dbatch_var = to_batch_var.mutable_data_ptr<float>();
  double dp[3] = {}, dq[3] = {};
  for (int64_t b = 0, first = 0; b < cells.samples; ++b, first += channels) {
    const auto [middle, spread] = cells.sample(b);
    double sum_centre = 0, sum_var = 0;
    for (int64_t c = 0, i = first; c < channels; ++c, ++i) {
      dvar[i] = -0.5f * (dscale[i] * factor[i]) * factor[i] * factor[i];  // of the mixed variance
      sum_centre += dcentre[i];
      sum_var += dvar[i];
      dp[0] += (double)dcentre[i] * cells.mean[i];
      dq[0] += (double)dvar[i] * cells.var[i];
      dp[2] += (double)dcentre[i] * cells.batch_mean[c];
      dq[2] += (double)dvar[i] * cells.batch_var[c];
      dbatch_mean[c] += cells.p[2] * dcentre[i];
      dbatch_var[c] += cells.q[2] * dvar[i];
    }
    dp[1] += sum_centre * middle;
    dq[1] += sum_var * spread;
    const float from_middle = (float)(cells.p[1] * sum_centre / channels), share = (float)(cells.q[1] * sum_var / channels);
    for (int64_t i = first; i < first + channels; ++i) {
      dmean[i] = cells.p[0] * dcentre[i] + from_middle + 2 * share * (cells.mean[i] - middle);
      dvar[i] = cells.q[0] * dvar[i] + share;
    }
  }
  std::copy_n(dp, 3, to_p.mutable_data_ptr<float>());
  std::copy_n(dq, 3, to_q.mutable_data_ptr<float>());
  return {to_mean, to_var, to_batch_mean, to_batch_var, to_p, to_q};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(normzoo, m) {
  m.def("pool(Tensor mean, Tensor var, bool over_samples) -> (Tensor, Tensor)");
  m.def(
      "pool_backward(Tensor to_mean, Tensor to_var, Tensor mean, Tensor pooled_mean, bool over_samples) "
      "-> (Tensor, Tensor)");
  m.def(
      "mixture(Tensor mean, Tensor var, Tensor batch_mean, Tensor batch_var, Tensor p, Tensor q, float eps) "
      "-> (Tensor, Tensor)");
  m.def(
      "mixture_backward(Tensor to_centre, Tensor to_scale, Tensor mean, Tensor var, Tensor batch_mean, "
      "Tensor batch_var, Tensor p, Tensor q, Tensor scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(normzoo, CPU, m) {
  m.impl("pool", &pool);
  m.impl("pool_backward", &pool_backward);
  m.impl("mixture", &mixture);
  m.impl("mixture_backward", &mixture_backward);
}

}  // namespace normzoo
