// The operators' signatures, for those who call them through the dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>

namespace normzoo {

using at::Tensor;
using Maybe = std::optional<Tensor>;

using Standardize = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Maybe&, const Maybe&, const Maybe&, const Maybe&, const Maybe&, const Maybe&, const Maybe&,
    const Maybe&, const Maybe&, c10::IntArrayRef, int64_t, bool, double, bool, double);
using StandardizeBackward = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Maybe&, const Maybe&, const Tensor&, const Tensor&,
    const Maybe&, c10::IntArrayRef, int64_t, bool, double, bool);

using Measure = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Maybe&, c10::IntArrayRef, int64_t, bool, double);
using Rescale = Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Maybe&,
                       const Maybe&, c10::IntArrayRef, int64_t);
using GradientSums = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Maybe&, const Maybe&,
                                                                const Tensor&, const Tensor&, c10::IntArrayRef, int64_t);
using Gradient = Tensor(const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Tensor&, const Tensor&,
                        const Tensor&, const Tensor&, c10::IntArrayRef, int64_t);

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace normzoo
