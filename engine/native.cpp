// GPT-2's forward pass on a CPU with AVX2, for rows of many texts at once; forward.py compiles this file and calls `forward`.
//
// A call is a whole step, as a token is some 500 calls of torch otherwise. No sum depends on the rows beside it: each adds up its
// products in the order of the inputs, however many rows share a tile, so that a text is the same alone, in a crowd, and when
// what was sampled is read again as a prompt. WEIGHTS and CACHE are chosen when it is compiled.
#include <immintrin.h>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

struct Norm { const float *weight, *bias; };
struct Matrix {  // (out, in), kept as panels (out / 16, in / group, 16, group), a multiple of four of them
    const void* weight;
    const float *bias, *scale;  // of each output
    const int32_t* start;       // what an output's sum begins with
    int64_t in, out;
};
struct Layer { Norm ln_1; Matrix c_attn, c_proj; Norm ln_2; Matrix c_fc, mlp_c_proj; };
struct Model { int64_t n_layer, n_head, n_embd, exact_gelu; const Layer* layers; Norm ln_f; Matrix head; };
struct Row { char* cache; int64_t places, position; };  // cache (n_layer, 2, n_head, places, head size)

// ---- Eight numbers at once

typedef float f8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4), may_alias));

static f8 load(const float* p) { return *(const f8*)p; }
static f8 load(const uint16_t* p) { return (f8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }  // float16
static void store(float* p, f8 x) { *(f8*)p = x; }
static void store(uint16_t* p, f8 x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0)); }
static f8 fma(f8 a, f8 b, f8 c) { return (f8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static f8 larger(f8 a, f8 b) { return a > b ? a : b; }
static float sum(f8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
static float largest(f8 x) { return *std::max_element((float*)&x, (float*)&x + 8); }

static f8 exp(f8 x) {  // 2^n e^r, with |r| at most ln(2) / 2, where a polynomial is as good as float32
    x = larger(x, f8{} - 87) < f8{} + 88 ? larger(x, f8{} - 87) : f8{} + 88;
    i8 n = (i8)_mm256_cvtps_epi32((__m256)(x * 1.44269504f));
    f8 r = x - __builtin_convertvector(n, f8) * 0.693147181f, p = f8{} + 1.f / 720;
    for (float c : {1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f}) p = fma(p, r, f8{} + c);
    return p * (f8)((n + 127) << 23);
}

// ---- What is multiplied: how 8 outputs' sums begin, take in `step` inputs, and become numbers

struct Float32 {
    using Weight = float; using Input = float; using Sums = f8;
    static constexpr int group = 1, step = 1;
    static float prepare(const float* x, float* input, int64_t C) { std::copy_n(x, C, input); return 1; }
    static f8 begin(const Matrix&, int64_t) { return f8{}; }
    static f8 get(const float* w) { return load(w); }
    static f8 spread(const float* x) { return f8{} + *x; }
    static f8 add(f8 sums, f8 w, f8 x) { return fma(w, x, sums); }
    static f8 end(f8 sums, const Matrix&, int64_t, float) { return sums; }
};
struct Float16 : Float32 {
    using Weight = uint16_t;
    static f8 get(const Weight* w) { return load(w); }
};
struct BFloat16 : Float32 {
    using Weight = uint16_t;
    static f8 get(const Weight* w) {
        return (f8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)w)), 16);
    }
};
struct Int8 {  // inputs are rounded to 1 to 127 around 64; sums begin by taking 64 off
    using Weight = int8_t; using Input = uint8_t; using Sums = i8;
    static constexpr int group = 4, step = 8;
    struct Eight { i8 low, high; };  // of the 8 inputs of a step: four, and four
    static float prepare(const float* x, uint8_t* input, int64_t C) {
        f8 most = f8{} + 1e-12f;
        for (int64_t c = 0; c < C; c += 8) most = larger(most, larger(load(x + c), -load(x + c)));
        float scale = largest(most) / 63;
        for (int64_t c = 0; c < C; c += 8) {
            i8 whole = (i8)_mm256_cvtps_epi32((__m256)(load(x + c) / scale)) + 64;
            __m128i half = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)whole), _mm256_extracti128_si256((__m256i)whole, 1));
            _mm_storel_epi64((__m128i*)(input + c), _mm_packus_epi16(half, half));
        }
        return scale;
    }
    static i8 begin(const Matrix& m, int64_t n) { return *(const i8*)(m.start + n); }
    static Eight get(const int8_t* w) { return {*(const i8*)w, *(const i8*)(w + 16 * group)}; }
    static Eight spread(const uint8_t* x) { return {i8{} + *(const int32_t*)x, i8{} + *(const int32_t*)(x + group)}; }
    static i8 add(i8 sums, Eight w, Eight x) {
#ifdef __AVX512VNNI__
        sums = (i8)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)x.low, (__m256i)w.low);
        return (i8)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)x.high, (__m256i)w.high);
#else  // four products fit 16 bits: kernels.py has seen to it
        auto pairs = [](i8 a, i8 b) { return _mm256_maddubs_epi16((__m256i)a, (__m256i)b); };
        __m256i fours = _mm256_add_epi16(pairs(x.low, w.low), pairs(x.high, w.high));
        return sums + (i8)_mm256_madd_epi16(fours, _mm256_set1_epi16(1));
#endif
    }
    static f8 end(i8 sums, const Matrix& m, int64_t n, float scale) {
        return __builtin_convertvector(sums, f8) * (load(m.scale + n) * scale);
    }
};
using Kind = WEIGHTS;

// ---- The threads that share a step

struct Phase { std::atomic<int64_t> taken{0}, done{0}; };  // of its items

struct Thread {  // every thread goes through the same phases
    Phase* phase;

    // Calls each(i) for every i < n, `chunk` of them at a time by whoever is free. It waits for what is being done, and not for
    // threads that do nothing: where other programs use the cores, one may come late, and finds its work done.
    template <class Each> void share(int64_t n, int64_t chunk, Each each) {
        for (int64_t i; (i = phase->taken.fetch_add(chunk)) < n;) {
            int64_t stop = std::min(n, i + chunk);
            for (int64_t j = i; j < stop; j++) each(j);
            phase->done += stop - i;
        }
        for (int spins = 0; phase->done < n; spins++) spins < 1000 ? _mm_pause() : std::this_thread::yield();
        phase++;
    }
};

struct Team {
    std::mutex in_use;
    std::function<void()> work;
    std::atomic<int> call{0}, inside{0}, members{1};  // call is odd while there is work; inside are the members at it

    void run(int threads, std::function<void()> each_thread) {
        std::unique_lock lock(in_use, std::try_to_lock);
        if (!lock || threads == 1) return each_thread();  // somebody else has the team: alone, to the same end
        for (; members < threads; members++) std::thread([this] { serve(); }).detach();
        work = each_thread;
        call++, call.notify_all();
        work();
        call++;
        while (inside) std::this_thread::yield();
    }

    void serve() {
        for (int seen = 0;; call.wait(seen)) {
            inside++;
            if ((seen = call) % 2) work();
            inside--;
        }
    }
};

// ---- Products; all threads call these together

struct Buffers { std::vector<Kind::Input> inputs; std::vector<float> scales, normed, a, b; };
enum After { STORE, ADD, GELU, EXACT_GELU };

static void normalize(const Norm& norm, const float* x, float* y, int64_t C) {
    f8 total{}, squares{};
    for (int64_t c = 0; c < C; c += 8) total += load(x + c);
    float mean = sum(total) / C;
    for (int64_t c = 0; c < C; c += 8) squares = fma(load(x + c) - mean, load(x + c) - mean, squares);
    float rstd = 1 / std::sqrt(sum(squares) / C + 1e-5f);
    for (int64_t c = 0; c < C; c += 8) store(y + c, fma((load(x + c) - mean) * rstd, load(norm.weight + c), load(norm.bias + c)));
}

template <int M, int V>  // M rows of x (M, in) times V vectors of 8 outputs, from the panel of output `first` on
static void tile(const Matrix& m, int64_t first, const Kind::Input* x, const float* scales, float* y, After after) {
    Kind::Sums sums[M][V];
    for (auto& row : sums)
        for (int v = 0; v < V; v++) row[v] = Kind::begin(m, first + 8 * v);
    auto w = (const Kind::Weight*)m.weight + first * m.in;
    for (int64_t k = 0; k < m.in; k += Kind::step, w += 16 * Kind::step) {
        decltype(Kind::get(w)) weights[V];
        for (int v = 0; v < V; v++) weights[v] = Kind::get(w + v / 2 * 16 * m.in + v % 2 * 8 * Kind::group);
        for (int i = 0; M > 1 && i < 16 * Kind::step; i += 64 / sizeof *w)
            _mm_prefetch((const char*)(w + 16 * m.in + i), _MM_HINT_T1);  // the next panel, while this one is computed with
        for (int i = 0; i < M; i++) {
            auto input = Kind::spread(x + i * m.in + k);
            for (int v = 0; v < V; v++) sums[i][v] = Kind::add(sums[i][v], weights[v], input);
        }
    }
    for (int i = 0; i < M; i++)
        for (int64_t v = 0, n = first; v < V && n < m.out; v++, n += 8) {
            f8 result = Kind::end(sums[i][v], m, n, scales[i]) + load(m.bias + n), z = result;
            float* to = y + i * m.out + n;
            if (after == GELU) result /= 1 + exp(-1.59576912f * (z + 0.044715f * z * z * z));  // 2 sqrt(2 / pi): tanh by exp
            if (after == EXACT_GELU) for (int j = 0; j < 8; j++) result[j] *= 0.5f * (1 + std::erf(z[j] * 0.707106781f));
            if (after == ADD) result += load(to);
            if (m.out - n >= 8) store(to, result);
            else std::copy_n((float*)&result, m.out - n, to);
        }
}

// y (R, out) of x (R, in), normalized before where there is a norm
static void linear(Thread& thread, const Matrix& m, const Norm* norm, const float* x, int64_t R, float* y, After after,
                   Buffers& buffers) {
    thread.share(R, 1, [&](int64_t r) {
        const float* from = x + r * m.in;
        if (norm) normalize(*norm, from, &buffers.normed[r * m.in], m.in), from = &buffers.normed[r * m.in];
        buffers.scales[r] = Kind::prepare(from, &buffers.inputs[r * m.in], m.in);
    });
    constexpr decltype(&tile<1, 2>) tiles[] = {tile<1, 2>, tile<2, 2>, tile<3, 2>, tile<4, 2>};
    thread.share((m.out + 63) / 64, 2, [&](int64_t block) {
        if (R == 1) return tile<1, 8>(m, block * 64, buffers.inputs.data(), buffers.scales.data(), y, after);
        for (int64_t first = block * 64; first < block * 64 + 64; first += 16)
            for (int64_t r = 0; r < R; r += 4) {
                auto rows = tiles[std::min<int64_t>(4, R - r) - 1];
                rows(m, first, &buffers.inputs[r * m.in], &buffers.scales[r], y + r * m.out, after);
            }
    });
}

// ---- Attention

template <int N>  // N * 8 of a head's outputs: the mean of values v (count, size) by weights p
static void mean(const float* p, const CACHE* v, int64_t count, int64_t size, float total, float* y) {
    f8 sums[N] = {};
    for (int64_t t = 0; t < count; t++)
        for (int j = 0; j < N; j++) sums[j] = fma(f8{} + p[t], load(v + t * size + 8 * j), sums[j]);
    for (int j = 0; j < N; j++) store(y + 8 * j, sums[j] / total);
}

// y (R, n_embd) of qkv (R, 3 n_embd): each row attends to its own text's cache, up to itself
static void attend(Thread& thread, const Model& m, int64_t layer, const float* qkv, const Row* rows, int64_t R, float* y) {
    int64_t C = m.n_embd, size = C / m.n_head;
    auto place = [&](const Row& row, int64_t head, int64_t t) {  // heads of keys, then heads of values
        return (CACHE*)row.cache + ((layer * 2 * m.n_head + head) * row.places + t) * size;
    };
    thread.share(R, 1, [&](int64_t r) {
        for (int64_t c = 0; c < 2 * C; c += 8)
            store(place(rows[r], c / size, rows[r].position) + c % size, load(qkv + (3 * r + 1) * C + c));
    });
    std::vector<float> p;
    thread.share(R * m.n_head, 1, [&](int64_t i) {
        int64_t r = i / m.n_head, head = i % m.n_head, count = rows[r].position + 1;
        const float* q = qkv + 3 * r * C + head * size;
        const CACHE *k = place(rows[r], head, 0), *v = place(rows[r], m.n_head + head, 0);
        p.resize(rows[r].places);  // a multiple of eight
        f8 most = f8{} - INFINITY, total{};
        for (int64_t t = 0; t < count; t += 8) {
            __m256 dot[8] = {};
            for (int64_t d = 0; d < size; d += 8)
                for (int j = 0; j < 8; j++) dot[j] = (__m256)fma(load(q + d), load(k + (t + j) * size + d), (f8)dot[j]);
            __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(dot[0], dot[1]), _mm256_hadd_ps(dot[2], dot[3]));
            __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(dot[4], dot[5]), _mm256_hadd_ps(dot[6], dot[7]));
            f8 scores = (f8)_mm256_permute2f128_ps(low, high, 0x20) + (f8)_mm256_permute2f128_ps(low, high, 0x31);
            for (int64_t j = count - t; j < 8; j++) scores[j] = -INFINITY;  // what comes after the row
            store(&p[t], scores / std::sqrt((float)size));
            most = larger(most, load(&p[t]));
        }
        most = f8{} + largest(most);
        for (int64_t t = 0; t < count; t += 8) {
            f8 e = exp(load(&p[t]) - most);
            for (int64_t j = count - t; j < 8; j++) e[j] = 0;
            store(&p[t], e), total += e;
        }
        int64_t d = 0;
        for (; d + 64 <= size; d += 64) mean<8>(p.data(), v + d, count, size, sum(total), y + r * C + head * size + d);
        for (; d < size; d += 8) mean<1>(p.data(), v + d, count, size, sum(total), y + r * C + head * size + d);
    });
}

// ---- A step

// logits (L, vocabulary) of the rows numbered `last`, of embeddings x (R, n_embd), which become the last layer's outputs
extern "C" void forward(const Model& m, int64_t R, const Row* rows, float* x, int64_t L, const int64_t* last, float* logits,
                        int threads) {
    int64_t C = m.n_embd;
    auto floats = [](int64_t n) { return std::vector<float>(n); };
    Buffers buffers{std::vector<Kind::Input>(R * 4 * C), floats(R), floats(R * C), floats(R * 4 * C), floats(R * C)};
    float *a = buffers.a.data(), *b = buffers.b.data();
    std::vector<Phase> phases(10 * m.n_layer + 3);
    static Team& team = *new Team;  // its threads end with the program
    team.run(threads, [&] {
        Thread thread{phases.data()};
        for (int64_t i = 0; i < m.n_layer; i++) {
            const Layer& layer = m.layers[i];
            linear(thread, layer.c_attn, &layer.ln_1, x, R, a, STORE, buffers);
            attend(thread, m, i, a, rows, R, b);
            linear(thread, layer.c_proj, nullptr, b, R, x, ADD, buffers);
            linear(thread, layer.c_fc, &layer.ln_2, x, R, a, m.exact_gelu ? EXACT_GELU : GELU, buffers);
            linear(thread, layer.mlp_c_proj, nullptr, a, R, x, ADD, buffers);
        }
        thread.share(L, 1, [&](int64_t l) { std::copy_n(x + last[l] * C, C, b + l * C); });
        linear(thread, m.head, &m.ln_f, b, L, logits, STORE, buffers);
    });
}
