// Assigns tensors to launches: see cuda/launch_plan.h.
#include "cuda/launch_plan.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

namespace adamops {

std::vector<PlannedLaunch> plan_launches(const std::vector<PlannedTensor>& tensors, const LaunchLimits& limits) {
  std::vector<PlannedLaunch> launches;
  std::vector<std::vector<PlannedLaunch>> by_kind;
  std::map<uint32_t, size_t> kinds;
  for (uint32_t i = 0; i < tensors.size(); ++i) {
    const auto [numel, kind] = tensors[i];
    if (numel <= 0) continue;
    const int64_t blocks = (numel - 1) / limits.chunk + 1;
    if (blocks > limits.blocks)
      throw std::length_error("tensor " + std::to_string(i) + " has " + std::to_string(numel) +
                              " elements, which is more than one launch can cover");
    const auto [found, is_new] = kinds.try_emplace(kind, by_kind.size());
    if (is_new) by_kind.emplace_back();
    std::vector<PlannedLaunch>& own = by_kind[found->second];
    if (own.empty() || own.back().tensors.size() == limits.tensors ||
        blocks > static_cast<int64_t>(limits.blocks) - own.back().blocks())
      own.push_back({kind, {}, {0}});
    own.back().tensors.push_back(i);
    own.back().first_block.push_back(own.back().blocks() + static_cast<uint32_t>(blocks));
  }
  for (std::vector<PlannedLaunch>& own : by_kind) std::move(own.begin(), own.end(), std::back_inserter(launches));
  return launches;
}

}  // namespace adamops
