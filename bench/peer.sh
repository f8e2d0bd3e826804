#!/bin/sh
# Makes the virtual environment of the peer: llama-cpp-python, built from its source distribution
# with the instruction sets named here. Does nothing when it is there already.
set -eu
version=0.3.36
cache="${COLLOQUY_CACHE:-$HOME/.cache/colloquy}"
peer="$cache/peer"
stamp="$peer/built-$version"
[ -e "$stamp" ] && exit 0

# GGML_NATIVE off: its AMX path crashes with this version. No tools, server or multimodal parts.
CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
if grep -q avx512_bf16 /proc/cpuinfo && grep -q avx512_vnni /proc/cpuinfo; then
    CMAKE_ARGS="$CMAKE_ARGS -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"
fi
CMAKE_ARGS="$CMAKE_ARGS -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF"
CMAKE_ARGS="$CMAKE_ARGS -DLLAMA_BUILD_SERVER=OFF -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF"
export CMAKE_ARGS

mkdir -p "$cache"
log="$cache/peer.log"
echo "building the peer llama-cpp-python $version (about 10 minutes on 2 cores; log $log)" >&2
[ -x "$peer/bin/python" ] || python3 -m venv "$peer"
if ! nice -n 10 "$peer/bin/pip" install --no-binary llama-cpp-python \
    "llama-cpp-python==$version" numpy >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "the peer could not be built; the whole log is $log" >&2
    exit 1
fi
"$peer/bin/python" -c 'import llama_cpp'
touch "$stamp"
