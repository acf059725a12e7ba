// Rows of some hundred logits are read several at a time, longer ones in as many blocks, each from
// memory once: for the maxima, and from the L1 cache for the sums. Rows never meet, so their bits
// do not depend on the batch.
#include "entropy.h"

#include "logit_rows.h"

namespace edt {
namespace {

template <class S>
using Wide = typename ComputeType<S>::type;

// Logits of a short row; a lane adds up no more than 64 of a block, so that long rows lose no
// digits.
constexpr int64_t kShort = 512;
template <class W>
constexpr int64_t kBlock = (sizeof(W) == 4 ? 32 : 16) * kLanes<W>;

// m, S and T of one row in the first lane.
template <class S, class W = Wide<S>>
EDT_INLINE Sums<W> long_row(const S* row, int64_t v) {
  constexpr int n = kLanes<W>;
  Sums<W> sums;
  const auto add = [&](const Rows<S>& blocks)
                       __attribute__((always_inline)) { sums = sums + blocks.sums(blocks.top()); };
  for (; v >= n * kBlock<W>; v -= n * kBlock<W>, row += n * kBlock<W>)
    add({row, kBlock<W>, kBlock<W>, n});
  const int64_t block = v / n, rest = v % n;
  if (block) add({row, block, block, n});
  if (rest) add({row + v - rest, rest, rest, 1});
  const Sums<W> lanes = sums.at(broadcast(reduce_max<W>(sums.top)));
  return {lanes.top, broadcast(reduce_sum<W>(lanes.total)), broadcast(reduce_sum<W>(lanes.moment))};
}

template <class S>
void forward(const void* logits, int64_t rows, int64_t v, double scale, void* h, void* top,
             void* log_total) {
  using W = Wide<S>;
  constexpr int n = kLanes<W>;
  const S* from = static_cast<const S*>(logits);
  const auto write = [=](int64_t row, const Sums<W>& sums) __attribute__((always_inline)) {
    const Vec<W> log_totals = log<W>(sums.total);
    const Vec<W> entropy = static_cast<W>(scale) * (log_totals - sums.moment / sums.total);
    store_first(static_cast<W*>(h) + row, entropy, rows - row);
    store_first(static_cast<W*>(top) + row, sums.top, rows - row);
    store_first(static_cast<W*>(log_total) + row, log_totals, rows - row);
  };
  if (v <= kShort) return sum_rows(from, v, v, rows, write);
  for (int64_t r = 0; r < rows; r += n) {
    Sums<W> sums;
    for (int64_t i = 0; i < n && r + i < rows; ++i) {
      const Sums<W> row = long_row(from + (r + i) * v, v);
      sums.top[i] = row.top[0], sums.total[i] = row.total[0], sums.moment[i] = row.moment[0];
    }
    write(r, sums);
  }
}

template <class S>
void backward(const void* grad, const void* logits, const void* h, const void* top,
              const void* log_total, int64_t rows, int64_t v, double scale, void* dlogits) {
  using W = Wide<S>;
  const S* from = static_cast<const S*>(logits);
  S* to = static_cast<S*>(dlogits);
  const auto slope = [=](int64_t row) __attribute__((always_inline)) {
    return Slope<W>(grad, h, top, log_total, scale, row);
  };
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2, from += 2 * v, to += 2 * v)
    write_slopes<S>({slope(r), slope(r + 1)}, {from, from + v}, {to, to + v}, v);
  if (r < rows) {
    const int64_t part = v < 2 * kLanes<W> ? v : (v + 1) / 2, second = v - part;
    write_slopes<S>({slope(r), slope(r)}, {from, from + second}, {to, to + second}, part);
  }
}

}  // namespace

namespace EDT_ISA {
extern const EntropyKernels entropy_kernels = {
    {forward<float>, forward<double>, forward<BFloat16>, forward<Half>},
    {backward<float>, backward<double>, backward<BFloat16>, backward<Half>},
};
}  // namespace EDT_ISA
}  // namespace edt
