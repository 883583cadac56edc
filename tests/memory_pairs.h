// Rows of tokens in memory as a set of pairs.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "data/pairs.h"

namespace orpo::test {

struct Row {
  std::vector<int32_t> trunk, chosen, rejected;
};

class MemoryPairs : public PairSet {
 public:
  explicit MemoryPairs(std::vector<Row> rows) : rows_(std::move(rows)) {}
  int64_t size() const override { return static_cast<int64_t>(rows_.size()); }
  TokenPair operator[](int64_t i) const override {
    return {rows_[i].trunk, rows_[i].chosen, rows_[i].rejected, i + 1, 0};
  }

 private:
  std::vector<Row> rows_;
};

}  // namespace orpo::test
