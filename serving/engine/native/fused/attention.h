// Grouped-query attention of one token over pages of keys and values.
//
// A page of one head holds keys as [head_dim / W, page_tokens, W] and values as [page_tokens / W, head_dim, W], where W values
// fill 32 bits (one float, two bfloat16). So one vector holds the same dimension of 16 keys, or 16 dimensions of one key (two
// neighbours with bfloat16), and neither scores nor mixtures are ever added up across a vector. A page has a multiple of 16
// positions.
#pragma once

#include "dot.h"

// e^x within 2 ulp for x <= 0 and as far up as a float reaches (Cephes' reduction and polynomial).
static inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.37f)), _mm512_set1_ps(-103.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    const float c[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    UNROLL for (int i = 0; i < 5; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c[i]));
    p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// x = e^(x - most) for n values (a multiple of 16), and their sum. What is not a number stays so.
static inline float exp_row(float *x, int n, float most) {
    __m512 acc = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
        __m512 v = _mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(most));
        __m512 e = _mm512_mask_mov_ps(exp16(v), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), v);
        _mm512_storeu_ps(x + i, e);
        acc = _mm512_add_ps(acc, e);
    }
    return _mm512_reduce_add_ps(acc);
}

static inline float largest(const float *x, int n) {
    __m512 acc = _mm512_set1_ps(-INFINITY);
    for (int i = 0; i < n; i += 16) acc = _mm512_max_ps(_mm512_loadu_ps(x + i), acc);
    return _mm512_reduce_max_ps(acc);
}

struct Reach {
    const int32_t *pages;
    int page_tokens, kv_heads, first, last; // positions read: first ... last
    // The 16 positions that a vector holds begin at a multiple of 16; scores are kept from there.
    int begin() const { return first & ~15; }
};

template <class T> static inline T *page_of(T *cache, const Reach &r, int head, int position, int d) {
    return cache + ((long)r.pages[position / r.page_tokens] * r.kv_heads + head) * r.page_tokens * d;
}
static inline long key_at(int p, int c, int page, int w) { return ((long)(c / w) * page + p % page) * w + c % w; }
static inline long value_at(int p, int c, int page, int w, int d) { return ((long)(p % page / w) * d + c) * w + p % w; }

// Keys and values of one position and head into their page. If nothing follows yet, the value's neighbour in its vector is
// cleared, as it will be multiplied by nought.
template <class T>
static inline void write(const float *key, const float *value, T *keys, T *values, const Reach &r, int head, int position, int d, bool end) {
    T *k = page_of(keys, r, head, position, d), *v = page_of(values, r, head, position, d);
    for (int c = 0; c < d; c++) store(k + key_at(position, c, r.page_tokens, W<T>), key[c]);
    for (int c = 0; c < d; c++) store(v + value_at(position, c, r.page_tokens, W<T>, d), value[c]);
    if (W<T> == 2 && end && position % 2 == 0)
        for (int c = 0; c < d; c++) v[value_at(position + 1, c, r.page_tokens, 2, d)] = 0;
}

// Scores of H heads with B x 16 keys of one page.
template <int H, int B, class T>
static inline void score_block(const T *q, const T *keys, int page_tokens, int d, float scale, float *scores, long ld) {
    __m512 acc[H * B];
    UNROLL for (int i = 0; i < H * B; i++) acc[i] = _mm512_setzero_ps();
    for (int c = 0; c < d; c += W<T>) {
        const T *k = keys + (long)c * page_tokens;
        UNROLL for (int h = 0; h < H; h++)
            UNROLL for (int b = 0; b < B; b++) acc[h * B + b] = step(acc[h * B + b], k + 16 * W<T> * b, q + h * d + c);
    }
    UNROLL for (int h = 0; h < H; h++)
        UNROLL for (int b = 0; b < B; b++)
            _mm512_storeu_ps(scores + h * ld + 16 * b, _mm512_mul_ps(acc[h * B + b], _mm512_set1_ps(scale)));
}

// out[h][from ...] for H heads and C x 16 dimensions.
template <int H, int C, class T>
static inline void mix_block(const T *weights, long ldw, const T *values, const Reach &r, int head, int d, int from,
                             const float *inverse, T *out) {
    __m512 acc[H * C];
    UNROLL for (int i = 0; i < H * C; i++) acc[i] = _mm512_setzero_ps();
    const int begin = r.begin();
    for (int p = r.first & ~(W<T> - 1); p <= r.last;) {
        int end = p - p % r.page_tokens + r.page_tokens;
        if (end > r.last + 1) end = r.last + 1;
        const T *v = page_of((T *)values, r, head, p, d) + value_at(p, from, r.page_tokens, W<T>, d);
        for (; p < end; p += W<T>, v += (long)d * W<T>)
            UNROLL for (int c = 0; c < C; c++)
                UNROLL for (int h = 0; h < H; h++)
                    acc[h * C + c] = step(acc[h * C + c], v + 16 * W<T> * c, weights + h * ldw + p - begin);
    }
    UNROLL for (int h = 0; h < H; h++)
        UNROLL for (int c = 0; c < C; c++)
            store16(out + (long)h * d + from + 16 * c, _mm512_mul_ps(acc[h * C + c], _mm512_set1_ps(inverse[h])));
}

template <int H, class T>
static inline void scores_of(const T *q, const T *keys, const Reach &r, int head, int d, float scale, float *scores, long ld) {
    const int begin = r.begin();
    for (int p = begin; p <= r.last;) {
        const T *k = page_of((T *)keys, r, head, p, d) + (long)(p % r.page_tokens) * W<T>;
        if (r.page_tokens - p % r.page_tokens >= 32 && p + 16 <= r.last) {
            score_block<H, 2>(q, k, r.page_tokens, d, scale, scores + p - begin, ld);
            p += 32;
        } else {
            score_block<H, 1>(q, k, r.page_tokens, d, scale, scores + p - begin, ld);
            p += 16;
        }
    }
}

template <int H, class T>
static inline void mix_of(const T *weights, long ldw, const T *values, const Reach &r, int head, int d, const float *inverse, T *out) {
    int from = 0;
    for (; from + 64 <= d; from += 64) mix_block<H, 4>(weights, ldw, values, r, head, d, from, inverse, out);
    for (; from < d; from += 16) mix_block<H, 1>(weights, ldw, values, r, head, d, from, inverse, out);
}

// H query heads q [H, d] that read kv head `head`; out like q. `scores` has room for H * ld floats.
template <int H, class T>
static inline void attend_to(const T *q, const T *keys, const T *values, const Reach &r, int head, int d, float scale,
                             float cap, float *scores, long ld, T *out) {
    float inverse[H];
    const int before = r.first - r.begin(), n = r.last - r.begin() + 1, whole = (n + 15) & ~15;
    scores_of<H>(q, keys, r, head, d, scale, scores, ld);
    for (int h = 0; h < H; h++) {
        float *s = scores + h * ld;
        for (int j = 0; j < before; j++) s[j] = -INFINITY;
        for (int j = n; j < whole; j++) s[j] = -INFINITY;
        if (cap > 0)
            for (int j = before; j < n; j++) s[j] = cap * tanhf(s[j] / cap);
        inverse[h] = 1.0f / exp_row(s, whole, largest(s, whole));
        if (W<T> == 2) store_row((T *)s, s, whole); // narrower, so what is read was not yet written over
    }
    mix_of<H>((const T *)scores, ld * W<T>, values, r, head, d, inverse, out);
}

template <class T>
static inline void attend(const T *q, int count, const T *keys, const T *values, const Reach &r, int head, int d,
                          float scale, float cap, float *scores, long ld, T *out) {
    int h = 0;
    for (; h + 4 <= count; h += 4) attend_to<4>(q + (long)h * d, keys, values, r, head, d, scale, cap, scores, ld, out + (long)h * d);
    q += (long)h * d, out += (long)h * d;
    if (count - h == 3) attend_to<3>(q, keys, values, r, head, d, scale, cap, scores, ld, out);
    if (count - h == 2) attend_to<2>(q, keys, values, r, head, d, scale, cap, scores, ld, out);
    if (count - h == 1) attend_to<1>(q, keys, values, r, head, d, scale, cap, scores, ld, out);
}
