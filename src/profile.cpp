#include "src/profile.h"

#include <cstdio>

#include "src/console.h"

namespace orpo {
namespace {

double seconds_between(Profile::Clock::time_point a, Profile::Clock::time_point b) {
  return std::chrono::duration<double>(b - a).count();
}

// What an operation is bound by: products and attention by arithmetic, the others by memory.
bool counts_flops(Part part) {
  return part == Part::layer_products || part == Part::head_products || part == Part::attention;
}

}  // namespace

const char* part_name(Part part) {
  static const char* names[profile_parts] = {"products of the layers", "products of the head", "attention",
                                             "norm",                   "rope",                 "activation",
                                             "head",                   "embedding",            "optimizer",
                                             "data",                   "host"};
  return names[static_cast<int>(part)];
}

void Profile::begin_step() {
  current_ = {};
  last_ = Clock::now();
}

void Profile::add(Part part, Clock::time_point start, double flops, double bytes, Part before) {
  current_.amounts[static_cast<int>(before)].seconds += seconds_between(last_, start);
  last_ = Clock::now();
  current_.amounts[static_cast<int>(part)].add(seconds_between(start, last_), flops, bytes);
}

void Profile::add(const ProductShape& product, Clock::time_point start, double flops, double bytes) {
  add(product.head ? Part::head_products : Part::layer_products, start, flops, bytes);
  current_.products[product].add(seconds_between(start, last_), flops, bytes);
}

void Profile::end_step(double tokens, double pairs, double flops) {
  const Clock::time_point now = Clock::now();
  current_.amounts[static_cast<int>(Part::host)].seconds += seconds_between(last_, now);
  last_ = now;
  for (const Amount& a : current_.amounts) current_.seconds += a.seconds;
  current_.tokens = tokens, current_.pairs = pairs, current_.flops = flops;
  steps_ += 1;
  if (steps_ <= 2 || flops / current_.seconds > fastest_.flops / fastest_.seconds) fastest_ = current_;
  current_ = {};
}

std::string profile_table(const StepProfile& step, double gemm_rate) {
  std::string table;
  char line[160];
  const auto add = [&](const char* name, double seconds, const std::string& rate) {
    std::snprintf(line, sizeof line, "%-24s %10.4f %7.1f%%  %s\n", name, seconds, 100 * seconds / step.seconds,
                  rate.c_str());
    table += line;
  };
  std::snprintf(line, sizeof line, "%-24s %10s %8s  %s\n", "time by operation", "seconds", "share", "rate");
  table += line;
  for (int i = 0; i < profile_parts; ++i) {
    const Part part = static_cast<Part>(i);
    const Amount& a = step[part];
    if (a.seconds == 0) continue;
    std::string rate;
    if (a.calls > 0 && part != Part::data)
      rate = counts_flops(part) ? concat(number_text(a.flops / a.seconds / 1e9, 0), " GFLOP/s")
                                : concat(number_text(a.bytes / a.seconds / 1e9, 1), " GB/s");
    add(part_name(part), a.seconds, rate);
  }
  add("the step", step.seconds,
      concat(number_text(step.flops / step.seconds / 1e9, 0), " useful GFLOP/s, mfu ",
             number_text(step.flops / step.seconds / gemm_rate, 3), " of ", number_text(gemm_rate / 1e9, 0)));
  return table;
}

Json profile_json(const StepProfile& step) {
  Json operations = Json::array(), products = Json::array();
  for (int i = 0; i < profile_parts; ++i) {
    const Amount& a = step.amounts[i];
    operations.push_back({{"name", part_name(static_cast<Part>(i))},
                          {"seconds", a.seconds},
                          {"share", a.seconds / step.seconds},
                          {"flops", a.flops},
                          {"bytes", a.bytes},
                          {"calls", a.calls}});
  }
  for (const auto& [shape, a] : step.products)
    products.push_back({{"backward", shape.backward},
                        {"din", shape.din},
                        {"dweight", shape.dweight},
                        {"rows", shape.rows},
                        {"n", shape.n},
                        {"k", shape.k},
                        {"accumulation_out", shape.accumulation_out},
                        {"pitch", shape.pitch},
                        {"head", shape.head},
                        {"calls", a.calls},
                        {"seconds", a.seconds},
                        {"flops", a.flops}});
  return {{"seconds", step.seconds},   {"tokens", step.tokens},         {"pairs", step.pairs},
          {"useful_flops", step.flops}, {"operations", operations}, {"products", products}};
}

}  // namespace orpo
