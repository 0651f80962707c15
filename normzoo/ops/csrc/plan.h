// From a pattern and a shape to loops: which runs of memory share a statistic, and which channel each belongs to.
#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace normzoo {

// One factor of an axis, in the order of the memory.
struct Axis {
  int64_t size;
  bool kept;        // statistics differ along it
  int64_t channel;  // stride in the channels, 0 for samples and positions
  int64_t mask;     // stride in the mask, 0 for channels
};

// Where a run begins: in memory, among the channels and in the mask.
struct Start {
  int64_t memory = 0, channel = 0, mask = 0;

  Start operator+(const Start& more) const {
    return {memory + more.memory, channel + more.channel, mask + more.mask};
  }
  Start operator*(int64_t times) const { return {memory * times, channel * times, mask * times}; }
};

// The starts of the runs along some axes, the last of which is the fastest.
struct Starts {
  struct Step {
    int64_t size;
    Start stride;
  };
  c10::SmallVector<Step, 4> steps;
  int64_t number = 1;

  int64_t size() const { return number; }

  void cross(const Axis& axis, int64_t stride) {
    steps.push_back({axis.size, {stride, axis.channel, axis.mask}});
    number *= axis.size;
  }

  Start operator[](int64_t i) const {
    Start at;
    for (size_t j = steps.size(); j-- > 0;) {
      const auto& [size, stride] = steps[j];
      const int64_t whole = j > 0 ? i / size : 0, index = i - whole * size;  // few divisions: most have one axis
      at = at + stride * index;
      i = whole;
    }
    return at;
  }
};

constexpr int64_t kLongRun = 512, kManyRuns = 64;

enum class Family {
  runs,     // the innermost run is reduced, and lies in one channel: images, statistics over positions
  rows,     // a run of channels is reduced by itself: tokens, each position alone
  columns,  // the innermost run is kept, or it is all channels and several of it are reduced together
};

struct Plan {
  Family family = Family::runs;
  bool across = false;  // the innermost run crosses the channels; otherwise it lies in one
  int64_t width = 1;    // length of the innermost run
  int64_t channels = 1;
  int64_t repeat = 1;            // columns across channels: positions in one run, which are reduced together
  int64_t groups = 1;            // rows, columns: statistics in one run
  std::vector<int32_t> group;    // columns across channels: the statistic of each channel, where they share them
  int64_t block = 0;             // of adjacent channels, where each statistic is one
  Starts kept, reduced;          // the other axes
  // the same axes in the order of the memory, with their strides among the kept ones: none where they are reduced
  struct Step {
    int64_t size, kept;
    Start stride;
  };
  c10::SmallVector<Step, 8> order;
  int64_t count = 1;             // elements of one statistic
  c10::SmallVector<int64_t, 8> shape;  // of the statistics, in the order of the memory

  // How many adjacent runs make one statistic, each in the channel after that of the one before: 0 where it isn't so.
  int64_t adjacent() const {
    if (family != Family::runs) return 0;
    int64_t runs = 1;
    if (reduced.size() > 1) {
      const auto& [size, stride] = reduced.steps.back();
      if (reduced.steps.size() > 1 || stride.memory != width || stride.channel != 1) return 0;
      runs = size;
    }
    if (runs == channels) return runs;
    const auto& last = kept.steps.back();
    return last.stride.memory == runs * width && last.stride.channel == runs && last.size * runs == channels ? runs : 0;
  }

  int64_t statistics() const { return kept.size() * (family == Family::runs ? 1 : groups); }
};

// One run after the other in the order of the memory.
struct Cursor {
  const Plan& plan;
  int64_t kept = 0;
  Start start;
  c10::SmallVector<int64_t, 8> index;

  Cursor(const Plan& plan, int64_t place) : plan(plan), index(plan.order.size()) {
    for (size_t i = index.size(); i-- > 0; place /= plan.order[i].size) move(i, place % plan.order[i].size);
  }

  void move(size_t axis, int64_t steps) {
    const auto& step = plan.order[axis];
    index[axis] += steps;
    kept += steps * step.kept;
    start = start + step.stride * steps;
  }

  void next() {
    for (size_t i = index.size(); i-- > 0;) {
      move(i, 1);
      if (index[i] < plan.order[i].size) return;
      move(i, -plan.order[i].size);
    }
  }
};

// spec: numbers of factors of samples, channels and positions, then for each its size (-1: what is left) and whether it
// is kept. channels_last speaks of the memory.
inline Plan make_plan(c10::IntArrayRef spec, int64_t samples, int64_t channels, int64_t positions, bool channels_last,
                      bool masked) {
  c10::SmallVector<Axis, 4> parts[3];
  const int64_t totals[3] = {samples, channels, positions};
  size_t at = 3;
  for (int which = 0; which < 3; ++which) {
    int64_t known = 1;
    for (int64_t i = 0; i < spec[which]; ++i) {
      const int64_t size = spec[at + 2 * i];
      if (size > 0) known *= size;
    }
    TORCH_CHECK(known > 0 && totals[which] % known == 0, "the pattern's factors do not divide an axis of size ",
                totals[which]);
    int64_t stride = totals[which];
    for (int64_t i = 0; i < spec[which]; ++i, at += 2) {
      const int64_t size = spec[at] > 0 ? spec[at] : totals[which] / known;
      stride /= std::max<int64_t>(size, 1);
      Axis axis{size, spec[at + 1] != 0, 0, 0};
      if (which == 1) axis.channel = stride;
      if (which == 0) axis.mask = stride * positions;
      if (which == 2) axis.mask = stride;
      parts[which].push_back(axis);
    }
  }

  Plan plan;
  plan.channels = channels;
  c10::SmallVector<Axis, 8> axes;
  for (int which : {0, channels_last ? 2 : 1, channels_last ? 1 : 2})
    for (const auto& axis : parts[which]) {
      if (axis.kept) plan.shape.push_back(axis.size);
      if (!axis.kept) plan.count *= axis.size;
      if (axis.size == 1) continue;
      if (!axes.empty()) {  // two axes that are one to the loops
        auto& outer = axes.back();
        if (outer.kept == axis.kept && outer.channel == axis.channel * axis.size &&
            outer.mask == axis.mask * axis.size) {
          outer = {outer.size * axis.size, axis.kept, axis.channel, axis.mask};
          continue;
        }
      }
      axes.push_back(axis);
    }

  // the innermost run: one axis, or all channels
  size_t inner = axes.size();
  plan.across = !axes.empty() && axes.back().channel > 0;
  bool any_kept = false, any_reduced = false;
  while (inner > 0 && (plan.across ? axes[inner - 1].channel > 0 : inner == axes.size())) {
    --inner;
    plan.width *= axes[inner].size;
    (axes[inner].kept ? any_kept : any_reduced) = true;
  }
  // few channels: several of many positions that are reduced together make one longer run
  if (plan.across && inner > 0 && !axes[inner - 1].kept && !masked) {
    auto& positions_left = axes[inner - 1].size;
    int64_t many = std::max<int64_t>(1, std::min(kLongRun / plan.width, positions_left / kManyRuns));
    while (positions_left % many) --many;
    positions_left /= many;
    plan.width *= many;
    plan.repeat = many;
  }
  int64_t stride = plan.width;
  c10::SmallVector<int64_t, 8> strides(inner);
  for (size_t i = inner; i-- > 0; stride *= axes[i].size) strides[i] = stride;
  for (size_t i = 0; i < inner; ++i) (axes[i].kept ? plan.kept : plan.reduced).cross(axes[i], strides[i]);
  int64_t k = plan.kept.size();
  for (size_t i = 0; i < inner; ++i) {
    if (axes[i].kept) k /= axes[i].size;
    plan.order.push_back({axes[i].size, axes[i].kept ? k : 0, {strides[i], axes[i].channel, axes[i].mask}});
  }

  if (!plan.across && !any_kept) return plan;
  plan.groups = 1;
  for (size_t i = inner; i < axes.size(); ++i)
    if (axes[i].kept) plan.groups *= axes[i].size;
  const size_t factors = axes.size() - inner;
  const bool blocks = any_reduced && (factors == 1 || (factors == 2 && axes[inner].kept));
  if (plan.across && plan.reduced.size() == 1 && plan.repeat == 1 && blocks) {
    plan.family = Family::rows;
    return plan;
  }
  plan.family = Family::columns;
  if (plan.across) {
    if (plan.groups == channels) return plan;
    if (factors == 1 || (factors == 2 && axes[inner].kept)) plan.block = channels / plan.groups;
    plan.group.reserve(channels);
    plan.group.push_back(0);
    int64_t scale = plan.groups;
    for (size_t i = inner; i < axes.size(); ++i) {  // the channels of the outer axes, each with all of this one
      if (axes[i].kept) scale /= axes[i].size;
      const auto outer = plan.group;
      plan.group.clear();
      for (const auto group : outer)
        for (int64_t j = 0; j < axes[i].size; ++j) plan.group.push_back(group + (axes[i].kept ? j * scale : 0));
    }
  }
  return plan;
}

}  // namespace normzoo
