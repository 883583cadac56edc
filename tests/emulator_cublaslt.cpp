// The stand-in of cuBLASLt: it computes what the manual says, and refuses each misuse with a status and the reason.
#include "cuda/emulator/cublaslt.h"
#include "cuda/emulator/stream.h"
#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

constexpr int64_t m = 24, n = 9, k = 16;

struct Matrix {
  cudaDataType type;
  uint64_t rows, columns;
  int64_t leading;
};

// D[24, 9] = A[16, 24]^T . B[16, 9] in bf16 with a bias: a call with nothing wrong. A test changes what it likes
// between made(), which makes descriptors, ask() and multiply().
struct Call {
  std::unique_ptr<Backend> backend = make_emulated_backend({});
  static constexpr int64_t entries = 1024;
  DeviceTensor memory_a{*backend, DType::bf16, {entries}, random_values(entries, 1)},
      memory_b{*backend, DType::bf16, {entries}, random_values(entries, 2)},
      memory_c{*backend, DType::bf16, {entries}, random_values(entries, 3)},
      memory_d{*backend, DType::bf16, {entries}, 7}, memory_bias{*backend, DType::bf16, {entries}, 1},
      memory_workspace{*backend, DType::f32, {4096}};
  Matrix a{CUDA_R_16BF, k, m, k}, b{CUDA_R_16BF, k, n, k}, c{CUDA_R_16BF, m, n, m}, d{CUDA_R_16BF, m, n, m};
  cudaDataType scale = CUDA_R_32F;
  int32_t transpose_a = CUBLAS_OP_T, transpose_b = CUBLAS_OP_N;
  uint32_t epilogue = CUBLASLT_EPILOGUE_BIAS, alignment = 16;
  uint64_t workspace_asked = 4096 * 4;
  size_t workspace_bytes = 4096 * 4;
  int wanted = 4, found = 0;
  float alpha = 1, beta = 0;
  const void *at_a = (*memory_a).data, *at_b = (*memory_b).data, *at_c = (*memory_c).data, *bias = (*memory_bias).data;
  void *at_d = (*memory_d).data, *workspace = (*memory_workspace).data;
  const float *alpha_at = &alpha, *beta_at = &beta;

  cublasLtHandle_t handle = nullptr;
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t layout_a = nullptr, layout_b = nullptr, layout_c = nullptr, layout_d = nullptr;
  cublasLtMatmulPreference_t preference = nullptr;
  cublasLtMatmulHeuristicResult_t results[4] = {};
  const cublasLtMatmulAlgo_t* algorithm = &results[0].algo;

  Call() = default;
  Call(const Call&) = delete;
  ~Call() {
    cublasLtDestroy(handle), cublasLtMatmulDescDestroy(operation), cublasLtMatmulPreferenceDestroy(preference);
    for (const auto layout : {layout_a, layout_b, layout_c, layout_d}) cublasLtMatrixLayoutDestroy(layout);
  }

  static void make(cublasLtMatrixLayout_t& layout, const Matrix& x) {
    cublasLtMatrixLayoutDestroy(layout);
    REQUIRE(cublasLtMatrixLayoutCreate(&layout, x.type, x.rows, x.columns, x.leading) == CUBLAS_STATUS_SUCCESS);
  }
  template <class T> cublasStatus_t set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    return cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof value);
  }
  template <class T> cublasStatus_t prefer(cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
    return cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value);
  }
  void made() {
    backend->synchronize();  // what it uploads is on another stream than the product
    REQUIRE(cublasLtCreate(&handle) == CUBLAS_STATUS_SUCCESS);
    make(layout_a, a), make(layout_b, b), make(layout_c, c), make(layout_d, d);
    REQUIRE(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, scale) == CUBLAS_STATUS_SUCCESS);
    REQUIRE(set(CUBLASLT_MATMUL_DESC_TRANSA, transpose_a) == CUBLAS_STATUS_SUCCESS);
    REQUIRE(set(CUBLASLT_MATMUL_DESC_TRANSB, transpose_b) == CUBLAS_STATUS_SUCCESS);
    REQUIRE(set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue) == CUBLAS_STATUS_SUCCESS);
    REQUIRE(set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias) == CUBLAS_STATUS_SUCCESS);
    REQUIRE(cublasLtMatmulPreferenceCreate(&preference) == CUBLAS_STATUS_SUCCESS);
    REQUIRE(prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_asked) == CUBLAS_STATUS_SUCCESS);
    for (const auto attribute :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
      REQUIRE(prefer(attribute, alignment) == CUBLAS_STATUS_SUCCESS);
  }
  cublasStatus_t ask() {
    return cublasLtMatmulAlgoGetHeuristic(handle, operation, layout_a, layout_b, layout_c, layout_d, preference, wanted,
                                          results, &found);
  }
  cublasStatus_t multiply() {
    const cublasStatus_t status =
        cublasLtMatmul(handle, operation, alpha_at, at_a, layout_a, at_b, layout_b, beta_at, at_c, layout_c, at_d,
                       layout_d, algorithm, workspace, workspace_bytes, nullptr);
    emulator::wait_for_everything();
    return status;
  }
};

struct Misuse {
  const char* reason;  // in the refusal
  cublasStatus_t status;
  void (*before)(Call&);  // descriptors are made
  void (*after)(Call&);   // the heuristic was asked
};
constexpr auto invalid = CUBLAS_STATUS_INVALID_VALUE, unsupported = CUBLAS_STATUS_NOT_SUPPORTED;
template <class T> T* shifted(T* pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(pointer) + bytes;
}

// What the heuristic refuses already, and cublasLtMatmul would.
const Misuse misuses_of_both[] = {
    {"A's leading dimension is 15, under its 16 rows", invalid, [](Call& x) { x.a.leading = 15; }, nullptr},
    {"D's leading dimension is 23, under its 24 rows", invalid, [](Call& x) { x.d.leading = 23; }, nullptr},
    {"B is 16 x 0", invalid, [](Call& x) { x.b.columns = 0; }, nullptr},
    {"A is 16 x 4294967296", invalid, [](Call& x) { x.a.columns = uint64_t{1} << 32; }, nullptr},
    {"A's 16 columns meet B's 17 rows", invalid, [](Call& x) { x.b.rows = x.b.leading = 17; }, nullptr},
    {"A's 24 columns meet B's 16 rows", invalid, [](Call& x) { x.transpose_a = CUBLAS_OP_N; }, nullptr},
    {"D is 24 x 8 where 24 x 9 is needed", invalid, [](Call& x) { x.d.columns = 8; }, nullptr},
    {"C is 23 x 9 where 24 x 9 is needed", invalid, [](Call& x) { x.c.rows = 23; }, nullptr},
    {"no such combination of types: A 14, B 0", unsupported, [](Call& x) { x.b.type = CUDA_R_32F; }, nullptr},
    {"C 0, D 14", unsupported, [](Call& x) { x.c.type = CUDA_R_32F; }, nullptr},
    {"A 0, B 0, C 14, D 14", unsupported, [](Call& x) { x.a.type = x.b.type = CUDA_R_32F; }, nullptr},
    {"scale 14", unsupported, [](Call& x) { x.scale = CUDA_R_16BF; }, nullptr},
};

const Misuse misuses_of_the_heuristic[] = {
    {"0 algorithms asked for", invalid, [](Call& x) { x.wanted = 0; }, nullptr},
    {"no algorithm does with so little alignment", unsupported, [](Call& x) { x.alignment = 1; }, nullptr},
};

void ask_again_for(Call& x, int64_t more_columns) {
  const auto kept = x.layout_d;
  x.layout_d = nullptr;
  x.make(x.layout_d, {x.d.type, x.d.rows, x.d.columns, x.d.leading + more_columns});
  CHECK(x.ask() == CUBLAS_STATUS_SUCCESS);
  cublasLtMatrixLayoutDestroy(x.layout_d);
  x.layout_d = kept;
}

const Misuse misuses_of_the_product[] = {
    {"the handle was destroyed, or never made", CUBLAS_STATUS_NOT_INITIALIZED, nullptr,
     [](Call& x) { cublasLtDestroy(x.handle); }},
    {"the operation's descriptor was destroyed", invalid, nullptr,
     [](Call& x) { cublasLtMatmulDescDestroy(x.operation); }},
    {"the layout of B was destroyed", invalid, nullptr, [](Call& x) { cublasLtMatrixLayoutDestroy(x.layout_b); }},
    {"alpha or beta is null", invalid, nullptr, [](Call& x) { x.beta_at = nullptr; }},
    {"the algorithm does not come from the heuristic", invalid, nullptr, [](Call& x) { x.algorithm = nullptr; }},
    {"the algorithm does not come from the heuristic", invalid, nullptr, [](Call& x) { x.results[0] = {}; }},
    {"the algorithm was chosen for another product", invalid, nullptr, [](Call& x) { ask_again_for(x, 8); }},
    {"the algorithm was chosen for another product", invalid, nullptr,
     [](Call& x) { x.set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t{CUBLASLT_EPILOGUE_DEFAULT}); }},
    {"A's 768 bytes are not the device's", invalid, nullptr,
     [](Call& x) {
       alignas(16) static char host[768];
       x.at_a = host;
     }},
    {"the workspace's 16448 bytes are not the device's", invalid, nullptr, [](Call& x) { x.workspace_bytes += 64; }},
    {"A is null", invalid, nullptr, [](Call& x) { x.at_a = nullptr; }},
    {"D is null", invalid, nullptr, [](Call& x) { x.at_d = nullptr; }},
    {"A is not aligned to 16 bytes, as the algorithm needs", unsupported, nullptr,
     [](Call& x) { x.at_a = shifted(x.at_a, 2); }},
    {"D is not aligned to 16 bytes, as the algorithm needs", unsupported, nullptr,
     [](Call& x) { x.at_d = shifted(x.at_d, 8); }},
    {"B is not aligned to 2 bytes", unsupported, [](Call& x) { x.alignment = 2; },
     [](Call& x) { x.at_b = shifted(x.at_b, 1); }},
    {"the bias is null", invalid, nullptr,
     [](Call& x) { x.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(nullptr)); }},
    {"the bias is not aligned to 16 bytes", unsupported, nullptr,
     [](Call& x) { x.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, shifted(x.bias, 4)); }},
    {"the workspace is not aligned to 16 bytes", invalid, nullptr,
     [](Call& x) { x.workspace = shifted(x.workspace, 4); }},
    {"D lies over A", invalid, nullptr, [](Call& x) { x.at_d = const_cast<void*>(x.at_a); }},
    {"D lies over B", invalid, nullptr, [](Call& x) { x.at_d = const_cast<void*>(shifted(x.at_b, 16)); }},
    {"D lies over the bias", invalid, nullptr, [](Call& x) { x.at_d = const_cast<void*>(x.bias); }},
    {"D lies over the workspace", invalid, nullptr, [](Call& x) { x.at_d = x.workspace; }},
    {"C is D in place, with another layout", invalid, [](Call& x) { x.c.leading = 32; },
     [](Call& x) { x.at_c = x.at_d; }},
    {"D lies over a part of C", invalid, nullptr, [](Call& x) { x.at_c = shifted(x.at_d, 16), x.beta = 1; }},
};

}  // namespace

TEST_CASE("emulator: cublaslt: alpha * op(A) . op(B) + beta * C + bias, column by column") {
  for (const float beta : {0.0f, 1.0f})
    for (const bool with_bias : {false, true}) {
      Call x;
      x.beta = beta, x.alpha = 2;
      if (!with_bias) x.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
      x.d.leading = x.c.leading = m;
      x.made();
      REQUIRE(x.ask() == CUBLAS_STATUS_SUCCESS);
      REQUIRE(x.multiply() == CUBLAS_STATUS_SUCCESS);
      const Values a = x.memory_a.values(), b = x.memory_b.values(), c = x.memory_c.values();
      Values expected;
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < m; ++i) {
          double sum = 0;
          for (int64_t l = 0; l < k; ++l) sum += a[l + i * k] * b[l + j * k];
          expected.push_back(2 * sum + beta * c[i + j * m] + (with_bias ? 1 : 0));
        }
      Values d = x.memory_d.values();
      CHECK(std::vector(d.begin() + m * n, d.end()) == Values(x.entries - m * n, 7.0));
      d.resize(expected.size());
      CHECK(largest_error(d, expected) <= 0.5 * spacing(DType::bf16) * largest(expected));
    }
}

TEST_CASE("emulator: cublaslt: every misuse is refused with its reason") {
  const auto refused = [](const Misuse& misuse, Call& x, cublasStatus_t status) {
    INFO("looked for: ", std::string(misuse.reason), "\nsaid: ", emulator::cublaslt_refusal());
    CHECK(status == misuse.status);
    CHECK(emulator::cublaslt_refusal().find(misuse.reason) != std::string::npos);
    for (double v : x.memory_d.values()) CHECK(v == 7);
  };
  for (const Misuse& misuse : misuses_of_both) {
    Call x;
    misuse.before(x);
    x.made();
    refused(misuse, x, x.ask());
    CHECK(x.found == 0);
    refused(misuse, x, x.multiply());
  }
  for (const Misuse& misuse : misuses_of_the_heuristic) {
    Call x;
    misuse.before(x);
    x.made();
    refused(misuse, x, x.ask());
  }
  for (const Misuse& misuse : misuses_of_the_product) {
    Call x;
    if (misuse.before) misuse.before(x);
    x.made();
    REQUIRE(x.ask() == CUBLAS_STATUS_SUCCESS);
    misuse.after(x);
    refused(misuse, x, x.multiply());
  }
}

TEST_CASE("emulator: cublaslt: attributes take their own sizes and values") {
  Call x;
  x.made();
  const auto refused = [](cublasStatus_t status, const std::string& reason) {
    INFO("looked for: ", reason, "\nsaid: ", emulator::cublaslt_refusal());
    CHECK(status == invalid);
    CHECK(emulator::cublaslt_refusal().find(reason) != std::string::npos);
  };
  refused(x.set(CUBLASLT_MATMUL_DESC_TRANSA, int64_t{1}), "TRANSA takes 4 bytes, not 8");
  refused(x.set(CUBLASLT_MATMUL_DESC_TRANSB, int32_t{7}), "TRANSB is 7");
  refused(x.set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t{5}), "EPILOGUE is 5");
  refused(x.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, uint32_t{0}), "BIAS_POINTER takes 8 bytes, not 4");
  refused(x.set(static_cast<cublasLtMatmulDescAttributes_t>(0), int32_t{68}), "no such attribute of an operation");
  refused(cublasLtMatmulDescSetAttribute(x.operation, CUBLASLT_MATMUL_DESC_TRANSA, nullptr, 4), "no value given");
  refused(x.prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint32_t{1}), "MAX_WORKSPACE_BYTES takes 8 bytes, not 4");
  refused(x.prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32_t{8}), "REDUCTION_SCHEME_MASK is 8");
  refused(x.prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, uint32_t{24}), "MIN_ALIGNMENT is 24");
  refused(x.prefer(static_cast<cublasLtMatmulPreferenceAttributes_t>(0), uint32_t{0}), "no such attribute");
  CHECK(cublasLtMatmulDescDestroy(x.operation) == CUBLAS_STATUS_SUCCESS);
  refused(cublasLtMatmulDescDestroy(x.operation), "destroyed before");
  refused(x.set(CUBLASLT_MATMUL_DESC_TRANSA, int32_t{0}), "was destroyed, or never made");
}

TEST_CASE("emulator: cublaslt: what the heuristic offers depends on workspace, reductions and alignment") {
  const auto offered = [](uint64_t workspace, uint32_t reductions, uint32_t alignment) {
    Call x;  // only layouts: a long sum
    x.a = {CUDA_R_16BF, 512, m, 512}, x.b = {CUDA_R_16BF, 512, n, 512};
    x.workspace_asked = workspace, x.alignment = alignment;
    x.made();
    REQUIRE(x.prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions) == CUBLAS_STATUS_SUCCESS);
    REQUIRE(x.ask() == CUBLAS_STATUS_SUCCESS);
    std::vector<size_t> workspaces;
    for (int i = 0; i < x.found; ++i) workspaces.push_back(x.results[i].workspaceSize);
    return workspaces;
  };
  const size_t sums = 2 * m * n * 4;
  CHECK(offered(0, CUBLASLT_REDUCTION_SCHEME_MASK, 16) == std::vector<size_t>{0});
  CHECK(offered(sums - 1, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, 16) == std::vector<size_t>{0});
  CHECK(offered(sums, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, 16) == std::vector<size_t>{sums, 0});
  CHECK(offered(sums, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, 2) == std::vector<size_t>{sums, 0});
  CHECK(offered(sums, CUBLASLT_REDUCTION_SCHEME_NONE, 16) == std::vector<size_t>{0});
  CHECK(offered(sums, CUBLASLT_REDUCTION_SCHEME_MASK, 16) == std::vector<size_t>{4, sums, 0});
}

TEST_CASE("emulator: cublaslt: a workspace too small for the algorithm is refused; sums that meet in D differ") {
  const int64_t depth = 512;
  Call x;
  DeviceTensor long_a(*x.backend, DType::bf16, {m, depth}, random_values(m * depth, 1)),
      long_b(*x.backend, DType::bf16, {n, depth}, random_values(n * depth, 2));
  x.a = {CUDA_R_16BF, depth, m, depth}, x.b = {CUDA_R_16BF, depth, n, depth};
  x.at_a = (*long_a).data, x.at_b = (*long_b).data;
  x.made();
  REQUIRE(x.ask() == CUBLAS_STATUS_SUCCESS);
  REQUIRE(x.found == 3);
  // In place, in whatever order: not the same every time.
  std::vector<Values> results;
  for (int i = 0; i < 2; ++i) {
    REQUIRE(x.multiply() == CUBLAS_STATUS_SUCCESS);
    results.push_back(x.memory_d.values());
  }
  CHECK(results[0] != results[1]);
  x.algorithm = &x.results[1].algo;
  x.workspace_bytes = x.results[1].workspaceSize;
  for (int i = 0; i < 2; ++i) {
    REQUIRE(x.multiply() == CUBLAS_STATUS_SUCCESS);
    results.push_back(x.memory_d.values());
  }
  CHECK(results[2] == results[3]);
  x.workspace_bytes -= 1;
  CHECK(x.multiply() == invalid);
  CHECK(emulator::cublaslt_refusal() == "the workspace has 1727 bytes where the algorithm needs 1728");
  x.workspace = nullptr;
  CHECK(x.multiply() == invalid);
}

TEST_CASE("emulator: cublaslt: plans are used again, are bounded in number, and go with the backend") {
  const int64_t before = emulator::cublaslt_counts().alive;
  {
    const auto backend = make_emulated_backend({});
    const int64_t rows = 400, width = 4;
    DeviceTensor in(*backend, DType::f32, {rows, width}, random_values(rows * width, 1)),
        weight(*backend, DType::f32, {3, width}, random_values(3 * width, 2)), out(*backend, DType::f32, {rows, 3});
    const auto multiply = [&](int64_t some) {
      const int64_t asked = emulator::cublaslt_counts().heuristics;
      backend->linear_forward((*out).slice(0, some), (*in).slice(0, some), weight, Tensor());
      return emulator::cublaslt_counts().heuristics - asked;
    };
    CHECK(multiply(7) == 1);
    CHECK(multiply(7) == 0);
    CHECK(multiply(8) == 1);
    CHECK(multiply(7) == 0);
    for (int64_t some = 1; some <= rows; ++some) multiply(some);
    CHECK(emulator::cublaslt_counts().alive - before <= 1 + 4 * 256);
    CHECK(multiply(7) == 1);
    CHECK(multiply(7) == 0);
  }
  CHECK(emulator::cublaslt_counts().alive == before);
}

TEST_CASE("emulator: cublaslt: a refused product names operation, shapes and status") {
  const auto backend = make_emulated_backend({});
  DeviceTensor in(*backend, DType::f32, {3, 5}), weight(*backend, DType::f32, {4, 5}),
      out(*backend, DType::f32, {3, 4});
  Tensor crooked = *in;
  crooked.data = static_cast<char*>(crooked.data) + 2;
  CHECK_THROWS_WITH_AS(
      backend->linear_forward(out, crooked, weight, Tensor()),
      "linear_forward: cublasLtMatmulAlgoGetHeuristic for a product into [3, 4] fp32 of [3, 5] fp32 and "
      "[4, 5] fp32 transposed: CUBLAS_STATUS_NOT_SUPPORTED",
      MachineError);
}
