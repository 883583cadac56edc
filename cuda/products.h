// Matrix products by cuBLASLt. A plan - descriptors and the algorithm that the heuristic chose - is made once for a
// shape and used again; it says for each product what lies where.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <type_traits>

#include "cuda/backend.h"
#ifdef __CUDACC__
#include <cublasLt.h>
#else
#include "cuda/emulator/cublaslt.h"
#endif

namespace orpo {

// out = a . b + bias, or out += a . b; row-major matrices, whose rows may stand at a pitch; fp32, or bf16 a and b with
// an out of either; sums in fp32.
struct Product {
  const char* operation;  // that asks, for errors
  Tensor out, a, b;
  bool transpose_a = false, transpose_b = false;  // the tensor's transpose is meant
  bool accumulate = false;
  Tensor bias = {};  // [out's columns] or absent
};

class MatrixProducts {
 public:
  // What cuBLAS takes on sm_90 when it is not told: algorithms that split a long sum keep its parts there. Older GPUs
  // need 4 MiB; with less than they want, the fastest algorithms are not offered.
  static constexpr uint64_t workspace_bytes = 32 << 20;

  MatrixProducts();  // MachineError where cuBLASLt does not start
  ~MatrixProducts();
  MatrixProducts(const MatrixProducts&) = delete;

  // Whether the product can be had in one go, its bias included.
  bool fuses(const Product& product);
  // Asks for it. No matrix is empty. MachineError, with operation, shapes and status, where cuBLASLt refuses.
  void run(const Product& product, GpuStream stream);

 private:
  struct Destroy {
    void operator()(cublasLtHandle_t x) const { cublasLtDestroy(x); }
    void operator()(cublasLtMatmulDesc_t x) const { cublasLtMatmulDescDestroy(x); }
    void operator()(cublasLtMatrixLayout_t x) const { cublasLtMatrixLayoutDestroy(x); }
    void operator()(cublasLtMatmulPreference_t x) const { cublasLtMatmulPreferenceDestroy(x); }
  };
  template <class Pointer> using Owned = std::unique_ptr<std::remove_pointer_t<Pointer>, Destroy>;
  struct Plan {
    Owned<cublasLtMatmulDesc_t> operation;
    Owned<cublasLtMatrixLayout_t> a, b, out;
    bool found = false;  // an algorithm
    cublasLtMatmulAlgo_t algorithm;
  };
  using Key = std::array<int64_t, 15>;

  const Plan& plan(const Product& product);
  Plan make_plan(const Product& product) const;

  Owned<cublasLtHandle_t> handle_;
  void* workspace_;
  std::map<Key, Plan> plans_;
};

}  // namespace orpo
