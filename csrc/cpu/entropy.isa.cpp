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
  for (; v >= n * kBlock<W>; v -= n * kBlock<W>, row += n * kBlock<W>)
    sums = sums + sum_rows(Rows<S>{row, kBlock<W>, kBlock<W>, n});
  const int64_t block = v / n, rest = v % n;
  if (block) sums = sums + sum_rows(Rows<S>{row, block, block, n});
  if (rest) sums = sums + sum_rows(Rows<S>{row + v - rest, rest, rest, 1});
  const Sums<W> lanes = sums.at(broadcast(reduce_max<W>(sums.top)));
  return {lanes.top, broadcast(reduce_sum<W>(lanes.total)), broadcast(reduce_sum<W>(lanes.moment))};
}

template <class S>
void forward(const void* logits, int64_t rows, int64_t v, double scale, void* h, void* top,
             void* log_total) {
  using W = Wide<S>;
  constexpr int n = kLanes<W>;
  for (int64_t begin = 0; begin < rows; begin += n) {
    const int64_t count = rows - begin < n ? rows - begin : n;
    const S* first = static_cast<const S*>(logits) + begin * v;
    Sums<W> sums;
    if (v <= kShort)
      sums = sum_rows(Rows<S>{first, v, v, count});
    else
      for (int i = 0; i < count; ++i) {
        const Sums<W> row = long_row(first + i * v, v);
        sums.top[i] = row.top[0], sums.total[i] = row.total[0], sums.moment[i] = row.moment[0];
      }
    const Vec<W> log_totals = log<W>(sums.total);
    const auto write = [=](void* to, Vec<W> x) __attribute__((always_inline)) {
      W* at = static_cast<W*>(to) + begin;
      if (count == n) return store(at, x);
      W copy[n];
      store(copy, x);
      __builtin_memcpy(at, copy, count * sizeof(W));
    };
    write(h, static_cast<W>(scale) * (log_totals - sums.moment / sums.total));
    write(top, sums.top);
    write(log_total, log_totals);
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
