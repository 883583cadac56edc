#include "cuda/emulator/cublaslt.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <mutex>
#include <set>
#include <vector>

#include "cuda/emulator/product.h"
#include "cuda/emulator/stream.h"
#include "src/fail.h"

struct cublasLtContext {};
struct cublasLtMatrixLayoutOpaque_t {
  cudaDataType_t type;
  uint64_t rows, columns;
  int64_t leading;
};
struct cublasLtMatmulDescOpaque_t {
  cublasComputeType_t compute_type;
  cudaDataType_t scale_type;
  int32_t transpose_a = CUBLAS_OP_N, transpose_b = CUBLAS_OP_N;
  uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void* bias = nullptr;
};
struct cublasLtMatmulPreferenceOpaque_t {
  uint64_t workspace_bytes = 0;
  uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_MASK;
  uint32_t alignment[4] = {256, 256, 256, 256};  // of A, B, C, D
};

namespace orpo::emulator {

namespace {

thread_local std::string refusal;
std::mutex guard;
std::set<const void*> alive;
std::atomic<int64_t> heuristics{0};

template <class... Parts> cublasStatus_t refuse(cublasStatus_t status, const Parts&... parts) {
  refusal = concat(parts...);
  return status;
}
template <class... Parts> cublasStatus_t invalid(const Parts&... parts) {
  return refuse(CUBLAS_STATUS_INVALID_VALUE, parts...);
}
template <class... Parts> cublasStatus_t unsupported(const Parts&... parts) {
  return refuse(CUBLAS_STATUS_NOT_SUPPORTED, parts...);
}

// ---- handles and descriptors

bool lives(const void* what) {
  const std::lock_guard lock(guard);
  return alive.contains(what);
}
template <class T> cublasStatus_t give(T** to, T* made) {
  const std::lock_guard lock(guard);
  alive.insert(made);
  *to = made;
  return CUBLAS_STATUS_SUCCESS;
}
template <class T> cublasStatus_t destroy(T* what, const char* name) {
  {
    const std::lock_guard lock(guard);
    if (alive.erase(what) == 0) return invalid(name, " was destroyed before, or never made");
  }
  delete what;
  return CUBLAS_STATUS_SUCCESS;
}

template <class T> cublasStatus_t set(T& to, const char* what, const void* value, size_t bytes) {
  if (!value) return invalid(what, ": no value given");
  if (bytes != sizeof(T)) return invalid(what, " takes ", sizeof(T), " bytes, not ", bytes);
  std::memcpy(&to, value, sizeof(T));
  return CUBLAS_STATUS_SUCCESS;
}
template <class T>
cublasStatus_t set_one_of(std::initializer_list<T> allowed, T& to, const char* what, const void* value, size_t bytes) {
  T given;
  if (const cublasStatus_t status = set(given, what, value, bytes)) return status;
  if (std::find(allowed.begin(), allowed.end(), given) == allowed.end()) return invalid(what, " is ", given);
  to = given;
  return CUBLAS_STATUS_SUCCESS;
}

// ---- a product

using Layout = cublasLtMatrixLayoutOpaque_t;

uint32_t entry_bytes(const Layout& m) { return m.type == CUDA_R_16BF ? 2 : 4; }
int64_t extent(const Layout& m) {
  return (static_cast<int64_t>(m.columns - 1) * m.leading + static_cast<int64_t>(m.rows)) * entry_bytes(m);
}
bool equal(const Layout& x, const Layout& y) {
  return x.type == y.type && x.rows == y.rows && x.columns == y.columns && x.leading == y.leading;
}

struct Problem {
  const cublasLtMatmulDescOpaque_t* operation;
  const Layout *a, *b, *c, *d;

  int64_t rows() const { return static_cast<int64_t>(d->rows); }
  int64_t columns() const { return static_cast<int64_t>(d->columns); }
  int64_t depth() const { return static_cast<int64_t>(operation->transpose_a ? a->rows : a->columns); }
  bool has_bias() const { return operation->epilogue == CUBLASLT_EPILOGUE_BIAS; }

  // FNV-1a of all that an algorithm was chosen for.
  uint64_t fingerprint() const {
    uint64_t hash = 0xcbf29ce484222325u;
    const auto add = [&](auto value) { hash = (hash ^ static_cast<uint64_t>(value)) * 0x100000001b3u; };
    add(operation->compute_type), add(operation->scale_type), add(operation->transpose_a);
    add(operation->transpose_b), add(operation->epilogue);
    for (const Layout* m : {a, b, c, d}) add(m->type), add(m->rows), add(m->columns), add(m->leading);
    return hash;
  }
};

cublasStatus_t check_layout(const char* name, const Layout* m) {
  if (!lives(m)) return invalid("the layout of ", name, " was destroyed, or never made");
  constexpr uint64_t most = std::numeric_limits<int32_t>::max();
  if (m->rows == 0 || m->columns == 0 || m->rows > most || m->columns > most)
    return invalid(name, " is ", m->rows, " x ", m->columns);
  if (m->leading < static_cast<int64_t>(m->rows))
    return invalid(name, "'s leading dimension is ", m->leading, ", under its ", m->rows, " rows");
  return CUBLAS_STATUS_SUCCESS;
}

// The table of types that the manual gives for cublasLtMatmul.
bool types_supported(const Problem& p) {
  const cudaDataType_t in = p.a->type, out = p.d->type;
  return p.operation->compute_type == CUBLAS_COMPUTE_32F && p.operation->scale_type == CUDA_R_32F && p.b->type == in &&
         p.c->type == out &&
         ((in == CUDA_R_16BF && (out == CUDA_R_16BF || out == CUDA_R_32F)) || (in == CUDA_R_32F && out == CUDA_R_32F));
}

cublasStatus_t check_problem(cublasLtHandle_t handle, const Problem& p) {
  if (!lives(handle)) return refuse(CUBLAS_STATUS_NOT_INITIALIZED, "the handle was destroyed, or never made");
  if (!lives(p.operation)) return invalid("the operation's descriptor was destroyed, or never made");
  const std::pair<const char*, const Layout*> layouts[] = {{"A", p.a}, {"B", p.b}, {"C", p.c}, {"D", p.d}};
  for (const auto& [name, layout] : layouts)
    if (const cublasStatus_t status = check_layout(name, layout)) return status;
  if (!types_supported(p))
    return unsupported("no such combination of types: A ", p.a->type, ", B ", p.b->type, ", C ", p.c->type, ", D ",
                       p.d->type, ", scale ", p.operation->scale_type);
  const uint64_t m = p.operation->transpose_a ? p.a->columns : p.a->rows;
  const uint64_t k = p.operation->transpose_b ? p.b->columns : p.b->rows;
  const uint64_t n = p.operation->transpose_b ? p.b->rows : p.b->columns;
  if (k != static_cast<uint64_t>(p.depth())) return invalid("A's ", p.depth(), " columns meet B's ", k, " rows");
  for (const Layout* out : {p.c, p.d})
    if (out->rows != m || out->columns != n)
      return invalid(out == p.d ? "D" : "C", " is ", out->rows, " x ", out->columns, " where ", m, " x ", n,
                     " is needed");
  return CUBLAS_STATUS_SUCCESS;
}

// ---- algorithms

// What a cublasLtMatmulAlgo_t holds.
struct Algorithm {
  uint64_t mark, fingerprint;
  uint64_t alignment;  // of every matrix, in bytes; entries are aligned to themselves besides
  uint64_t workspace_bytes;
  Summation summation;
};
static_assert(sizeof(Algorithm) <= sizeof(cublasLtMatmulAlgo_t));
constexpr uint64_t made_by_heuristic = 0x6f72706f2d616c67u;

// What the heuristic offers, the fastest first: split-K where k is long, else one pass; on matrices aligned to 16 bytes
// in longer blocks.
std::vector<Algorithm> offers(const Problem& p, const cublasLtMatmulPreferenceOpaque_t& preference) {
  const Layout* matrices[4] = {p.a, p.b, p.c, p.d};
  bool wide = true;
  for (int i = 0; i < 4; ++i) {
    if (preference.alignment[i] < entry_bytes(*matrices[i])) return {};
    wide = wide && preference.alignment[i] >= 16 && matrices[i]->leading * entry_bytes(*matrices[i]) % 16 == 0;
  }
  const int64_t block = wide ? 64 : 16;
  const uint64_t alignment = wide ? 16 : 1;
  std::vector<Algorithm> list;
  const auto offer = [&](uint64_t workspace_bytes, int64_t splits, bool in_place) {
    if (workspace_bytes <= preference.workspace_bytes)
      list.push_back({made_by_heuristic, p.fingerprint(), alignment, workspace_bytes, {block, splits, in_place}});
  };
  if (p.depth() >= 128) {
    const uint64_t sums = static_cast<uint64_t>(2 * p.rows() * p.columns()) * sizeof(float);
    if (preference.reductions & CUBLASLT_REDUCTION_SCHEME_INPLACE) offer(sizeof(int32_t), 2, true);
    if (preference.reductions & CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE) offer(sums, 2, false);
  }
  offer(0, 1, false);
  return list;
}

// ---- what a call is given

struct Region {
  const char* name;
  const void* memory;
  int64_t bytes;
  uint32_t entry_bytes = 1;
  bool meets(const Region& other) const {
    const char *x = static_cast<const char*>(memory), *y = static_cast<const char*>(other.memory);
    return bytes > 0 && other.bytes > 0 && x < y + other.bytes && y < x + bytes;
  }
};

cublasStatus_t check_memory(const Problem& p, const Algorithm& algorithm, const Region (&matrices)[4],
                            const Region& workspace, bool reads_c) {
  const Region& d = matrices[3];
  const Region bias{"the bias", p.operation->bias, p.has_bias() ? p.rows() * entry_bytes(*p.d) : 0};
  for (const Region& m : matrices) {
    if (!m.memory) return invalid(m.name, " is null");
    const uint64_t alignment = std::max<uint64_t>(algorithm.alignment, m.entry_bytes);
    if (reinterpret_cast<uintptr_t>(m.memory) % alignment)
      return unsupported(m.name, " is not aligned to ", alignment, " bytes, as the algorithm needs");
    if (!is_device_memory(m.memory, static_cast<size_t>(m.bytes)))
      return invalid(m.name, "'s ", m.bytes, " bytes are not the device's");
  }
  if (p.has_bias() && !bias.memory) return invalid("the bias is null");
  // The heuristic takes no notice of it, a GPU's kernel faults.
  if (p.has_bias() && reinterpret_cast<uintptr_t>(bias.memory) % 16)
    return unsupported("the bias is not aligned to 16 bytes");
  if (reinterpret_cast<uintptr_t>(workspace.memory) % 16) return invalid("the workspace is not aligned to 16 bytes");
  if (algorithm.workspace_bytes > static_cast<uint64_t>(workspace.memory ? workspace.bytes : 0))
    return invalid("the workspace has ", workspace.memory ? workspace.bytes : 0, " bytes where the algorithm needs ",
                   algorithm.workspace_bytes);
  for (const Region* m : {&bias, &workspace})
    if (m->memory && m->bytes && !is_device_memory(m->memory, static_cast<size_t>(m->bytes)))
      return invalid(m->name, "'s ", m->bytes, " bytes are not the device's");
  for (const Region* other : {&matrices[0], &matrices[1], &bias, &workspace})
    if (d.meets(*other)) return invalid("D lies over ", other->name);
  const Region& c = matrices[2];
  if (c.memory == d.memory && !equal(*p.c, *p.d)) return invalid("C is D in place, with another layout");
  if (reads_c && c.memory != d.memory && d.meets(c)) return invalid("D lies over a part of C");
  return CUBLAS_STATUS_SUCCESS;
}

ColumnMajor matrix(const Layout& m, const void* data, bool transposed = false) {
  return {const_cast<void*>(data),
          m.type == CUDA_R_16BF,
          static_cast<int64_t>(m.rows),
          static_cast<int64_t>(m.columns),
          m.leading,
          transposed};
}

}  // namespace

const std::string& cublaslt_refusal() { return refusal; }
CublasLtCounts cublaslt_counts() {
  const std::lock_guard lock(guard);
  return {static_cast<int64_t>(alive.size()), heuristics};
}

}  // namespace orpo::emulator

using namespace orpo::emulator;

const char* cublasLtGetStatusName(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
  }
  return "unknown";
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) { return give(handle, new cublasLtContext); }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return destroy(handle, "the handle"); }

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t leading_dimension) {
  return give(layout, new cublasLtMatrixLayoutOpaque_t{type, rows, columns, leading_dimension});
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return destroy(layout, "the layout"); }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* operation, cublasComputeType_t compute_type,
                                        cudaDataType_t scale_type) {
  return give(operation, new cublasLtMatmulDescOpaque_t{compute_type, scale_type});
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t operation) {
  return destroy(operation, "the operation's descriptor");
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  if (!lives(operation)) return invalid("the operation's descriptor was destroyed, or never made");
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return set_one_of<int32_t>({CUBLAS_OP_N, CUBLAS_OP_T}, operation->transpose_a, "TRANSA", value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB:
      return set_one_of<int32_t>({CUBLAS_OP_N, CUBLAS_OP_T}, operation->transpose_b, "TRANSB", value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return set_one_of<uint32_t>({CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS}, operation->epilogue, "EPILOGUE",
                                  value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      return set(operation->bias, "BIAS_POINTER", value, bytes);
  }
  return invalid("no such attribute of an operation: ", static_cast<int>(attribute));
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  return give(preference, new cublasLtMatmulPreferenceOpaque_t);
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  return destroy(preference, "the preference");
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                    size_t bytes) {
  if (!lives(preference)) return invalid("the preference was destroyed, or never made");
  switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
      return set(preference->workspace_bytes, "MAX_WORKSPACE_BYTES", value, bytes);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
      return set_one_of<uint32_t>({0, 1, 2, 3, 4, 5, 6, 7}, preference->reductions, "REDUCTION_SCHEME_MASK", value,
                                  bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
      return set_one_of<uint32_t>({1, 2, 4, 8, 16, 32, 64, 128, 256},
                                  preference->alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES],
                                  "MIN_ALIGNMENT", value, bytes);
  }
  return invalid("no such attribute of a preference: ", static_cast<int>(attribute));
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t results[], int* returned) {
  *returned = 0;
  ++heuristics;
  const Problem problem{operation, a, b, c, d};
  if (const cublasStatus_t status = check_problem(handle, problem)) return status;
  if (!lives(preference)) return invalid("the preference was destroyed, or never made");
  if (requested <= 0) return invalid(requested, " algorithms asked for");
  for (const Algorithm& algorithm : offers(problem, *preference)) {
    if (*returned == requested) break;
    cublasLtMatmulHeuristicResult_t& result = results[(*returned)++];
    result = {};
    std::memcpy(&result.algo, &algorithm, sizeof algorithm);
    result.workspaceSize = algorithm.workspace_bytes;
    result.state = CUBLAS_STATUS_SUCCESS;
  }
  if (*returned == 0) return unsupported("no algorithm does with so little alignment");
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                              const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algo, void* workspace,
                              size_t workspace_bytes, cudaStream_t stream) {
  const Problem problem{operation, a_layout, b_layout, c_layout, d_layout};
  if (const cublasStatus_t status = check_problem(handle, problem)) return status;
  if (!alpha || !beta) return invalid("alpha or beta is null");
  const float scale = *static_cast<const float*>(alpha), kept = *static_cast<const float*>(beta);
  Algorithm algorithm{};
  if (algo) std::memcpy(&algorithm, algo, sizeof algorithm);
  if (algorithm.mark != made_by_heuristic) return invalid("the algorithm does not come from the heuristic");
  if (algorithm.fingerprint != problem.fingerprint()) return invalid("the algorithm was chosen for another product");
  const Region matrices[4] = {{"A", a, extent(*a_layout), entry_bytes(*a_layout)},
                              {"B", b, extent(*b_layout), entry_bytes(*b_layout)},
                              {"C", c, extent(*c_layout), entry_bytes(*c_layout)},
                              {"D", d, extent(*d_layout), entry_bytes(*d_layout)}};
  const Region given{"the workspace", workspace, static_cast<int64_t>(workspace_bytes)};
  if (const cublasStatus_t status = check_memory(problem, algorithm, matrices, given, kept != 0)) return status;
  const ColumnMajorProduct product{matrix(*a_layout, a, operation->transpose_a == CUBLAS_OP_T),
                                   matrix(*b_layout, b, operation->transpose_b == CUBLAS_OP_T),
                                   matrix(*c_layout, c),
                                   matrix(*d_layout, d),
                                   scale,
                                   kept,
                                   problem.has_bias() ? operation->bias : nullptr,
                                   algorithm.summation};
  enqueue(
      stream,
      [product, workspace, used = algorithm.workspace_bytes] {
        if (used) std::memset(workspace, 0xff, used);  // NaN: it is no place for anything else
        product.run();
      },
      "cublasLtMatmul");
  return CUBLAS_STATUS_SUCCESS;
}
