// The sparse step's inner loops for CPUs, which compiled.py builds and calls; plain C symbols.
//
// One thread computes each result in a fixed order, so it does not depend on how many threads there are.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

template <class F> void parallel(int64_t items, int threads, F work) {
  std::atomic<int64_t> next{0};
  // One copy of the code for all threads: a second one, inlined elsewhere, may add up in another order.
  auto run = [&]() __attribute__((noinline)) {
    for (int64_t i; (i = next.fetch_add(1)) < items;) work(i);
  };
  std::vector<std::thread> others;
  for (int t = 1; t < std::min<int64_t>(threads, items); ++t) others.emplace_back(run);
  run();
  for (auto& thread : others) thread.join();
}

// In ranges small enough to balance, large enough that taking one costs nothing.
template <class F> void parallel_ranges(int64_t n, int64_t size, int threads, F work) {
  parallel((n + size - 1) / size, threads, [&](int64_t i) { work(i * size, std::min(n, (i + 1) * size)); });
}

typedef float Lanes __attribute__((vector_size(64), aligned(4)));
constexpr int64_t WIDE = 16;

inline float dot(const float* a, const float* b, int64_t d) {
  Lanes sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * WIDE <= d; k += 4 * WIDE)
    for (int s = 0; s < 4; ++s) sums[s] += *(const Lanes*)(a + k + s * WIDE) * *(const Lanes*)(b + k + s * WIDE);
  Lanes all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float total = 0;
  for (int s = 0; s < WIDE; ++s) total += all[s];
  for (; k < d; ++k) total += a[k] * b[k];
  return total;
}

inline void add(float* __restrict to, const float* __restrict from, float scale, int64_t d) {
  for (int64_t k = 0; k < d; ++k) to[k] += scale * from[k];
}

// Rows gathered from all over a table are read a few columns at a time: those columns of the whole table stay in cache.
constexpr int64_t COLUMNS = 128;

template <class F> void parallel_blocks(int64_t n, int64_t size, int64_t d, int threads, F work) {
  int64_t ranges = (n + size - 1) / size, blocks = (d + COLUMNS - 1) / COLUMNS;
  parallel(ranges * blocks, threads, [&](int64_t item) {
    int64_t block = item / ranges, from = item % ranges * size, k = block * COLUMNS;
    work(block, from, std::min(n, from + size), k, std::min(COLUMNS, d - k));
  });
}

// to[0 … width) += Σ scale(e) table[index[e]] over begin ≤ e < end, the sums in registers.
template <class Scale>
inline void gather(float* to, const float* table, const int64_t* index, Scale scale, int64_t begin, int64_t end,
                   int64_t d, int64_t width) {
  if (width < COLUMNS) {
    for (int64_t e = begin; e < end; ++e) add(to, table + index[e] * d, scale(e), width);
    return;
  }
  constexpr int PARTS = COLUMNS / WIDE;
  Lanes sums[PARTS];
  std::memcpy(sums, to, sizeof sums);
  for (int64_t e = begin; e < end; ++e) {
    const float* row = table + index[e] * d;
    float weight = scale(e);
#pragma GCC unroll 8
    for (int s = 0; s < PARTS; ++s) sums[s] += weight * *(const Lanes*)(row + s * WIDE);
  }
  std::memcpy(to, sums, sizeof sums);
}

inline double square(const float* a, int64_t d) { return dot(a, a, d); }

// Numbers by value: GCC cannot know that what a lambda captured stays the same, and would not vectorise.
inline void adam_row(float* __restrict w, const float* __restrict g, float* __restrict m, float* __restrict v, int64_t d,
                     float scale, float beta1, float beta2, float step_size, float inverse_root, float eps) {
  for (int64_t k = 0; k < d; ++k) {
    float x = g[k] * scale;
    m[k] += (1 - beta1) * (x - m[k]);
    v[k] = beta2 * v[k] + (1 - beta2) * x * x;
    w[k] -= step_size * m[k] / (std::sqrt(v[k]) * inverse_root + eps);
  }
}

}  // namespace

extern "C" {

// --- the encoder: which pairs exceed their bar ------------------------------------------------------------------
//
// Rows of h and W are rounded to integers, h ≈ s q, and multiplied exactly. The bound
//   |⟨h, w⟩ − s_h s_w ⟨q_h, q_w⟩| ≤ ‖h‖ ‖w − s_w q_w‖ + ‖h − s_h q_h‖ ‖s_w q_w‖
// says which pairs could exceed the bar; only these are multiplied in float32. It includes what rounding in float32 can
// add (d 2⁻²⁴ ‖h‖ ‖w‖, twice over), so that no pair is missed that float32 alone would have kept.

#if defined(__AVX512VNNI__)
#define MSAE_SCREEN 8
typedef int8_t Whole;
constexpr int GROUP = 4, PANEL = 32, TALL = 12;
#elif defined(__AVX2__)
#define MSAE_SCREEN 16
typedef int16_t Whole;
constexpr int GROUP = 2, PANEL = 16, TALL = 6;
#else
#define MSAE_SCREEN 0
#endif

int64_t msae_screen_bits() { return MSAE_SCREEN; }

int64_t msae_columns() { return COLUMNS; }

#if MSAE_SCREEN
}

namespace {

struct Rounded {
  float scale, norm, error, kept;  // s, ‖x‖, ‖x − s q‖, ‖s q‖
};

Rounded round_row(const float* __restrict x, int64_t d, Whole* __restrict q) {
  float largest, norm = std::sqrt(square(x, d));
  int32_t largest_bits = 0;  // floats without their sign are ordered as their bits are: a maximum that GCC vectorises
  for (int64_t k = 0; k < d; ++k) {
    int32_t bits;
    std::memcpy(&bits, x + k, 4);
    largest_bits = std::max(largest_bits, bits & 0x7fffffff);
  }
  std::memcpy(&largest, &largest_bits, 4);
  // 16 bits: norms below 2^15.5, so that no sum of products can reach 2^31
  float scale = MSAE_SCREEN == 8 ? largest / 127 : std::max(largest / 32767, norm / 46000);
  float inverse = scale > 0 && std::isfinite(scale) ? 1 / scale : 0;
  float error = 0, kept = 0;
  for (int64_t k = 0; k < d; ++k) {
    float whole = std::nearbyint(x[k] * inverse);
    q[k] = (Whole)whole;
    float near = scale * whole, lost = x[k] - near;
    error += lost * lost, kept += near * near;
  }
  if (!(norm < 1e18f)) scale = norm = NAN;  // it or its square is not finite: every pair of it is multiplied
  return {scale, norm * 1.0001f, std::sqrt(error) * 1.0001f, std::sqrt(kept) * 1.0001f};
}

struct Survivor {
  int64_t flat;  // row · d_sae + latent
  float value;
};

struct Screen {
  const float *h, *W, *b, *bar;
  int64_t rows, d_sae, d, groups;      // groups of GROUP numbers, the last padded with zeros
  std::vector<Whole> qh, qW;           // qh [rows, groups, GROUP]; qW [panels, groups, PANEL, GROUP]
  std::vector<Rounded> of_h;
  std::vector<float> scale, to_norm, to_error, least;  // of each latent, padded to whole panels
  std::vector<int32_t> start;                          // −128 Σ q_w, because qh is stored with 128 added
  std::vector<std::vector<Survivor>> survivors;        // of each block of rows
};

void prepare(Screen& s, int threads) {
  int64_t padded = s.groups * GROUP, panels = (s.d_sae + PANEL - 1) / PANEL, latents = panels * PANEL;
  s.qh.assign(s.rows * padded, 0), s.qW.resize(latents * padded), s.of_h.resize(s.rows);
  for (auto* v : {&s.scale, &s.to_norm, &s.to_error}) v->assign(latents, 0.f);
  s.least.assign(latents, INFINITY), s.start.assign(latents, 0);
  parallel_ranges(s.rows, 64, threads, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      s.of_h[i] = round_row(s.h + i * s.d, s.d, &s.qh[i * padded]);
      if (MSAE_SCREEN == 8)
        for (int64_t k = 0; k < padded; ++k) s.qh[i * padded + k] ^= (Whole)0x80;
    }
  });
  parallel(panels, threads, [&](int64_t panel) {
    std::vector<Whole> q(padded, 0);
    Whole* to = &s.qW[panel * PANEL * padded];
    for (int64_t c = 0; c < PANEL; ++c) {
      int64_t j = panel * PANEL + c;
      std::fill(q.begin(), q.end(), 0);
      if (j < s.d_sae) {
        Rounded w = round_row(s.W + j * s.d, s.d, q.data());
        s.scale[j] = w.scale, s.to_error[j] = w.kept, s.to_norm[j] = w.error + 2 * s.d * 6e-8f * w.norm;
        s.least[j] = s.bar[j] - s.b[j] - 1e-6f * (std::fabs(s.bar[j]) + std::fabs(s.b[j]));
        if (MSAE_SCREEN == 8) {
          int32_t sum = 0;
          for (Whole v : q) sum += v;
          s.start[j] = -128 * sum;
        }
      }
      for (int64_t g = 0; g < s.groups; ++g) std::memcpy(to + (g * PANEL + c) * GROUP, &q[g * GROUP], 4);
    }
  });
}

#if MSAE_SCREEN == 8
typedef __m512i Ints;
constexpr int LANES = 16;
inline Ints load(const void* p) { return _mm512_loadu_si512(p); }
inline Ints spread(const void* p) { return _mm512_set1_epi32(*(const int32_t*)p); }
inline void multiply(Ints& sum, Ints a, Ints b) {  // with the intrinsic GCC copies every sum to memory and back
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
inline uint32_t passing(Ints sum, const Screen& s, const Rounded& x, int64_t j) {
  __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(_mm512_loadu_ps(&s.scale[j]), _mm512_set1_ps(x.scale)));
  v = _mm512_fmadd_ps(_mm512_set1_ps(x.norm), _mm512_loadu_ps(&s.to_norm[j]), v);
  v = _mm512_fmadd_ps(_mm512_set1_ps(x.error), _mm512_loadu_ps(&s.to_error[j]), v);
  return _mm512_cmp_ps_mask(v, _mm512_loadu_ps(&s.least[j]), _CMP_NLE_UQ);
}
#else
typedef __m256i Ints;
constexpr int LANES = 8;
inline Ints load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Ints spread(const void* p) { return _mm256_set1_epi32(*(const int32_t*)p); }
inline void multiply(Ints& sum, Ints a, Ints b) {
  Ints both;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(both) : "x"(a), "x"(b));
}
inline uint32_t passing(Ints sum, const Screen& s, const Rounded& x, int64_t j) {
  __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(_mm256_loadu_ps(&s.scale[j]), _mm256_set1_ps(x.scale)));
  v = _mm256_add_ps(_mm256_mul_ps(_mm256_set1_ps(x.norm), _mm256_loadu_ps(&s.to_norm[j])), v);
  v = _mm256_add_ps(_mm256_mul_ps(_mm256_set1_ps(x.error), _mm256_loadu_ps(&s.to_error[j])), v);
  return _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_loadu_ps(&s.least[j]), _CMP_NLE_UQ));
}
#endif

static_assert(PANEL == 2 * LANES);

// The sums of N rows by one panel, each a variable of its own: GCC would copy an array to memory and back.
template <int N> struct Sums {
  Ints low, high;
  Sums<N - 1> below;
  inline void begin(Ints a, Ints b) { low = a, high = b, below.begin(a, b); }
  inline void add(const Whole* x, int64_t stride, Ints a, Ints b) {
    Ints row = spread(x);
    multiply(low, row, a), multiply(high, row, b);
    below.add(x + stride, stride, a, b);
  }
  inline void end(Ints* out) { out[0] = low, out[1] = high, below.end(out + 2); }
};
template <> struct Sums<0> {
  inline void begin(Ints, Ints) {}
  inline void add(const Whole*, int64_t, Ints, Ints) {}
  inline void end(Ints*) {}
};

template <int N>
__attribute__((noinline)) void products(const Whole* x, const Whole* w, const int32_t* start, int64_t groups, Ints* out) {
  Sums<N> sums;
  sums.begin(load(start), load(start + LANES));
  for (int64_t g = 0; g < groups; ++g)
    sums.add(x + g * GROUP, groups * GROUP, load(w + g * PANEL * GROUP), load(w + (g * PANEL + LANES) * GROUP));
  sums.end(out);
}

template <int N> void tile(const Screen& s, int64_t row, int64_t panel, std::vector<int64_t>& pairs) {
  int64_t padded = s.groups * GROUP;
  Ints sums[2 * N];
  products<N>(&s.qh[row * padded], &s.qW[panel * PANEL * padded], &s.start[panel * PANEL], s.groups, sums);
  for (int i = 0; i < 2 * N; ++i) {
    int64_t r = row + i / 2, j = panel * PANEL + i % 2 * LANES;
    for (uint32_t mask = passing(sums[i], s, s.of_h[r], j); mask; mask &= mask - 1) {
      int64_t latent = j + __builtin_ctz(mask);
      if (latent < s.d_sae) pairs.push_back(r * s.d_sae + latent);
    }
  }
}

}  // namespace

extern "C" {

// Returns how many pairs survive; `screen` holds them until msae_collect.
int64_t msae_screen(const float* h, const float* W, const float* b, const float* bar, int64_t rows, int64_t d_sae,
                    int64_t d, void** screen, int threads) {
  auto* s = new Screen{h, W, b, bar, rows, d_sae, d, (d + GROUP - 1) / GROUP};
  prepare(*s, threads);
  int64_t share = (rows / (4 * threads) + TALL - 1) / TALL * TALL;
  int64_t block = std::max<int64_t>(TALL, std::min<int64_t>(768, share)), panels = (d_sae + PANEL - 1) / PANEL;
  s->survivors.resize((rows + block - 1) / block);
  parallel_ranges(rows, block, threads, [&](int64_t from, int64_t to) {
    std::vector<int64_t> pairs;
    std::vector<Survivor> by_panel;
    for (int64_t panel = 0; panel < panels; ++panel) {
      pairs.clear();
      int64_t row = from;
      for (; row + TALL <= to; row += TALL) tile<TALL>(*s, row, panel, pairs);
      for (; row < to; ++row) tile<1>(*s, row, panel, pairs);
      for (int64_t flat : pairs) {
        int64_t i = flat / d_sae, j = flat - i * d_sae;
        float value = dot(h + i * d, W + j * d, d) + b[j];
        if (!(value <= bar[j])) by_panel.push_back({flat, value});
      }
    }
    std::vector<int64_t> next(to - from + 1, 0);  // slot of each row; within a row the panels ascend already
    for (auto& x : by_panel) ++next[x.flat / d_sae - from + 1];
    for (int64_t i = 0; i < to - from; ++i) next[i + 1] += next[i];
    auto& by_row = s->survivors[from / block];
    by_row.resize(by_panel.size());
    for (auto& x : by_panel) by_row[next[x.flat / d_sae - from]++] = x;
  });
  int64_t n = 0;
  for (auto& part : s->survivors) n += part.size();
  *screen = s;
  return n;
}

void msae_collect(void* screen, int64_t* flat, float* values, int) {
  auto* s = (Screen*)screen;
  for (auto& part : s->survivors)
    for (auto& x : part) *flat++ = x.flat, *values++ = x.value;
  delete s;
}
#endif

// --- decoding, and the gradients of activations --------------------------------------------------------------------

// residuals [batch, levels, d] = target − Σ acts W_dec of the latents up to each level; squares [blocks, batch, levels],
// ‖residual‖² of each block of columns. Entries of bin row · levels + level are those from ends[bin] to ends[bin + 1].
void msae_residuals(const float* acts, const int64_t* latents, const int64_t* ends, const float* W_dec,
                    const float* target, int64_t batch, int64_t levels, int64_t d, float* residuals, double* squares,
                    int threads) {
  auto minus = [&](int64_t e) { return -acts[e]; };
  parallel_blocks(batch, 128, d, threads, [&](int64_t block, int64_t from, int64_t to, int64_t k, int64_t width) {
    for (int64_t i = from; i < to; ++i) {
      const float* inner = target + i * d + k;
      for (int64_t l = 0; l < levels; ++l) {
        float* residual = residuals + (i * levels + l) * d + k;
        const int64_t* end = ends + i * levels + l;
        std::memcpy(residual, inner, width * sizeof(float));
        gather(residual, W_dec + k, latents, minus, end[0], end[1], d, width);
        squares[(block * batch + i) * levels + l] = square(residual, width);
        inner = residual;
      }
    }
  });
}

// The residuals and all that follows from them, one block of columns after the other, so that it stays in cache:
// grads [batch, levels, COLUMNS] is room for Σ over levels m ≥ l of weights[m] residual[m] (of level l alone with
// stop_gradient). Added to squares [batch, levels], ‖residual‖², and to dots [entries], ⟨grads[its bin], W_dec[its
// latent]⟩. outermost [batch, d] = the last level's residual, unless null. grad_W_dec [d_sae, d] = Σ acts grads over the
// entries of each latent, given as acts_by_latent, bins_by_latent, latent_ends; grad_b_dec [d] = Σ grads of level 0.
void msae_decode(const float* acts, const int64_t* latents, const int64_t* ends, const float* acts_by_latent,
                 const int64_t* bins_by_latent, const int64_t* latent_ends, const float* W_dec, const float* target,
                 const float* weights, int64_t batch, int64_t levels, int64_t d, int64_t d_sae, int64_t stop_gradient,
                 float* grads, double* squares, float* dots, float* outermost, float* grad_W_dec, float* grad_b_dec,
                 int threads) {
  auto minus = [&](int64_t e) { return -acts[e]; };
  auto plus = [&](int64_t e) { return acts_by_latent[e]; };
  for (int64_t k = 0; k < d; k += COLUMNS) {
    int64_t width = std::min(COLUMNS, d - k);
    parallel_ranges(batch, 64, threads, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const float* inner = target + i * d + k;
        const int64_t* end = ends + i * levels;
        float* of_row = grads + i * levels * COLUMNS;
        for (int64_t l = 0; l < levels; ++l) {
          float* residual = of_row + l * COLUMNS;
          std::memcpy(residual, inner, width * sizeof(float));
          gather(residual, W_dec + k, latents, minus, end[l], end[l + 1], d, width);
          squares[i * levels + l] += square(residual, width);
          inner = residual;
        }
        if (outermost) std::memcpy(outermost + i * d + k, inner, width * sizeof(float));
        for (int64_t l = levels - 1; l >= 0; --l) {
          float *grad = of_row + l * COLUMNS, weight = weights[l];
          for (int64_t c = 0; c < width; ++c) grad[c] *= weight;
          if (l < levels - 1 && !stop_gradient) add(grad, grad + COLUMNS, 1, width);
          for (int64_t e = end[l]; e < end[l + 1]; ++e) dots[e] += dot(grad, W_dec + latents[e] * d + k, width);
        }
      }
    });
    parallel_ranges(d_sae + 1, 64, threads, [&](int64_t from, int64_t to) {
      for (int64_t j = from; j < std::min(to, d_sae); ++j) {
        float* row = grad_W_dec + j * d + k;
        std::memset(row, 0, width * sizeof(float));
        gather(row, grads, bins_by_latent, plus, latent_ends[j], latent_ends[j + 1], COLUMNS, width);
      }
      if (to <= d_sae) return;
      std::vector<double> sums(width, 0);
      for (int64_t i = 0; i < batch; ++i)
        for (int64_t c = 0; c < width; ++c) sums[c] += grads[i * levels * COLUMNS + c];
      std::copy(sums.begin(), sums.end(), grad_b_dec + k);
    });
  }
}

// --- the gradients of weights ----------------------------------------------------------------------------------------

// order: entries by latent, in their own order within each; ends [d_sae + 1].
void msae_by_latent(const int64_t* latents, int64_t n, int64_t d_sae, int64_t* order, int64_t* ends, int) {
  std::fill(ends, ends + d_sae + 1, 0);
  for (int64_t e = 0; e < n; ++e) ++ends[latents[e] + 1];
  for (int64_t j = 0; j < d_sae; ++j) ends[j + 1] += ends[j];
  std::vector<int64_t> next(ends, ends + d_sae);
  for (int64_t e = 0; e < n; ++e) order[next[latents[e]]++] = e;
}

// --- the optimizer -----------------------------------------------------------------------------------------------------

// squares[row] = ‖grad row‖², after its part along W's (unit) row is removed unless W is null.
void msae_project(float* grad, const float* W, int64_t rows, int64_t d, double* squares, int threads) {
  parallel_ranges(rows, 64, threads, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      float* row = grad + i * d;
      if (W) add(row, W + i * d, -dot(row, W + i * d, d), d);
      squares[i] = square(row, d);
    }
  });
}

// Adam (arXiv 1412.6980) on rows [rows, d] with the gradient times `scale`; then each row to unit norm if unit_norm.
// step_size = lr / (1 − β1^t), root = √(1 − β2^t).
void msae_adam(float* W, const float* grad, float* mean, float* square_mean, int64_t rows, int64_t d, float scale,
               float beta1, float beta2, float step_size, float root, float eps, int64_t unit_norm, int threads) {
  parallel_ranges(rows, 64, threads, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      float* w = W + i * d;
      adam_row(w, grad + i * d, mean + i * d, square_mean + i * d, d, scale, beta1, beta2, step_size, 1 / root, eps);
      if (unit_norm) {
        float shrink = 1 / std::max(std::sqrt((float)square(w, d)), 1e-12f);
        for (int64_t k = 0; k < d; ++k) w[k] *= shrink;
      }
    }
  });
}
}
