// How the products of a synapse divide the columns of a matrix among the lanes of a warp: lane l of a tile of V * 32
// columns has l, l + 32, ... Loads of a warp are then whole cache lines, whatever the alignment of a row.
#pragma once
#include "launch.h"

namespace snn {
namespace cuda {

// Calls visit(type tag) with the dtype and the tile width for so many columns.
template <class Scalar, int Width> struct Columns {
  using T = Scalar;
  static constexpr int V = Width, kTileColumns = Width * kWarp;
};
template <class Visit> cudaError_t visit_columns(int32_t dtype, int64_t columns, Visit visit) {
  if (dtype != kFloat32)  // twice the bytes, so half the columns fill the same shared memory
    return columns <= kWarp ? visit(Columns<double, 1>()) : visit(Columns<double, 2>());
  if (columns <= kWarp) return visit(Columns<float, 1>());
  return columns <= 2 * kWarp ? visit(Columns<float, 2>()) : visit(Columns<float, 4>());
}

// Copies a tile of a row-major matrix [rows, columns] into shared memory, kRowsPerStage rows from `first_row` on;
// beyond the matrix zeros. All threads of the block call this, between two barriers.
template <class C>
__device__ void stage(const typename C::T* matrix, int64_t rows, int64_t columns, int64_t first_row,
                      int64_t first_column, typename C::T* tile) {
  for (int i = threadIdx.x; i < kRowsPerStage * C::kTileColumns; i += blockDim.x) {
    const int64_t row = first_row + i / C::kTileColumns, column = first_column + i % C::kTileColumns;
    tile[i] = row < rows && column < columns ? matrix[row * columns + column] : typename C::T(0);
  }
}

template <class C> constexpr int64_t stage_bytes() {
  return int64_t(kRowsPerStage) * C::kTileColumns * sizeof(typename C::T);
}

constexpr int kStageWords = kRowsPerStage / 64;  // raster words of the rows of one stage

}  // namespace cuda
}  // namespace snn
