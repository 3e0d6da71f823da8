// Conv4-32 forward and backward in training mode on one AVX-512 core: float32, or (half)
// all convolutions as bfloat16 products added in float32 (vdpbf16ps).
//
// The same mathematics as metalstm.networks.Conv4 (3x3 convolution, batch norm by the
// batch, 2x2 max-pool, ReLU), the convolution's bias left out (batch norm removes it).
// Images are NHWC with a border of zeros. The first layer's output is not kept but
// computed again where it is differentiated: memory is what a core waits for.
#include <immintrin.h>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <cstdint>

static const int O = 32;
typedef __m512 v;
static inline v ld(const float* p) { return _mm512_loadu_ps(p); }
static inline void st(float* p, v x) { _mm512_storeu_ps(p, x); }
static inline v bc(float x) { return _mm512_set1_ps(x); }

// P pixels of one row: x points at the top left neighbour of the first.
template <int P, int C>
static inline __attribute__((always_inline)) void tile(const float* x, int stride, const float* w, float* out) {
  v a[P], b[P];
#pragma GCC unroll 16
  for (int p = 0; p < P; p++) a[p] = b[p] = _mm512_setzero_ps();
  for (int ky = 0; ky < 3; ky++) {
    const float* xr = x + ky * stride;
    const float* wr = w + ky * 3 * C * O;
    for (int k = 0; k < 3 * C; k++) {  // kx and c are neighbours in memory
      v w0 = ld(wr + k * O), w1 = ld(wr + k * O + 16);
#pragma GCC unroll 16
      for (int p = 0; p < P; p++) {
        v s = bc(xr[p * C + k]);
        a[p] = _mm512_fmadd_ps(s, w0, a[p]);
        b[p] = _mm512_fmadd_ps(s, w1, b[p]);
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; p++) { st(out + p * O, a[p]); st(out + p * O + 16, b[p]); }
}
template <int P, int C>
static __attribute__((noinline)) void conv_row_p(const float* x, int W, const float* w, float* out) {
  for (int p = 0; p < W; p += P) tile<P, C>(x + p * C, (W + 2) * C, w, out + p * O);
}
template <int C>
static void conv_row(const float* x, int W, const float* w, float* out) {
  if (W % 14 == 0) conv_row_p<14, C>(x, W, w, out);
  else if (W % 12 == 0) conv_row_p<12, C>(x, W, w, out);
  else if (W % 10 == 0) conv_row_p<10, C>(x, W, w, out);
  else if (W % 9 == 0) conv_row_p<9, C>(x, W, w, out);
  else if (W % 8 == 0) conv_row_p<8, C>(x, W, w, out);
  else if (W % 7 == 0) conv_row_p<7, C>(x, W, w, out);
  else if (W % 5 == 0) conv_row_p<5, C>(x, W, w, out);
  else if (W % 3 == 0) conv_row_p<3, C>(x, W, w, out);
  else conv_row_p<1, C>(x, W, w, out);
}

// dW[ky][k][O] += sum over a row's pixels; k = (kx, c).
template <int C, int K>
static __attribute__((noinline)) void wgrad_row(const float* x, int W, const float* dy, float* dw) {
  const int stride = (W + 2) * C;
  for (int ky = 0; ky < 3; ky++)
    for (int k0 = 0; k0 < 3 * C; k0 += K) {
      const float* xr = x + ky * stride + k0;
      float* d = dw + (ky * 3 * C + k0) * O;
      v a[K], b[K];
#pragma GCC unroll 16
      for (int k = 0; k < K; k++) { a[k] = ld(d + k * O); b[k] = ld(d + k * O + 16); }
      for (int p = 0; p < W; p++) {
        v g0 = ld(dy + p * O), g1 = ld(dy + p * O + 16);
#pragma GCC unroll 16
        for (int k = 0; k < K; k++) {
          v s = bc(xr[p * C + k]);
          a[k] = _mm512_fmadd_ps(s, g0, a[k]);
          b[k] = _mm512_fmadd_ps(s, g1, b[k]);
        }
      }
#pragma GCC unroll 16
      for (int k = 0; k < K; k++) { st(d + k * O, a[k]); st(d + k * O + 16, b[k]); }
    }
}

// ---- bfloat16: two values of the summed axis beside each other in 32 bits

typedef uint16_t u16;
static inline __m512bh bc2(const void* p) { int i; memcpy(&i, p, 4); return (__m512bh)_mm512_set1_epi32(i); }
static inline __m512bh ld2(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }
// bits of float32 rounded to bfloat16, in the upper half of each lane (the lower is not 0)
static inline __m512i rounded(v x) {
  __m512i i = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  return _mm512_add_epi32(i, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(_mm512_srli_epi32(i, 16), one)));
}
static inline void st16(u16* p, v x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(x), 16))); }
static inline u16 round1(float x) { uint32_t i; memcpy(&i, &x, 4); return (i + 0x7fff + ((i >> 16) & 1)) >> 16; }

// C channels; an odd 3 C has a tenth weight of 0 (for whatever value comes next)
template <int P, int C>
static __attribute__((noinline)) void conv_row16_p(const u16* x, int W, const u16* w, float* out) {
  const int stride = (W + 2) * C, K = (3 * C + 1) / 2 * 2;
  for (int p0 = 0; p0 < W; p0 += P) {
    v a[P], b[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; p++) a[p] = b[p] = _mm512_setzero_ps();
    for (int ky = 0; ky < 3; ky++) {
      const u16 *xr = x + ky * stride + p0 * C, *wr = w + ky * K * O;
      for (int k = 0; k < K; k += 2) {
        __m512bh w0 = ld2(wr + k * O), w1 = ld2(wr + k * O + 32);
#pragma GCC unroll 16
        for (int p = 0; p < P; p++) {
          __m512bh s = bc2(xr + p * C + k);
          a[p] = _mm512_dpbf16_ps(a[p], s, w0);
          b[p] = _mm512_dpbf16_ps(b[p], s, w1);
        }
      }
    }
#pragma GCC unroll 16
    for (int p = 0; p < P; p++) { st(out + (p0 + p) * O, a[p]); st(out + (p0 + p) * O + 16, b[p]); }
  }
}
template <int C>
static void conv_row16(const u16* x, int W, const u16* w, float* out) {
  if (W % 14 == 0) conv_row16_p<14, C>(x, W, w, out);
  else if (W % 12 == 0) conv_row16_p<12, C>(x, W, w, out);
  else if (W % 10 == 0) conv_row16_p<10, C>(x, W, w, out);
  else if (W % 9 == 0) conv_row16_p<9, C>(x, W, w, out);
  else if (W % 8 == 0) conv_row16_p<8, C>(x, W, w, out);
  else if (W % 7 == 0) conv_row16_p<7, C>(x, W, w, out);
  else if (W % 5 == 0) conv_row16_p<5, C>(x, W, w, out);
  else if (W % 3 == 0) conv_row16_p<3, C>(x, W, w, out);
  else conv_row16_p<1, C>(x, W, w, out);
}
// weights [3][3 C][O] -> pairs [3][(3 C + 1) / 2][O][2]
static void pair_weights(const float* w, int C, u16* out) {
  const int K = (3 * C + 1) / 2 * 2;
  for (int ky = 0; ky < 3; ky++)
    for (int k = 0; k < K; k++)
      for (int o = 0; o < O; o++)
        out[ky * K * O + (k / 2 * O + o) * 2 + k % 2] = k < 3 * C ? round1(w[(ky * 3 * C + k) * O + o]) : 0;
}
// two pixels of 32 channels as pairs [32][2]
static inline void pair_pixels(const u16* a, const u16* b, uint32_t* out) {
  for (int h = 0; h < O; h += 16) {
    __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(a + h)));
    __m512i y = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(b + h)));
    _mm512_storeu_si512(out + h, _mm512_or_si512(x, _mm512_slli_epi32(y, 16)));
  }
}
// xe, xo: pairs of a row's pixels (0,1),(2,3).. and (1,2),(3,4)..; rows rs pairs apart
static __attribute__((noinline)) void wgrad_row16(const uint32_t* xe, const uint32_t* xo, int rs, int pairs, const uint32_t* dy, float* dw) {
  const int K = 8;
  for (int ky = 0; ky < 3; ky++)
    for (int kx = 0; kx < 3; kx++)
      for (int c = 0; c < O; c += K) {
        const uint32_t* xr = (kx == 1 ? xo : xe + (kx / 2) * O) + ky * rs * O + c;
        float* d = dw + ((ky * 3 + kx) * O + c) * O;
        v a[K], b[K];
#pragma GCC unroll 16
        for (int k = 0; k < K; k++) { a[k] = ld(d + k * O); b[k] = ld(d + k * O + 16); }
        for (int p = 0; p < pairs; p++) {
          __m512bh g0 = ld2(dy + p * O), g1 = ld2(dy + p * O + 16);
#pragma GCC unroll 16
          for (int k = 0; k < K; k++) {
            __m512bh s = bc2(xr + p * O + k);
            a[k] = _mm512_dpbf16_ps(a[k], s, g0);
            b[k] = _mm512_dpbf16_ps(b[k], s, g1);
          }
        }
#pragma GCC unroll 16
        for (int k = 0; k < K; k++) { st(d + k * O, a[k]); st(d + k * O + 16, b[k]); }
      }
}

// layer 1: a row's pixels (p, p + 1), p even, for each of the nine (kx, c): [p / 2][16]
static void pair_row3(const u16* x, int W, uint32_t* out) {
  for (int p = 0; p < W; p += 2) {
    __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + p * 3)));
    __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + p * 3 + 3)));
    _mm512_storeu_si512(out + p / 2 * 16, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }
}
static void pair_dy(const float* d, int W, uint32_t* out) {
  const __m512i high = _mm512_set1_epi32(0xffff0000);
  for (int p = 0; p < W; p += 2)
    for (int h = 0; h < O; h += 16) {
      __m512i a = rounded(ld(d + p * O + h)), b = rounded(ld(d + p * O + O + h));
      _mm512_storeu_si512(out + p / 2 * O + h, _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(b, high)));
    }
}
static __attribute__((noinline)) void wgrad3_row16(const uint32_t* x, int pairs, const uint32_t* dy, float* d) {
  const int K = 9;
  v a[K], b[K];
#pragma GCC unroll 16
  for (int k = 0; k < K; k++) { a[k] = ld(d + k * O); b[k] = ld(d + k * O + 16); }
  for (int p = 0; p < pairs; p++) {
    __m512bh g0 = ld2(dy + p * O), g1 = ld2(dy + p * O + 16);
#pragma GCC unroll 16
    for (int k = 0; k < K; k++) {
      __m512bh s = bc2(x + p * 16 + k);
      a[k] = _mm512_dpbf16_ps(a[k], s, g0);
      b[k] = _mm512_dpbf16_ps(b[k], s, g1);
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < K; k++) { st(d + k * O, a[k]); st(d + k * O + 16, b[k]); }
}

// Sums of a row for the statistics.
static void row_stats(const float* y, int W, float* s, float* q) {
  v s0 = ld(s), s1 = ld(s + 16), q0 = ld(q), q1 = ld(q + 16);
  for (int p = 0; p < W; p++) {
    v y0 = ld(y + p * O), y1 = ld(y + p * O + 16);
    s0 = _mm512_add_ps(s0, y0); s1 = _mm512_add_ps(s1, y1);
    q0 = _mm512_fmadd_ps(y0, y0, q0); q1 = _mm512_fmadd_ps(y1, y1, q1);
  }
  st(s, s0); st(s + 16, s1); st(q, q0); st(q + 16, q1);
}
static void pool_rows(const float* y0, const float* y1, int Wp, const float* sign, float* out) {
  for (int h = 0; h < O; h += 16) {
    v sg = ld(sign + h);
    for (int p = 0; p < Wp; p++) {
      const float *a = y0 + 2 * p * O + h, *b = y1 + 2 * p * O + h;
      v m = _mm512_max_ps(_mm512_max_ps(_mm512_mul_ps(sg, ld(a)), _mm512_mul_ps(sg, ld(a + O))),
                          _mm512_max_ps(_mm512_mul_ps(sg, ld(b)), _mm512_mul_ps(sg, ld(b + O))));
      st(out + p * O + h, m);
    }
  }
}
// dy of two rows (one, if it is the odd last: rows = 1, g == null): chosen pixel's
// slope * g, minus A + B y everywhere. Whatever lies outside the pooled area has no g.
static void dy_rows(const float* y, int W, int rows, const float* yp, const float* g, int Wp, const float* sign,
                    const float* slope, const float* A, const float* B, float* dy, int dstride) {
  for (int h = 0; h < O; h += 16) {
    v sg = ld(sign + h), sl = ld(slope + h), a = ld(A + h), b = ld(B + h);
    int done = 0;
    if (g) {
      done = 2 * Wp;
      for (int p = 0; p < Wp; p++) {
        v m = ld(yp + p * O + h), gg = _mm512_mul_ps(sl, ld(g + p * O + h));
        __mmask16 freem = 0xffff;
        for (int r = 0; r < 2; r++)
          for (int c = 0; c < 2; c++) {
            v yy = ld(y + (r * W + 2 * p + c) * O + h);
            __mmask16 is = _mm512_cmp_ps_mask(_mm512_mul_ps(sg, yy), m, _CMP_EQ_OQ) & freem;
            freem &= ~is;
            v t = _mm512_fnmadd_ps(b, yy, _mm512_sub_ps(_mm512_setzero_ps(), a));
            t = _mm512_mask_add_ps(t, is, t, gg);
            st(dy + r * dstride + (2 * p + c) * O + h, t);
          }
      }
    }
    for (int r = 0; r < rows; r++)
      for (int p = done; p < W; p++) {
        v yy = ld(y + (r * W + p) * O + h);
        st(dy + r * dstride + p * O + h, _mm512_fnmadd_ps(b, yy, _mm512_sub_ps(_mm512_setzero_ps(), a)));
      }
  }
}

struct Layer {
  int H, C, Hp;            // input and output of the pool
  u16* in16;               // the input in bfloat16 (half)
  float *in, *y, *yp, *g;  // [N,(H+2)^2 C], [N,H^2 O] (not layer 1), [N,Hp^2 O] twice
  float sign[O], slope[O], offset[O], mean[O], inv[O];
  double S0[O], S1[O];
};
struct Net {
  int N, S, relu, half;
  Layer L[4];
  float *wf[4];  // flipped
  u16 *w16, *d16;
  uint32_t *xe, *xo, *dyp, *x3;
  float *rows, *dypad, *dx;
};
static float* mem(size_t n) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, (n + 64) * sizeof(float))) abort();
  memset(p, 0, (n + 64) * sizeof(float));
  return (float*)p;
}

extern "C" void* net_new(int N, int S, int relu, int half) {
  Net* t = new Net();
  t->N = N; t->S = S; t->relu = relu; t->half = half;
  int H = S;
  if (S % 2 || S / 16 < 1) abort();
  for (int l = 0; l < 4; l++) {
    Layer& L = t->L[l];
    L.H = H; L.C = l ? O : 3; L.Hp = H / 2;
    size_t in = (size_t)N * (H + 2) * (H + 2) * L.C;
    L.in = half ? nullptr : mem(in);
    L.in16 = half ? (u16*)mem(in / 2 + 32) : nullptr;
    L.y = l ? mem((size_t)N * H * H * O) : nullptr;
    L.yp = mem((size_t)N * L.Hp * L.Hp * O);
    L.g = mem((size_t)N * L.Hp * L.Hp * O);
    t->wf[l] = mem(9 * L.C * O);
    H = L.Hp;
  }
  size_t area = (size_t)(S / 2 + 2) * (S / 2 + 3) * O;
  t->w16 = (u16*)mem(9 * O * O / 2);
  t->x3 = (uint32_t*)mem((size_t)4 * S / 2 * 16);
  t->d16 = (u16*)mem(area / 2);
  t->xe = (uint32_t*)mem(area); t->xo = (uint32_t*)mem(area); t->dyp = (uint32_t*)mem(area);
  t->rows = mem((size_t)4 * S * O);
  t->dypad = mem((size_t)(S / 2 + 2) * (S / 2 + 2) * O);
  t->dx = mem((size_t)(S / 2) * O);
  return t;
}
extern "C" void net_free(void* h) {
  Net* t = (Net*)h;
  for (int l = 0; l < 4; l++) { Layer& L = t->L[l]; free(L.in); free(L.in16); free(L.y); free(L.yp); free(L.g); free(t->wf[l]); }
  free(t->w16); free(t->d16); free(t->x3); free(t->xe); free(t->xo); free(t->dyp); free(t->rows); free(t->dypad); free(t->dx);
  delete t;
}

// Pool output [Hp,Hp,O] -> slope y + offset (ReLU) -> out with border b.
static void affine(const Layer& L, const float* yp, float* out, int b, int relu) {
  int Hp = L.Hp, stride = (Hp + 2 * b) * O;
  for (int h = 0; h < O; h += 16) {
    v sl = _mm512_mul_ps(ld(L.slope + h), ld(L.sign + h)), of = ld(L.offset + h);
    v lo = bc(relu ? 0.f : -INFINITY);
    for (int i = 0; i < Hp; i++)
      for (int j = 0; j < Hp; j++)
        st(out + (i + b) * stride + (j + b) * O + h,
           _mm512_max_ps(lo, _mm512_fmadd_ps(sl, ld(yp + (i * Hp + j) * O + h), of)));
  }
}

static void affine16(const Layer& L, const float* yp, u16* out) {
  int Hp = L.Hp, stride = (Hp + 2) * O;
  for (int h = 0; h < O; h += 16) {
    v sl = _mm512_mul_ps(ld(L.slope + h), ld(L.sign + h)), of = ld(L.offset + h);
    for (int i = 0; i < Hp; i++)
      for (int j = 0; j < Hp; j++)
        st16(out + (i + 1) * stride + (j + 1) * O + h,
             _mm512_max_ps(_mm512_setzero_ps(), _mm512_fmadd_ps(sl, ld(yp + (i * Hp + j) * O + h), of)));
  }
}

template <int C>
static void layer_forward(Net* t, int l, const float* w, const float* scale, const float* bias, const float* stored_mean,
                          const float* stored_var, int n, float* out_mean, float* out_var) {
  Layer& L = t->L[l];
  const int H = L.H, Hp = L.Hp;
  double s[O] = {0}, q[O] = {0};
  for (int o = 0; o < O; o++) L.sign[o] = scale[o] < 0 ? -1.f : 1.f;
  const bool half = t->half;
  if (half) pair_weights(w, C, t->w16);
  for (int i = 0; i < n; i++) {
    const size_t at = (size_t)i * (H + 2) * (H + 2) * C;
    float fs[O] = {0}, fq[O] = {0};
    for (int r = 0; r < H; r += 2) {
      float* y = L.y ? L.y + ((size_t)i * H + r) * H * O : t->rows;
      int two = r + 1 < H;
      for (int k = 0; k <= two; k++) {
        const size_t row = at + (size_t)(r + k) * (H + 2) * C;
        if (half) conv_row16<C>(L.in16 + row, H, t->w16, y + k * H * O);
        else conv_row<C>(L.in + row, H, w, y + k * H * O);
        if (!stored_mean) row_stats(y + k * H * O, H, fs, fq);
      }
      if (two) pool_rows(y, y + H * O, Hp, L.sign, L.yp + ((size_t)i * Hp + r / 2) * Hp * O);
    }
    for (int o = 0; o < O; o++) { s[o] += fs[o]; q[o] += fq[o]; }
  }
  double M = (double)n * H * H;
  for (int o = 0; o < O; o++) {
    double m = s[o] / M, var = q[o] / M - m * m;
    if (var < 0) var = 0;
    if (stored_mean) { m = stored_mean[o]; var = stored_var[o]; }
    else { out_mean[o] = m; out_var[o] = var; }
    L.mean[o] = m;
    L.inv[o] = 1.0 / sqrt(var + 1e-3);
    L.slope[o] = scale[o] * L.inv[o];
    L.offset[o] = bias[o] - L.slope[o] * m;
  }
}

// x [n,S,S,3]; w, scale, bias, and stored mean and var or null: arrays of 4 pointers.
extern "C" void net_forward(void* h, int n, const float* x, const float** w, const float** scale, const float** bias,
                            const float** smean, const float** svar, float* stats /* [4,2,O] */, float* feats) {
  Net* t = (Net*)h;
  const int S = t->S;
  for (int i = 0; i < n; i++)
    for (int r = 0; r < S; r++) {
      const size_t to = ((size_t)i * (S + 2) + r + 1) * (S + 2) * 3 + 3;
      const float* from = x + ((size_t)i * S + r) * S * 3;
      if (t->half) {
        u16* out = t->L[0].in16 + to;
        int k = 0;
        for (; k + 16 <= S * 3; k += 16) st16(out + k, ld(from + k));
        for (; k < S * 3; k++) out[k] = round1(from[k]);
      } else memcpy(t->L[0].in + to, from, S * 3 * sizeof(float));
    }
  for (int l = 0; l < 4; l++) {
    Layer& L = t->L[l];
    const float *m = smean ? smean[l] : nullptr, *va = svar ? svar[l] : nullptr;
    if (l) layer_forward<32>(t, l, w[l], scale[l], bias[l], m, va, n, stats + l * 2 * O, stats + (l * 2 + 1) * O);
    else layer_forward<3>(t, l, w[l], scale[l], bias[l], m, va, n, stats, stats + O);
    size_t size = (size_t)L.Hp * L.Hp * O;
    for (int i = 0; i < n; i++)
      if (l < 3 && t->half) affine16(L, L.yp + i * size, t->L[l + 1].in16 + (size_t)i * (L.Hp + 2) * (L.Hp + 2) * O);
      else if (l < 3) affine(L, L.yp + i * size, t->L[l + 1].in + (size_t)i * (L.Hp + 2) * (L.Hp + 2) * O, 1, 1);
      else affine(L, L.yp + i * size, feats + i * size, 0, t->relu);
  }
}

// df [n, Hp Hp O] of the last forward; gradients are written to dw, dscale, dbias.
extern "C" void net_backward(void* h, int n, const float* df, const float* feats, const float** w, const float** scale,
                             float** dw, float** dscale, float** dbias) {
  Net* t = (Net*)h;
  for (int l = 0; l < 4; l++) {
    for (int o = 0; o < O; o++) t->L[l].S0[o] = t->L[l].S1[o] = 0;
    memset(dw[l], 0, 9 * t->L[l].C * O * sizeof(float));
    if (l)  // flipped in space, channels turned: [8 - tap][o][c]
      for (int tap = 0; tap < 9; tap++)
        for (int c = 0; c < O; c++)
          for (int o = 0; o < O; o++) t->wf[l][((8 - tap) * O + o) * O + c] = w[l][(tap * O + c) * O + o];
  }
  Layer& T = t->L[3];
  size_t size = (size_t)T.Hp * T.Hp * O;
  for (size_t k = 0; k < n * size; k++) {
    float g = (!t->relu || feats[k] > 0) ? df[k] : 0.f;
    T.g[k] = g;
    T.S0[k % O] += g;
    T.S1[k % O] += (double)g * T.yp[k] * T.sign[k % O];
  }
  for (int l = 3; l >= 0; l--) {
    Layer& L = t->L[l];
    const int H = L.H, Hp = L.Hp;
    float A[O], B[O];
    double M = (double)n * H * H;
    for (int o = 0; o < O; o++) {
      double c = L.S1[o] - L.mean[o] * L.S0[o];
      dbias[l][o] = L.S0[o];
      dscale[l][o] = L.inv[o] * c;
      double b = L.slope[o] * (double)L.inv[o] * L.inv[o] * c / M;
      B[o] = b;
      A[o] = L.slope[o] * L.S0[o] / M - b * L.mean[o];
    }
    const int rest = 2 * Hp < H, half = t->half;
    if (half) pair_weights(l ? t->wf[l] : w[0], L.C, t->w16);
    for (int i = 0; i < n; i++) {
      const size_t at = (size_t)i * (H + 2) * (H + 2) * L.C;
      const float* in = L.in + at;
      const float *yp = L.yp + (size_t)i * Hp * Hp * O, *g = L.g + (size_t)i * Hp * Hp * O;
      if (l == 0) {
        float *y = t->rows, *d = t->rows + 2 * H * O;
        for (int r = 0; r < H; r += 2) {
          int two = r + 1 < H;
          const u16* in16 = L.in16 + at + (size_t)r * (H + 2) * 3;
          const int P3 = H / 2 * 16;
          if (half) {
            for (int k = r ? 2 : 0; k < 4; k++) pair_row3(in16 + k * (H + 2) * 3, H, t->x3 + ((r + k) & 3) * P3);
            for (int k = 0; k < 2; k++) conv_row16<3>(in16 + k * (H + 2) * 3, H, t->w16, y + k * H * O);
          } else
            for (int k = 0; k <= two; k++) conv_row<3>(in + (r + k) * (H + 2) * 3, H, w[0], y + k * H * O);
          dy_rows(y, H, 1 + two, yp + r / 2 * Hp * O, two ? g + r / 2 * Hp * O : nullptr, Hp, L.sign, L.slope, A, B, d, H * O);
          if (half)
            for (int k = 0; k < 2; k++) {
              pair_dy(d + k * H * O, H, t->dyp);
              for (int ky = 0; ky < 3; ky++) wgrad3_row16(t->x3 + ((r + k + ky) & 3) * P3, H / 2, t->dyp, dw[0] + ky * 9 * O);
            }
          else
            for (int k = 0; k <= two; k++) wgrad_row<3, 9>(in + (r + k) * (H + 2) * 3, H, d + k * H * O, dw[0]);
        }
        continue;
      }
      const float* y = L.y + (size_t)i * H * H * O;
      const int ds = (H + 2) * O;
      float* d = t->dypad;
      memset(d, 0, ds * sizeof(float));
      memset(d + (H + 1) * ds, 0, ds * sizeof(float));
      for (int r = 1; r <= H; r++) { memset(d + r * ds, 0, O * sizeof(float)); memset(d + r * ds + ds - O, 0, O * sizeof(float)); }
      for (int r = 0; r < 2 * Hp; r += 2)
        dy_rows(y + r * H * O, H, 2, yp + r / 2 * Hp * O, g + r / 2 * Hp * O, Hp, L.sign, L.slope, A, B, d + (r + 1) * ds + O, ds);
      if (rest) dy_rows(y + (H - 1) * H * O, H, 1, nullptr, nullptr, Hp, L.sign, L.slope, A, B, d + H * ds + O, ds);
      if (half) {
        const u16* in16 = L.in16 + at;
        const int T2 = H + 2, rs = (H + 3) / 2, pairs = (H + 1) / 2;
        for (int k = 0; k < T2 * ds; k += 16) st16(t->d16 + k, ld(d + k));
        for (int r = 0; r < T2; r++)
          for (int p = 0; p < rs; p++) {  // past the row's end: whatever is there meets a dy of 0
            const u16* x = in16 + r * ds + 2 * p * O;
            pair_pixels(x, 2 * p + 1 < T2 ? x + O : x, t->xe + (r * rs + p) * O);
            if (p < pairs) pair_pixels(x + O, 2 * p + 2 < T2 ? x + 2 * O : x, t->xo + (r * rs + p) * O);
          }
        for (int r = 0; r < H; r++) {
          const u16* g16 = t->d16 + (r + 1) * ds + O;
          for (int p = 0; p < pairs; p++) pair_pixels(g16 + 2 * p * O, g16 + (2 * p + 1) * O, t->dyp + p * O);
          wgrad_row16(t->xe + r * rs * O, t->xo + r * rs * O, rs, pairs, t->dyp, dw[l]);
        }
      } else
        for (int r = 0; r < H; r++) wgrad_row<32, 8>(in + r * ds, H, d + (r + 1) * ds + O, dw[l]);
      Layer& Q = t->L[l - 1];
      float f0[O] = {0}, f1[O] = {0};
      for (int r = 0; r < H; r++) {
        float* dx = Q.g + ((size_t)i * H + r) * H * O;
        if (half) conv_row16<32>(t->d16 + r * ds, H, t->w16, dx);
        else conv_row<32>(d + r * ds, H, t->wf[l], dx);
        const size_t inner = (size_t)(r + 1) * ds + O;
        const float *qy = Q.yp + ((size_t)i * H + r) * H * O;
        for (int hh = 0; hh < O; hh += 16) {
          v s0 = ld(f0 + hh), s1 = ld(f1 + hh), sg = ld(Q.sign + hh);
          for (int p = 0; p < H; p++) {
            __mmask16 on = half ? _mm256_cmpgt_epi16_mask(_mm256_loadu_si256((const __m256i*)(L.in16 + at + inner + p * O + hh)), _mm256_setzero_si256())
                                : _mm512_cmp_ps_mask(ld(in + inner + p * O + hh), _mm512_setzero_ps(), _CMP_GT_OQ);
            v gg = _mm512_maskz_mov_ps(on, ld(dx + p * O + hh));
            st(dx + p * O + hh, gg);
            s0 = _mm512_add_ps(s0, gg);
            s1 = _mm512_fmadd_ps(gg, _mm512_mul_ps(sg, ld(qy + p * O + hh)), s1);
          }
          st(f0 + hh, s0); st(f1 + hh, s1);
        }
      }
      for (int o = 0; o < O; o++) { Q.S0[o] += f0[o]; Q.S1[o] += f1[o]; }
    }
  }
}
