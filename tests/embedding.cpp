#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

constexpr int64_t rows = 97, vocab = 123, width = 37, padding = 0;  // token 0 occurs, and gives no gradient

// Few tokens come often, so that rows of equal tokens must be added.
Values tokens() {
  Values t = random_values(rows, 3, 0, 1);
  for (double& v : t) v = std::floor(v * v * vocab);
  return t;
}

}  // namespace

TEST_CASE("embedding: forward copies rows, backward adds them in order, the padding token's not") {
  each_device([](Backend& backend, DType dtype) {
    const Values table = rounded(random_values(vocab * width, 1), dtype),
                 dout = rounded(random_values(rows * width, 2), dtype), ids = tokens();
    DeviceTensor weight(backend, dtype, {vocab, width}, table), out(backend, dtype, {rows, width}),
        token(backend, DType::i32, {rows}, ids);
    backend.embedding_forward(out, weight, token, {}, {});
    Values expected;
    for (double id : ids)
      expected.insert(expected.end(), table.begin() + int64_t(id) * width, table.begin() + int64_t(id) * width + width);
    CHECK(out.values() == expected);

    const DType sums = accumulation_dtype(dtype);
    const Values before = rounded(random_values(vocab * width, 4), sums);
    DeviceTensor dweight(backend, sums, {vocab, width}, before), gradient(backend, dtype, {rows, width}, dout);
    backend.embedding_backward(dweight, {}, gradient, token, {}, padding);
    Values added = before;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < width && int64_t(ids[r]) != padding; ++i) {
        double& to = added[static_cast<size_t>(int64_t(ids[r]) * width + i)];
        to = rounded(to + dout[r * width + i], sums);
      }
    CHECK(dweight.values() == added);
  });
}

TEST_CASE("embedding: without a table of tokens positions are added to what is there") {
  constexpr int64_t most = 11;
  each_device([](Backend& backend, DType dtype) {
    const DType sums = accumulation_dtype(dtype);
    const Values before = rounded(random_values(rows * width, 1), dtype),
                 learned = rounded(random_values(most * width, 5), dtype),
                 dout = rounded(random_values(rows * width, 2), dtype);
    Values at(rows);
    for (int64_t r = 0; r < rows; ++r) at[r] = static_cast<double>(r * r % most);
    DeviceTensor out(backend, dtype, {rows, width}, before), position_weight(backend, dtype, {most, width}, learned),
        position(backend, DType::i32, {rows}, at), gradient(backend, dtype, {rows, width}, dout),
        dposition(backend, sums, {most, width});
    backend.embedding_forward(out, {}, {}, position_weight, position);
    backend.embedding_backward({}, dposition, gradient, {}, position, -1);
    Values expected = before, added(most * width);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < width; ++i) {
        const int64_t from = int64_t(at[r]) * width + i;
        expected[r * width + i] = rounded(before[r * width + i] + learned[from], dtype);
        added[from] = rounded(added[from] + dout[r * width + i], sums);
      }
    CHECK(out.values() == expected);
    CHECK(dposition.values() == added);
  });
}

// A GPU sorts the rows by token: more rows than it takes at a time, tokens that differ in any of their three bytes.
TEST_CASE("embedding: thousands of rows, tokens of several bytes") {
  constexpr int64_t many = 2500, tall = 70000, narrow = 3;
  const Values some = {0, 1, 255, 256, 257, 4095, 65535, 65536, 65537, 66000, 69999};
  Values ids = random_values(many, 3, 0, 2);
  for (double& id : ids) id = id < 1 ? some[static_cast<size_t>(id * 11)] : std::floor((id - 1) * tall);
  each_device([&](Backend& backend, DType dtype) {
    const DType sums = accumulation_dtype(dtype);
    const Values dout = rounded(random_values(many * narrow, 2), dtype),
                 before = rounded(random_values(tall * narrow, 4), sums);
    DeviceTensor dweight(backend, sums, {tall, narrow}, before), gradient(backend, dtype, {many, narrow}, dout),
        token(backend, DType::i32, {many}, ids);
    backend.embedding_backward(dweight, {}, gradient, token, {}, padding);
    Values added = before;
    for (int64_t r = 0; r < many; ++r)
      for (int64_t i = 0; i < narrow && int64_t(ids[r]) != padding; ++i) {
        double& to = added[static_cast<size_t>(int64_t(ids[r]) * narrow + i)];
        to = rounded(to + dout[r * narrow + i], sums);
      }
    CHECK(dweight.values() == added);
  });
}

TEST_CASE("embedding: learned positions are added, and get the gradient of the rows at them") {
  constexpr int64_t most = 11;
  each_device([](Backend& backend, DType dtype) {
    const Values table = rounded(random_values(vocab * width, 1), dtype),
                 learned = rounded(random_values(most * width, 5), dtype),
                 dout = rounded(random_values(rows * width, 2), dtype), ids = tokens();
    Values at(rows);
    for (int64_t r = 0; r < rows; ++r) at[r] = static_cast<double>(r * r % most);
    DeviceTensor weight(backend, dtype, {vocab, width}, table), position_weight(backend, dtype, {most, width}, learned),
        out(backend, dtype, {rows, width}), token(backend, DType::i32, {rows}, ids),
        position(backend, DType::i32, {rows}, at);
    backend.embedding_forward(out, weight, token, position_weight, position);
    Values expected;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < width; ++i)
        expected.push_back(rounded(table[int64_t(ids[r]) * width + i] + learned[int64_t(at[r]) * width + i], dtype));
    CHECK(out.values() == expected);

    const DType sums = accumulation_dtype(dtype);
    const Values before = rounded(random_values(most * width, 4), sums);
    DeviceTensor dweight(backend, sums, {vocab, width}), alone(backend, sums, {vocab, width}),
        dlearned(backend, sums, {most, width}, before), gradient(backend, dtype, {rows, width}, dout);
    backend.embedding_backward(dweight, dlearned, gradient, token, position, padding);
    backend.embedding_backward(alone, {}, gradient, token, position, padding);
    CHECK(dweight.values() == alone.values());
    Values added = before;
    for (int64_t r = 0; r < rows; ++r)  // the padding token's rows too: their position is learned
      for (int64_t i = 0; i < width; ++i) {
        double& to = added[static_cast<size_t>(int64_t(at[r]) * width + i)];
        to = rounded(to + dout[r * width + i], sums);
      }
    CHECK(dlearned.values() == added);

    at[7] = most;
    DeviceTensor beyond(backend, DType::i32, {rows}, at);
    const auto forward = [&] { backend.embedding_forward(out, weight, token, position_weight, beyond); };
    const auto backward = [&] { backend.embedding_backward(dweight, dlearned, gradient, token, beyond, -1); };
    check_refuses([&] { forward(), backend.synchronize(); }, "embedding_forward", "position 7 is 11 of 11");
    check_refuses([&] { backward(), backend.synchronize(); }, "embedding_backward", "position 7 is 11 of 11");
    check_refuses([&] { backend.embedding_forward(out, weight, token, gradient, Tensor()); }, "embedding_forward",
                  "positions is [] ");
  });
}

TEST_CASE("embedding, scatter_add: the same bits, whatever the number of threads") {
  const int64_t many = 333, wide = 123, listed = 2 * many;
  Values ids(many), list(listed), first;
  for (int64_t r = 0; r < many; ++r) ids[r] = static_cast<double>(r * r % 37);  // a row of the table receives many
  for (int64_t r = 0; r < listed; ++r) list[r] = static_cast<double>(r * r % many);
  for (const int threads : {1, 2, 64}) {
    const auto backend = make_cpu_backend(threads);
    DeviceTensor dout(*backend, DType::bf16, {many, wide}, random_values(many * wide, 1)),
        din(*backend, DType::bf16, {listed, wide}, random_values(listed * wide, 2));
    DeviceTensor token(*backend, DType::i32, {many}, ids), at(*backend, DType::i32, {listed}, list),
        dweight(*backend, DType::f32, {vocab, wide});
    backend->embedding_backward(dweight, {}, dout, token, {}, -1);
    backend->scatter_add(dout, din, at);
    Values both = dweight.values();
    for (const double v : dout.values()) both.push_back(v);
    if (first.empty()) first = both;
    CHECK(both == first);
  }
}

TEST_CASE("embedding: refuses tokens and shapes it cannot look up") {
  each_device([](Backend& backend, DType dtype) {
    DeviceTensor weight(backend, dtype, {vocab, width}), out(backend, dtype, {2, width}),
        narrow(backend, dtype, {2, width - 1});
    DeviceTensor dweight(backend, accumulation_dtype(dtype), {vocab, width}), good(backend, DType::i32, {2}),
        three(backend, DType::i32, {3});
    DeviceTensor high(backend, DType::i32, {2}, Values{0, vocab}), low(backend, DType::i32, {2}, Values{0, -1});
    // A GPU says so at the next synchronisation.
    check_refuses([&] { backend.embedding_forward(out, weight, high, {}, {}), backend.synchronize(); },
                  "embedding_forward", "token 1 is 123 of 123");
    check_refuses([&] { backend.embedding_backward(dweight, {}, out, low, {}, -1), backend.synchronize(); },
                  "embedding_backward", "token 1 is -1");
    check_refuses([&] { backend.embedding_forward(narrow, weight, good, {}, {}); }, "embedding_forward", "[123, 36]");
    check_refuses([&] { backend.embedding_forward(out, weight, three, {}, {}); }, "embedding_forward", "[3] int32");
    check_refuses([&] { backend.embedding_backward(weight, {}, narrow, good, {}, -1); }, "embedding_backward", "table");
  });
}
