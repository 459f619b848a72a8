// Stands for libcuda.so.1: the functions of the driver API that birkhoff calls. A module is the path
// of an emulator, and launches run on the CPU. Misuse gets the error that a real driver gives, or
// CUDA_ERROR_UNKNOWN.

#include <cstring>
#include <dlfcn.h>

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NOT_FOUND = 500,
    LAUNCH_OUT_OF_RESOURCES = 701,
    LAUNCH_FAILED = 719,
    UNKNOWN = 999,
};

constexpr int DEVICES = 2;

struct Context {
    int device;
};

struct Module {
    Context* context;
    void* library;
};

struct Function {
    Module* module;
    char name[32];
    int shared_bytes = 48 << 10;
};

static Context contexts[DEVICES] = {{0}, {1}};
static bool retained[DEVICES];
static thread_local Context* stack[16];
static thread_local int depth;
static int launches, last_device;
static void* last_stream;
static bool initialised;

static Context* current() { return depth ? stack[depth - 1] : nullptr; }

extern "C" {

Result cuInit(unsigned flags) {
    initialised = true;
    return flags == 0 ? SUCCESS : INVALID_VALUE;
}

Result cuGetErrorString(Result result, const char** words) {
    *words = result == INVALID_IMAGE ? "device kernel image is invalid" : "fake error";
    return SUCCESS;
}

Result cuDeviceGet(int* device, int ordinal) {
    if (!initialised || ordinal < 0 || ordinal >= DEVICES) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

Result cuDevicePrimaryCtxRetain(Context** context, int device) {
    retained[device] = true;
    *context = &contexts[device];
    return SUCCESS;
}

Result cuCtxPushCurrent_v2(Context* context) {
    if (!context || !retained[context->device] || depth == 16) return INVALID_CONTEXT;
    stack[depth++] = context;
    return SUCCESS;
}

Result cuCtxPopCurrent_v2(Context** context) {
    if (depth == 0) return INVALID_CONTEXT;
    *context = stack[--depth];
    return SUCCESS;
}

Result cuModuleLoadData(Module** module, const char* image) {
    if (!current()) return INVALID_CONTEXT;
    if (std::strncmp(image, "EMULATOR:", 9) != 0) return INVALID_IMAGE;
    void* library = dlopen(image + 9, RTLD_NOW);
    if (!library) return INVALID_IMAGE;
    *module = new Module{current(), library};
    return SUCCESS;
}

Result cuModuleGetFunction(Function** function, Module* module, const char* name) {
    if (current() != module->context) return INVALID_CONTEXT;
    if (std::strlen(name) >= sizeof(Function::name)) return NOT_FOUND;
    *function = new Function{module, {}};
    std::strcpy((*function)->name, name);
    return SUCCESS;
}

Result cuFuncSetAttribute(Function* function, int attribute, int value) {
    if (attribute != 8 || value > (227 << 10)) return INVALID_VALUE;
    function->shared_bytes = value;
    return SUCCESS;
}

Result cuLaunchKernel(
    Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
    unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters,
    void** extra
) {
    if (current() != function->module->context) return INVALID_CONTEXT;
    if (!grid_x || !grid_y || grid_y > 65535 || grid_z != 1) return INVALID_VALUE;
    if (block_y != 1 || block_z != 1 || extra) return INVALID_VALUE;
    if ((int)shared_bytes > function->shared_bytes) return LAUNCH_OUT_OF_RESOURCES;
    using Launch = const char* (*)(const char*, int, int, int, int, void*, int);
    const auto launch = (Launch)dlsym(function->module->library, "emulated_launch");
    if (!launch) return NOT_FOUND;
    launches++;
    last_stream = stream;
    last_device = current()->device;
    const char* failure = launch(
        function->name, (int)grid_x, (int)grid_y, (int)block_x, (int)shared_bytes, parameters[0], 0
    );
    return failure ? LAUNCH_FAILED : SUCCESS;
}

// For the tests.
int fake_launches() { return launches; }
int fake_last_device() { return last_device; }
int fake_depth() { return depth; }
void* fake_last_stream() { return last_stream; }

}  // extern "C"
