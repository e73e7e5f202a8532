// Dot products with weights of 8 or 4 bits: both sides as small integers in groups, as in llama.cpp's Q8_0.
//
// A row of w has groups of 64 weights, stored as unsigned bytes around 128, or as nibbles around 8 (byte i of a group
// holds weights i and i + 32). Scales are bfloat16: one a group of 64 for int8, one a group of 32 for int4. A row of x is
// rounded to int8 in groups of 64; `lift` holds, lane by lane, what the offset of w adds too much.
#pragma once

#include "dot.h"

static constexpr int GROUP = 64;

// A token's row of x in int8, for both kinds of weights.
struct Rounded {
    int8_t *values; // [count, k]
    float *scales;  // [count, k / 64]
    int32_t *lifts; // [count, k / 64, 16], times -128 or -8
};

static inline void round_row(const float *x, int k, int offset, int8_t *values, float *scales, int32_t *lifts) {
    for (int g = 0; g < k / GROUP; g++) {
        float most = 0;
        for (int i = 0; i < GROUP; i++) most = fmaxf(most, fabsf(x[g * GROUP + i]));
        float scale = most / 127.0f, inverse = most > 0 ? 127.0f / most : 0.0f;
        scales[g] = scale;
        for (int i = 0; i < GROUP; i++) values[g * GROUP + i] = (int8_t)lrintf(x[g * GROUP + i] * inverse);
        for (int l = 0; l < 16; l++) {
            const int8_t *v = values + g * GROUP + 4 * l;
            lifts[g * 16 + l] = -offset * (v[0] + v[1] + v[2] + v[3]);
        }
    }
}

template <int BITS> struct Packed;
template <> struct Packed<8> {
    static constexpr int BYTES = 64, SCALES = 1, OFFSET = 128;
};
template <> struct Packed<4> {
    static constexpr int BYTES = 32, SCALES = 2, OFFSET = 8;
};

template <int BITS, int M, int N, bool AHEAD>
static inline void quant_block(const int8_t *x, const float *xs, const int32_t *lifts, int k, const uint8_t *w,
                               const bf16 *ws, float *y, long ldy) {
    const int groups = k / GROUP;
    const long ldw = (long)groups * Packed<BITS>::BYTES, lds = (long)groups * Packed<BITS>::SCALES;
    const long ahead = AHEAD ? ahead_of(ldw) : 0;
    __m512 acc[M * N];
    UNROLL for (int i = 0; i < M * N; i++) acc[i] = _mm512_setzero_ps();
    for (int g = 0; g < groups; g++) {
        UNROLL for (int n = 0; n < N; n++) {
            const uint8_t *p = w + n * ldw + g * Packed<BITS>::BYTES;
            if (AHEAD) fetch(p, ahead);
            __m512i v;
            __m512 s;
            if (BITS == 8) {
                v = _mm512_loadu_si512(p);
                s = _mm512_set1_ps(to_float(ws[n * lds + g]));
            } else {
                __m256i both = _mm256_loadu_si256((const __m256i *)p), low = _mm256_set1_epi8(15);
                v = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(both, low)),
                                       _mm256_and_si256(_mm256_srli_epi16(both, 4), low), 1);
                s = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(to_float(ws[n * lds + 2 * g])),
                                         _mm512_set1_ps(to_float(ws[n * lds + 2 * g + 1])));
            }
            UNROLL for (int m = 0; m < M; m++) {
                __m512i sum = _mm512_loadu_si512(lifts + ((long)m * groups + g) * 16);
                sum = _mm512_dpbusd_epi32(sum, v, _mm512_loadu_si512(x + (long)m * k + g * GROUP));
                __m512 both = _mm512_mul_ps(s, _mm512_set1_ps(xs[(long)m * groups + g]));
                acc[m * N + n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, acc[m * N + n]);
            }
        }
    }
    store_sums<M, N>(acc, y, ldy);
}

template <int BITS, int M, bool AHEAD>
static inline void quant_rows(const Rounded &x, long from, const uint8_t *w, const bf16 *ws, int n, int k, float *y, long ldy) {
    const int groups = k / GROUP;
    const long ldw = (long)groups * Packed<BITS>::BYTES, lds = (long)groups * Packed<BITS>::SCALES;
    constexpr int N = M == 1 ? 16 : M == 4 ? 4 : 8;
    const int8_t *values = x.values + from * k;
    const float *scales = x.scales + from * groups;
    const int32_t *lifts = x.lifts + from * groups * 16;
    int i = 0;
    for (; i + N <= n; i += N)
        quant_block<BITS, M, N, AHEAD>(values, scales, lifts, k, w + i * ldw, ws + i * lds, y + i, ldy);
    for (; i < n; i++)
        quant_block<BITS, M, 1, AHEAD>(values, scales, lifts, k, w + i * ldw, ws + i * lds, y + i, ldy);
}

template <int BITS>
static inline void quant_dots(const Rounded &x, long from, int count, const uint8_t *w, const bf16 *ws, int n, int k, float *y, long ldy) {
    int m = 0;
    for (; m + 4 <= count; m += 4) {
        if (m == 0) quant_rows<BITS, 4, true>(x, from, w, ws, n, k, y, ldy);
        else quant_rows<BITS, 4, false>(x, from + m, w, ws, n, k, y + m * ldy, ldy);
    }
    for (; m < count; m++) {
        if (m == 0) quant_rows<BITS, 1, true>(x, from, w, ws, n, k, y, ldy);
        else quant_rows<BITS, 1, false>(x, from + m, w, ws, n, k, y + m * ldy, ldy);
    }
}

// Row by row back to T, for passes over so many tokens that products of T are faster.
template <int BITS, class T>
static inline void unpack(const uint8_t *w, const bf16 *ws, int n, int k, T *to) {
    const int groups = k / GROUP;
    float row[GROUP];
    for (long g = 0; g < (long)n * groups; g++) {
        const uint8_t *p = w + g * Packed<BITS>::BYTES;
        const bf16 *s = ws + g * Packed<BITS>::SCALES;
        float low = to_float(s[0]), high = to_float(s[Packed<BITS>::SCALES - 1]);
        for (int i = 0; i < 32; i++) {
            row[i] = low * (BITS == 8 ? p[i] - 128 : (p[i] & 15) - 8);
            row[i + 32] = high * (BITS == 8 ? p[i + 32] - 128 : (p[i] >> 4) - 8);
        }
        store_row(to + g * GROUP, row, GROUP);
    }
}
