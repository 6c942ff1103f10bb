// Runs a network that `bgd_plugin.export` wrote to ONNX. Nothing but onnxruntime is needed: no Python, no torch.
//
//   g++ -std=c++17 -O2 run.cpp -I$ORT/include -L$ORT/lib -lonnxruntime -Wl,-rpath,$ORT/lib -o run
//   ./run net.onnx input.bin [--small] > output.bin
//
// `input.bin` holds the network's input as raw float32, as numpy's `tofile` writes it; a batch of free size is 1 here.
// `--small` keeps the weights compressed in memory and decodes them at each run, which is slower.

#include <onnxruntime_cxx_api.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

static std::vector<float> numbers_in(const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(std::string("cannot read ") + path);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    std::vector<float> numbers(bytes.size() / sizeof(float));
    std::memcpy(numbers.data(), bytes.data(), numbers.size() * sizeof(float));
    return numbers;
}

static void run(int count, char** arguments) {
    if (count < 3) throw std::runtime_error("usage: run net.onnx input.bin [--small] > output.bin");
    Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "bgd");
    Ort::SessionOptions options;
    if (count > 3 && std::string(arguments[3]) == "--small")
        options.AddConfigEntry("optimization.constant_folding_max_output_size_in_bytes", "1024");
    Ort::Session session(environment, arguments[1], options);
    Ort::AllocatorWithDefaultOptions allocator;
    const auto input = session.GetInputNameAllocated(0, allocator);
    const auto output = session.GetOutputNameAllocated(0, allocator);
    const char *inputs[] = {input.get()}, *outputs[] = {output.get()};
    auto shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
    for (auto& size : shape) size = size < 0 ? 1 : size;
    auto values = numbers_in(arguments[2]);
    const auto cpu = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto tensor = Ort::Value::CreateTensor<float>(cpu, values.data(), values.size(), shape.data(), shape.size());
    const auto start = std::chrono::steady_clock::now();
    auto results = session.Run(Ort::RunOptions{}, inputs, &tensor, 1, outputs, 1);
    const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;

    const auto size = results[0].GetTensorTypeAndShapeInfo().GetElementCount() * sizeof(float);
    std::cout.write(reinterpret_cast<const char*>(results[0].GetTensorData<float>()), size);
    std::cerr << size / sizeof(float) << " numbers in " << spent.count() << " ms\n";
}

int main(int count, char** arguments) try {
    run(count, arguments);
    return 0;
} catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
}
