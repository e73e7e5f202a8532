// Dot products of rows: y[m][n] = sum_k x[m][k] * w[n][k], both with k contiguous, in blocks that stay in registers.
//
// x and w hold float or bfloat16; quant.h has int8 and int4. Where the processor has no instructions for bfloat16, it is
// widened to float.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <immintrin.h>

#define UNROLL _Pragma("GCC unroll 32") // what indexes registers must be unrolled whole

typedef uint16_t bf16; // the upper half of a float

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
static inline void store(float *to, float x) { *to = x; }
static inline void store(bf16 *to, float x) { // round to nearest even; what is not a number stays so
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *to = x != x ? 0x7fc0 : (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline __m512 load16(const float *x) { return _mm512_loadu_ps(x); }
static inline __m512 load16(const bf16 *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}
static inline __m512 load16(const float *x, __mmask16 m) { return _mm512_maskz_loadu_ps(m, x); }
static inline __m512 load16(const bf16 *x, __mmask16 m) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, x)), 16));
}
static inline void store16(float *to, __m512 x) { _mm512_storeu_ps(to, x); }
static inline void store16(bf16 *to, __m512 x) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
#else
    __m512i b = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    b = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd), 16);
    b = _mm512_mask_mov_epi32(b, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(b));
#endif
}

// Lane j of the result is the sum of v[j]: a transposition that adds, 45 instructions for 16 sums.
static inline __m512 sum16(const __m512 *v) {
    __m512 u[4];
    UNROLL for (int j = 0; j < 4; j++) {
        __m512 a = v[4 * j], b = v[4 * j + 1], c = v[4 * j + 2], d = v[4 * j + 3];
        __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        u[j] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    }
    __m512 w01 = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x44), _mm512_shuffle_f32x4(u[0], u[1], 0xee));
    __m512 w23 = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x44), _mm512_shuffle_f32x4(u[2], u[3], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(w01, w23, 0x88), _mm512_shuffle_f32x4(w01, w23, 0xdd));
}

// y[m * ldy + n] = the sum of acc[m * N + n].
template <int M, int N> static inline void store_sums(const __m512 *acc, float *y, long ldy) {
    UNROLL for (int j = 0; j < M * N; j += 16) {
        __m512 part[16];
        UNROLL for (int l = 0; l < 16; l++) part[l] = j + l < M * N ? acc[j + l] : _mm512_setzero_ps();
        alignas(64) float sums[16];
        _mm512_store_ps(sums, sum16(part));
        UNROLL for (int l = 0; l < 16; l++)
            if (j + l < M * N) y[(j + l) / N * ldy + (j + l) % N] = sums[l];
    }
}

// One step of a dot product: how much of k it takes, and how.
template <class T> struct Step;
template <> struct Step<float> {
    static constexpr int K = 16;
    typedef __m512 V;
    static inline V load(const float *p) { return _mm512_loadu_ps(p); }
    static inline V load(const float *p, int left) { return _mm512_maskz_loadu_ps((__mmask16)((1u << left) - 1), p); }
    static inline __m512 add(__m512 acc, V a, V b) { return _mm512_fmadd_ps(a, b, acc); }
};
#ifdef __AVX512BF16__
template <> struct Step<bf16> {
    static constexpr int K = 32;
    typedef __m512i V;
    static inline V load(const bf16 *p) { return _mm512_loadu_si512(p); }
    static inline V load(const bf16 *p, int left) {
        return _mm512_maskz_loadu_epi16((__mmask32)((1ull << left) - 1), p);
    }
    static inline __m512 add(__m512 acc, V a, V b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
};
#else
template <> struct Step<bf16> {
    static constexpr int K = 16;
    typedef __m512 V;
    static inline V load(const bf16 *p) { return load16(p); }
    static inline V load(const bf16 *p, int left) { return load16(p, (__mmask16)((1u << left) - 1)); }
    static inline __m512 add(__m512 acc, V a, V b) { return _mm512_fmadd_ps(a, b, acc); }
};
#endif

// Rows of w that are fetched into the second cache before their turn. The hardware does not follow several rows at once:
// without it a pass over few tokens reads memory at a third of its speed. Of 8 to 128 rows, 96 was best by far.
static constexpr int AHEAD_ROWS = 96, AHEAD_BYTES = 1 << 19;
static inline long ahead_of(long row_bytes) {
    long rows = AHEAD_BYTES / row_bytes;
    return (rows < AHEAD_ROWS ? rows : AHEAD_ROWS) * row_bytes;
}
static inline void fetch(const void *p, long ahead) { __builtin_prefetch((const char *)p + ahead, 0, 2); }

// y[m * ldy + n] for M rows of x and N rows of w.
template <int M, int N, bool AHEAD, class T>
static inline void block(const T *x, long ldx, const T *w, long ldw, int k, float *y, long ldy) {
    const long ahead = AHEAD ? ahead_of(ldw * sizeof(T)) : 0;
    __m512 acc[M * N];
    UNROLL for (int i = 0; i < M * N; i++) acc[i] = _mm512_setzero_ps();
    int i = 0;
    for (; i + Step<T>::K <= k; i += Step<T>::K) {
        typename Step<T>::V b[N];
        UNROLL for (int n = 0; n < N; n++) {
            b[n] = Step<T>::load(w + n * ldw + i);
            if (AHEAD) fetch(w + n * ldw + i, ahead);
        }
        UNROLL for (int m = 0; m < M; m++) {
            typename Step<T>::V a = Step<T>::load(x + m * ldx + i);
            UNROLL for (int n = 0; n < N; n++) acc[m * N + n] = Step<T>::add(acc[m * N + n], a, b[n]);
        }
    }
    if (i < k) {
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int n = 0; n < N; n++)
                acc[m * N + n] = Step<T>::add(acc[m * N + n], Step<T>::load(x + m * ldx + i, k - i),
                                              Step<T>::load(w + n * ldw + i, k - i));
    }
    store_sums<M, N>(acc, y, ldy);
}

// Tokens m, m + 1, ... in blocks of M, as far as they go; returns the next one. Only the block of the first token reads w
// from memory.
template <int M, class T>
static inline int rows(int m, const T *x, long ldx, int count, const T *w, long ldw, int n, int k, float *y, long ldy) {
    constexpr int N = M == 1 ? 16 : M == 2 ? 8 : M == 4 ? 4 : 3;
    for (; m + M <= count; m += M) {
        int i = 0;
        const T *from = x + m * ldx;
        float *to = y + m * ldy;
        if (m == 0)
            for (; i + N <= n; i += N) block<M, N, true>(from, ldx, w + i * ldw, ldw, k, to + i, ldy);
        for (; i + N <= n; i += N) block<M, N, false>(from, ldx, w + i * ldw, ldw, k, to + i, ldy);
        for (; i < n; i++) block<M, 1, false>(from, ldx, w + i * ldw, ldw, k, to + i, ldy);
    }
    return m;
}

// y[m * ldy + j] = x[m] . w[j] for all m < count and j < n.
template <class T>
static inline void dots(const T *x, long ldx, int count, const T *w, long ldw, int n, int k, float *y, long ldy) {
    int m = rows<8>(0, x, ldx, count, w, ldw, n, k, y, ldy);
    m = rows<4>(m, x, ldx, count, w, ldw, n, k, y, ldy);
    m = rows<2>(m, x, ldx, count, w, ldw, n, k, y, ldy);
    rows<1>(m, x, ldx, count, w, ldw, n, k, y, ldy);
}

// Floats rounded to T.
template <class T> static inline void store_row(T *to, const float *from, int n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) store16(to + i, _mm512_loadu_ps(from + i));
    for (; i < n; i++) store(to + i, from[i]);
}

// How many values fill 32 bits: one float, two bfloat16.
template <class T> static constexpr int W = 4 / sizeof(T);

// acc += a vector times one number (or pair) for all of it.
static inline __m512 step(__m512 acc, const float *vector, const float *one) {
    return _mm512_fmadd_ps(_mm512_loadu_ps(vector), _mm512_set1_ps(*one), acc);
}
static inline __m512 step(__m512 acc, const bf16 *vector, const bf16 *pair) {
    int32_t both;
    memcpy(&both, pair, 4);
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(vector), (__m512bh)_mm512_set1_epi32(both));
#else
    __m512i v = _mm512_loadu_si512(vector), b = _mm512_set1_epi32(both), upper = _mm512_set1_epi32(0xffff0000);
    acc = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), acc);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(v, upper)), _mm512_castsi512_ps(_mm512_and_si512(b, upper)), acc);
#endif
}

// The same products with w in panels of 16 rows, [n / 16, k / W, 16, W]: a vector holds 16 rows, so nothing is added up
// across it. This is how weights lie; `ldp` is the length of a panel.
static constexpr int PANEL = 16, PANELS = 3;
template <int M, int P, bool AHEAD, class T>
static inline void panel_block(const T *x, long ldx, const T *w, long ldp, int k, float *y, long ldy) {
    const long ahead = AHEAD ? ahead_of(ldp / PANEL * sizeof(T)) : 0;
    __m512 acc[M * P];
    UNROLL for (int i = 0; i < M * P; i++) acc[i] = _mm512_setzero_ps();
    for (int c = 0; c < k; c += W<T>) {
        UNROLL for (int p = 0; p < P; p++)
            if (AHEAD) fetch(w + p * ldp + c * PANEL, ahead);
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int p = 0; p < P; p++)
                acc[m * P + p] = step(acc[m * P + p], w + p * ldp + c * PANEL, x + m * ldx + c);
    }
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int p = 0; p < P; p++) _mm512_storeu_ps(y + m * ldy + PANEL * p, acc[m * P + p]);
}

template <int M, int P, class T>
static inline int panel_rows(int m, const T *x, long ldx, int count, const T *w, long ldp, int k, float *y, long ldy) {
    for (; m + M <= count; m += M) {
        if (m == 0) panel_block<M, P, true>(x, ldx, w, ldp, k, y, ldy);
        else panel_block<M, P, false>(x + m * ldx, ldx, w, ldp, k, y + m * ldy, ldy);
    }
    return m;
}

template <int P, class T>
static inline void panel_tokens(const T *x, long ldx, int count, const T *w, long ldp, int k, float *y, long ldy) {
    int m = panel_rows<8, P>(0, x, ldx, count, w, ldp, k, y, ldy);
    m = panel_rows<4, P>(m, x, ldx, count, w, ldp, k, y, ldy);
    m = panel_rows<2, P>(m, x, ldx, count, w, ldp, k, y, ldy);
    panel_rows<1, P>(m, x, ldx, count, w, ldp, k, y, ldy);
}

// For n rows of w, at most 48; y has room for whole panels.
template <class T>
static inline void panel_dots(const T *x, long ldx, int count, const T *w, long ldp, int n, int k, float *y, long ldy) {
    if (n > 2 * PANEL) panel_tokens<3>(x, ldx, count, w, ldp, k, y, ldy);
    else if (n > PANEL) panel_tokens<2>(x, ldx, count, w, ldp, k, y, ldy);
    else panel_tokens<1>(x, ldx, count, w, ldp, k, y, ldy);
}
