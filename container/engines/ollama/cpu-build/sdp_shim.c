/*
 * Preloaded in front of libggml-base.so: replaces BigDL's GPU-only attention operator
 * with ggml's own flash attention, which has a CPU kernel.
 *
 * Both compute softmax(q k^T * scale + mask) v; ggml's kernel takes the mask as F16.
 */

#include <stdbool.h>

struct ggml_context;

/* The first field of every ggml_tensor is its type (an enum, int-sized). */
struct ggml_tensor {
    int type;
};

enum { GGML_TYPE_F16 = 1 };

extern struct ggml_tensor *ggml_cast(struct ggml_context *ctx, struct ggml_tensor *a, int type);
extern struct ggml_tensor *ggml_flash_attn_ext(struct ggml_context *ctx, struct ggml_tensor *q,
                                               struct ggml_tensor *k, struct ggml_tensor *v,
                                               struct ggml_tensor *mask, float scale,
                                               float max_bias, float logit_softcap);

struct ggml_tensor *ggml_bigdl_fp16_sdp(struct ggml_context *ctx, struct ggml_tensor *q,
                                        struct ggml_tensor *k, struct ggml_tensor *v,
                                        struct ggml_tensor *mask, float scale, int mode,
                                        bool causal)
{
    (void)mode;
    (void)causal;
    if (mask && mask->type != GGML_TYPE_F16)
        mask = ggml_cast(ctx, mask, GGML_TYPE_F16);
    return ggml_flash_attn_ext(ctx, q, k, v, mask, scale, 0.0f, 0.0f);
}
