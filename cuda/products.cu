#include "cuda/gpu.cuh"
#include "cuda/products.h"

// cuBLASLt's matrices are column-major: a row-major matrix, read by columns, is its own transpose, the pitch of its
// rows the leading dimension. So out = a . b is asked for as out^T = b^T . a^T: b comes first, a second, and a matrix
// that is to be transposed still is. A bias has an entry for each of out's columns: those are rows there, as cuBLASLt
// wants it.

namespace orpo {

namespace {

// A step has some 20 shapes for each row count, and row counts vary from one micro-batch to the next.
constexpr size_t most_plans = 256;

cudaDataType_t type_of(DType dtype) { return dtype == DType::bf16 ? CUDA_R_16BF : CUDA_R_32F; }

// Algorithms ask for entries moved 16 bytes at a time; what is aligned to 256 is no better, and layers of one shape
// should share a plan.
uint32_t alignment_of(const Tensor& x) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(x.data);
  uint32_t alignment = 16;
  while (address % alignment) alignment /= 2;
  return alignment;
}

std::string text_of(const Product& p) {
  return concat(p.accumulate ? "added to " : "into ", shape_text(p.out), " of ", shape_text(p.a),
                p.transpose_a ? " transposed" : "", " and ", shape_text(p.b), p.transpose_b ? " transposed" : "",
                p.bias ? " with a bias" : "");
}

void check(cublasStatus_t status, const Product& p, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS)
    fail_machine(p.operation, ": ", call, " for a product ", text_of(p), ": ", cublasLtGetStatusName(status));
}

}  // namespace

MatrixProducts::MatrixProducts() {
  cublasLtHandle_t handle = nullptr;
  if (const cublasStatus_t status = cublasLtCreate(&handle); status != CUBLAS_STATUS_SUCCESS)
    fail_machine("cuBLASLt does not start: ", cublasLtGetStatusName(status));
  handle_.reset(handle);
  workspace_ = gpu_allocate(workspace_bytes);
}

MatrixProducts::~MatrixProducts() { gpu_release(workspace_); }

MatrixProducts::Plan MatrixProducts::make_plan(const Product& p) const {
  Plan plan;
  const auto layout = [&](Owned<cublasLtMatrixLayout_t>& to, const Tensor& x) {
    cublasLtMatrixLayout_t made = nullptr;
    check(cublasLtMatrixLayoutCreate(&made, type_of(x.dtype), static_cast<uint64_t>(x.columns()),
                                     static_cast<uint64_t>(x.rows()), x.pitch()),
          p, "cublasLtMatrixLayoutCreate");
    to.reset(made);
  };
  layout(plan.a, p.a), layout(plan.b, p.b), layout(plan.out, p.out);

  cublasLtMatmulDesc_t operation = nullptr;  // fp32 is the parity mode: no TF32
  check(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), p, "cublasLtMatmulDescCreate");
  plan.operation.reset(operation);
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
    check(cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof value), p,
          "cublasLtMatmulDescSetAttribute");
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, static_cast<int32_t>(p.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N));
  set(CUBLASLT_MATMUL_DESC_TRANSB, static_cast<int32_t>(p.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N));
  if (p.bias) {
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<uint32_t>(CUBLASLT_EPILOGUE_BIAS));
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(p.bias.data));
  }

  cublasLtMatmulPreference_t made = nullptr;
  check(cublasLtMatmulPreferenceCreate(&made), p, "cublasLtMatmulPreferenceCreate");
  const Owned<cublasLtMatmulPreference_t> preference(made);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    check(cublasLtMatmulPreferenceSetAttribute(made, attribute, &value, sizeof value), p,
          "cublasLtMatmulPreferenceSetAttribute");
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes);
  // Sums that are split meet in the workspace, in fp32, in a step of their own: the same bits every time.
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(p.b));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(p.a));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(p.out));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(p.out));
  cublasLtMatmulHeuristicResult_t result{};
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle_.get(), operation, plan.b.get(), plan.a.get(), plan.out.get(), plan.out.get(), made, 1, &result, &count);
  if (status != CUBLAS_STATUS_NOT_SUPPORTED) check(status, p, "cublasLtMatmulAlgoGetHeuristic");
  plan.found = status == CUBLAS_STATUS_SUCCESS && count > 0 && result.state == CUBLAS_STATUS_SUCCESS;
  plan.algorithm = result.algo;
  return plan;
}

const MatrixProducts::Plan& MatrixProducts::plan(const Product& p) {
  const Key key{p.out.rows(),  p.out.columns(), p.out.pitch(), int64_t(p.out.dtype), alignment_of(p.out),
                p.a.rows(),    p.a.columns(),   p.a.pitch(),   int64_t(p.a.dtype),   alignment_of(p.a),
                p.transpose_a, p.transpose_b,   p.b.pitch(),   alignment_of(p.b),    bool(p.bias)};
  if (const auto found = plans_.find(key); found != plans_.end()) return found->second;
  if (plans_.size() >= most_plans) plans_.clear();
  return plans_.emplace(key, make_plan(p)).first->second;
}

// The heuristic is told nothing of a bias's alignment, and its kernels read 16 bytes at a time; nor does it convert
// one.
bool MatrixProducts::fuses(const Product& p) {
  return (!p.bias || (p.bias.dtype == p.out.dtype && alignment_of(p.bias) == 16)) && plan(p).found;
}

void MatrixProducts::run(const Product& p, GpuStream stream) {
  const Plan& chosen = plan(p);
  check(chosen.found ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED, p, "cublasLtMatmulAlgoGetHeuristic");
  if (p.bias) {
    const void* bias = p.bias.data;
    check(cublasLtMatmulDescSetAttribute(chosen.operation.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias),
          p, "cublasLtMatmulDescSetAttribute");
  }
  const float one = 1, kept = p.accumulate ? 1 : 0;
  check(cublasLtMatmul(handle_.get(), chosen.operation.get(), &one, p.b.data, chosen.b.get(), p.a.data, chosen.a.get(),
                       &kept, p.out.data, chosen.out.get(), p.out.data, chosen.out.get(), &chosen.algorithm, workspace_,
                       workspace_bytes, stream),
        p, "cublasLtMatmul");
}

}  // namespace orpo
