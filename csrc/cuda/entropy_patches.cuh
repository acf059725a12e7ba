// Entropies of next-atom distributions, and the molecules that they cut into patches, in three
// steps:
//   rows     H = ln S - T / S with S = sum e^(x-m), T = sum e^(x-m) (x-m), m the maximum; some
//   lanes
//            of a warp to a row
//   cut      a warp to a molecule: which atoms open a patch, and the patch of every atom
//   number   where patches begin in the batch
// A small batch goes through all three in one block. Otherwise `rows` and `cut` are one launch with
// a block per molecule, and `number` another, whose blocks count the patches before their own
// molecules anew: nothing waits for another block. The arithmetic is the same, and so are the bits.
#pragma once

#include <math.h>

#include <instructions.cuh>

#include "segments.cuh"

namespace edt {

enum class Rule : int { local_max, rising_edge, threshold, monotonic };

struct Cut {
  Rule rule;
  double level;  // the quantile of rising_edge, the threshold of threshold and monotonic
  int min_size, max_size, max_patches;  // the last two 0 where there is no limit
};

// W: float, or double for double.
template <class W>
struct EntropyPatches {
  const void* logits;  // [N, vocabulary]
  Offsets offsets;
  int64_t molecules, vocabulary, capacity;
  W scale;
  Cut cut;
  W *h, *top, *log_total, *threshold;                   // [N], [N], [N], [B]
  int64_t *ids, *atom_offsets, *patch_offsets, *count;  // [N], [capacity + 1], [B + 1], []
};

constexpr int kLanes = 32;
constexpr unsigned kWholeWarp = ~0u;

// Lanes that read a row together: a row of few numbers leaves most of a warp idle.
constexpr int kFewLanes = 8;
constexpr int64_t kFewNumbers = 128;

// Over the LANES lanes of a row; each then has the result.
template <int LANES, class W, class F>
__device__ W reduce(W x, F f) {
#pragma unroll
  for (int other = LANES / 2; other > 0; other /= 2)
    x = f(x, __shfl_xor_sync(kWholeWarp, x, other));
  return x;
}

template <class S, int LANES, class W>
__device__ void entropy_rows(const EntropyPatches<W>& x, int64_t begin, int64_t end) {
  const auto larger = [](W a, W b) { return a > b ? a : b; };
  const auto add = [](W a, W b) { return a + b; };
  const int place = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int places = blockDim.x / LANES;
  // All lanes of a warp go through as many rows: a shuffle needs them.
  for (int64_t first = begin; first < end; first += places) {
    const int64_t row = first + place;
    const int64_t v = row < end ? x.vocabulary : 0;
    const S* logits = static_cast<const S*>(x.logits) + row * x.vocabulary;
    W top = -INFINITY;
    for (int64_t i = lane; i < v; i += LANES) top = larger(widen(logits[i]), top);
    top = reduce<LANES>(top, larger);
    W total = 0, moment = 0;
    for (int64_t i = lane; i < v; i += LANES) {
      const W shifted = widen(logits[i]) - top, weight = exp(shifted);
      total += weight;
      moment += shifted == -INFINITY ? 0 : weight * shifted;
    }
    total = reduce<LANES>(total, add);
    moment = reduce<LANES>(moment, add);
    if (row < end && lane == 0) {
      const W log_total = log(total);
      x.h[row] = x.scale * (log_total - moment / total);
      x.top[row] = top;
      x.log_total[row] = log_total;
    }
  }
}

template <class S, class W>
__device__ void entropies(const EntropyPatches<W>& x, int64_t begin, int64_t end) {
  if (x.vocabulary <= kFewNumbers)
    entropy_rows<S, kFewLanes>(x, begin, end);
  else
    entropy_rows<S, kLanes>(x, begin, end);
}

// A molecule in the hands of a warp.
template <class W>
struct Molecule {
  const EntropyPatches<W>& x;
  const Cut& cut;
  const W* h;    // its entropies
  int64_t* ids;  // of its atoms; until they are known, what is known of the atom
  int atoms;
  int lane;

  // Until ids are known: nothing opens here, a patch does, a patch does that no limit drops.
  static constexpr int64_t kNothing = 0, kOpens = 1, kKept = 2;

  __device__ Molecule(const EntropyPatches<W>& x, int64_t m)
      : x(x), cut(x.cut), lane(threadIdx.x % kLanes) {
    const Segment segment(x.offsets, m);
    h = x.h + segment.begin;
    ids = x.ids + segment.begin;
    atoms = segment.count;
  }

  // Writes the ids; returns what the entropies were compared with.
  __device__ W run() {
    W threshold = static_cast<W>(cut.level);
    if (cut.rule == Rule::local_max) threshold = NAN;
    if (cut.rule == Rule::rising_edge) threshold = quantile(static_cast<W>(cut.level));
    find(threshold);
    __syncwarp();
    if (cut.max_patches) keep_highest(cut.max_patches - 1);
    __syncwarp();
    number(cut.max_patches ? kKept : kOpens);
    return threshold;
  }

 private:
  // A lane that `has` a value gives it to all; all must have the same.
  __device__ static void share(bool has, W candidate, W& value) {
    const unsigned lanes = __ballot_sync(kWholeWarp, has);
    const W shared = __shfl_sync(kWholeWarp, candidate, lanes ? __ffs(lanes) - 1 : 0);
    if (lanes) value = shared;
  }

  // torch.quantile(h, q), bit for bit: an atom's rank is counted.
  __device__ W quantile(W q) const {
    if (atoms == 0) return NAN;
    const W rank = q * static_cast<W>(atoms - 1);
    // The number of atoms may round up.
    const int below = min(static_cast<int>(rank), atoms - 1),
              above = rank > static_cast<W>(below) ? below + 1 : below;
    W low = 0, high = 0;
    for (int first = 0; first < atoms; first += kLanes) {
      const int i = first + lane;
      const W value = h[min(i, atoms - 1)];
      if (__ballot_sync(kWholeWarp, value != value)) return NAN;
      int less = 0, not_more = 0;
      for (int j = 0; j < atoms; ++j) {
        less += h[j] < value;
        not_more += h[j] <= value;
      }
      share(less <= below && below < not_more, value, low);
      share(less <= above && above < not_more, value, high);
    }
    const W weight = rank - static_cast<W>(below);
    return weight < W(0.5) ? fma(weight, high - low, low) : fma(weight - 1, high - low, high);
  }

  // The rule opens a patch at atom i > 0.
  __device__ bool opens(int i, W threshold) const {
    switch (cut.rule) {
      case Rule::local_max: {
        if (!(h[i] > h[i - 1])) return false;
        int next = i + 1;
        while (next < atoms && h[next] == h[i]) ++next;
        return next == atoms || h[next] < h[i];
      }
      case Rule::rising_edge:
        return h[i - 1] > threshold && (i == 1 || !(h[i - 2] > threshold));
      case Rule::threshold:
        return h[i] > threshold;
      case Rule::monotonic:
        return h[i] - h[i - 1] > threshold;
    }
    return false;
  }

  // Marks the atoms that open a patch by rule, min_size and max_size; 32 at a time.
  __device__ void find(W threshold) const {
    int last = 0;  // where the last patch before these atoms opened
    for (int first = 0; first < atoms; first += kLanes) {
      const int i = first + lane;
      unsigned marks = __ballot_sync(kWholeWarp, i > 0 && i < atoms && opens(i, threshold));
      if (cut.min_size > 1) marks = far_enough(marks, first, last);
      const unsigned up_to_here = marks & (kWholeWarp >> (kLanes - 1 - lane));
      const int start = up_to_here ? first + kLanes - 1 - __clz(up_to_here) : last;
      const bool here = marks >> lane & 1;
      const bool piece = cut.max_size && i > 0 && (i - start) % cut.max_size == 0;
      if (i < atoms) ids[i] = here || piece ? kOpens : kNothing;
      if (marks) last = first + kLanes - 1 - __clz(marks);
    }
  }

  // From left to right, the marks that lie min_size or more behind the one before.
  __device__ unsigned far_enough(unsigned marks, int first, int last) const {
    unsigned kept = 0;
    for (; marks; marks &= marks - 1) {
      const int bit = __ffs(marks) - 1;
      if (first + bit - last < cut.min_size) continue;
      kept |= 1u << bit;
      last = first + bit;
    }
    return kept;
  }

  // What decided that a patch opens at atom i; NaN counts least.
  __device__ W score(int i) const {
    const W value = h[i - (cut.rule == Rule::rising_edge)];  // the edge lies before its boundary
    return value == value ? value : -INFINITY;
  }

  // Marks the `keep` atoms of highest score, the first of equals.
  __device__ void keep_highest(int keep) const {
    for (int first = 0; first < atoms; first += kLanes) {
      const int i = first + lane;
      bool kept = i < atoms && ids[i] != kNothing;
      if (kept) {
        const W mine = score(i);
        int ahead = 0;
        for (int j = 1; j < atoms; ++j)
          if (ids[j] != kNothing) ahead += score(j) > mine || (score(j) == mine && j < i);
        kept = ahead < keep;
      }
      __syncwarp();  // others read marks that this warp is about to change
      if (kept) ids[i] = kKept;
      __syncwarp();
    }
  }

  __device__ void number(int64_t wanted) const {
    int opened = 0;
    for (int first = 0; first < atoms; first += kLanes) {
      const int i = first + lane;
      const unsigned marks = __ballot_sync(kWholeWarp, i < atoms && ids[i] >= wanted);
      if (i < atoms) ids[i] = opened + __popc(marks & (kWholeWarp >> (kLanes - 1 - lane)));
      opened += __popc(marks);
    }
  }
};

// Molecule m by the warp that calls.
template <class W>
__device__ void cut_molecule(const EntropyPatches<W>& x, int64_t m) {
  Molecule<W> molecule(x, m);
  const W threshold = molecule.run();
  if (molecule.lane == 0) x.threshold[m] = threshold;
}

template <class W>
__device__ int64_t patches_of(const EntropyPatches<W>& x, int64_t m) {
  const Segment atoms(x.offsets, m);
  return atoms.count ? x.ids[atoms.begin + atoms.count - 1] + 1 : 0;
}

// Sum of the block's numbers before this thread's, which `total` then holds with it.
__device__ inline int64_t sum_before(int64_t mine, int64_t& total) {
  __shared__ int64_t of_warps[kLanes];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  int64_t up_to_mine = mine;
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const int64_t other = __shfl_up_sync(kWholeWarp, up_to_mine, distance);
    if (lane >= distance) up_to_mine += other;
  }
  __syncthreads();  // the last call's sums were read
  if (lane == kLanes - 1) of_warps[warp] = up_to_mine;
  __syncthreads();
  int64_t before = 0;
  total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) before += of_warps[w];
    total += of_warps[w];
  }
  return before + up_to_mine - mine;
}

// Numbers the patches of molecules [begin, end); blocks share the rows of tail.
template <class W>
__device__ void number_patches(const EntropyPatches<W>& x, int64_t begin, int64_t end) {
  int64_t earlier = 0, all = 0, total, before;
  for (int64_t m = threadIdx.x; m < x.molecules; m += blockDim.x) {
    const int64_t patches = patches_of(x, m);
    all += patches;
    if (m < begin) earlier += patches;
  }
  sum_before(earlier, before);
  sum_before(all, total);

  for (int64_t first = begin; first < end; first += blockDim.x) {
    const int64_t m = first + threadIdx.x;
    const int64_t patches = m < end ? patches_of(x, m) : 0;
    int64_t here;
    const int64_t offset = before + sum_before(patches, here);
    if (m < end) x.patch_offsets[m] = offset;
    before += here;
  }
  __syncthreads();

  const int lane = threadIdx.x % kLanes, warps = blockDim.x / kLanes;
  for (int64_t m = begin + threadIdx.x / kLanes; m < end; m += warps) {
    const Segment atoms(x.offsets, m);
    for (int64_t i = atoms.begin + lane; i < atoms.begin + atoms.count; i += kLanes) {
      const int64_t patch = x.patch_offsets[m] + x.ids[i];
      const bool first = i == atoms.begin || x.ids[i] != x.ids[i - 1];
      if (first && patch < x.capacity) x.atom_offsets[patch] = i;  // malformed offsets overlap
    }
  }

  const int64_t used = x.offsets[x.molecules], thread = blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t threads = gridDim.x * blockDim.x;
  if (thread == 0) x.patch_offsets[x.molecules] = *x.count = total;
  for (int64_t i = total + thread; i <= x.capacity; i += threads) x.atom_offsets[i] = used;
  for (int64_t i = used + thread; i < x.offsets.rows; i += threads) {
    x.ids[i] = 0;
    x.h[i] = x.top[i] = x.log_total[i] = 0;
  }
}

constexpr int kCutThreads = 256;  // 32 rows of few numbers at a time: most molecules at once
constexpr int kNumberThreads = 256;
constexpr int kSmallThreads = 1024;

template <class S, class W>
__global__ void __launch_bounds__(kCutThreads)
    cut_molecules(const __grid_constant__ EntropyPatches<W> x) {
  const Segment rows(x.offsets, blockIdx.x);
  entropies<S>(x, rows.begin, rows.begin + rows.count);
  __syncthreads();
  if (threadIdx.x < kLanes) cut_molecule(x, blockIdx.x);
}

template <class W>
__global__ void __launch_bounds__(kNumberThreads)
    number_patches_of_batch(const __grid_constant__ EntropyPatches<W> x) {
  const int64_t each = (x.molecules + gridDim.x - 1) / gridDim.x, begin = each * blockIdx.x;
  number_patches(x, min(begin, x.molecules), min(begin + each, x.molecules));
}

template <class S, class W>
__global__ void __launch_bounds__(kSmallThreads, 1)
    entropy_patches_of_few(const __grid_constant__ EntropyPatches<W> x) {
  entropies<S>(x, 0, x.offsets[x.molecules]);
  __syncthreads();
  for (int64_t m = threadIdx.x / kLanes; m < x.molecules; m += kSmallThreads / kLanes)
    cut_molecule(x, m);
  __syncthreads();
  number_patches(x, 0, x.molecules);
}

}  // namespace edt
