/*
 * Replaces libggml-sycl.so and libsycl.so.8, so that the SYCL build of Ollama runs
 * on the CPU without Intel's GPU runtime.
 *
  * libllama asks ggml for SYCL device 0 while it builds its compute contexts; these functions return
  * ggml's own CPU device. Every ggml symbol is resolved at load time from libggml-base.so and
  * libggml.so, which are loaded before this library.
 */

typedef struct ggml_backend_device *ggml_backend_dev_t;
typedef struct ggml_backend_buffer_type *ggml_backend_buffer_type_t;
typedef struct ggml_backend *ggml_backend_t;

enum { GGML_BACKEND_DEVICE_TYPE_CPU = 0 };

extern ggml_backend_dev_t ggml_backend_dev_by_type(int type);
extern ggml_backend_buffer_type_t ggml_backend_dev_buffer_type(ggml_backend_dev_t device);
extern ggml_backend_t ggml_backend_dev_init(ggml_backend_dev_t device, const char *params);

int ggml_backend_sycl_get_device_count(void)
{
    return 0;
}

ggml_backend_buffer_type_t ggml_backend_sycl_buffer_type(int device)
{
    (void)device;
    return ggml_backend_dev_buffer_type(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
}

ggml_backend_t ggml_backend_sycl_init(int device)
{
    (void)device;
    return ggml_backend_dev_init(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), 0);
}

/*
 * The only two libsycl symbols that libllama binds when it is loaded: the destructor of
 * sycl::exception and its type information (name pointer in the second word). All others
 * are bound at their first call, which never happens without a SYCL device.
 */
void _ZN4sycl3_V19exceptionD1Ev(void *self)
{
    (void)self;
}

void *_ZTIN4sycl3_V19exceptionE[3] = {0, "N4sycl3_V19exceptionE", 0};
