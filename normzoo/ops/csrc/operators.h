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

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace normzoo
