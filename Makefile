# make              the program: ./run, portable across processors and fast on each
# make demo         a story by the model that ships with the project
# make smollm2      a real chat model, 100 MB: models/smollm2-135m-instruct.bin
# make test         all tests; needs Python 3 and nothing else (no packages, no network)
# make check        more tests, against models, tokenizers and packages: DATA=folder
# make OPENMP=0     threads without OpenMP; make CC=clang: another compiler

CC ?= cc
PYTHON ?= python3
WARNINGS = -Wall -Wextra -Wpedantic -Wshadow
CFLAGS ?= -O3

# OpenMP if the compiler has it; otherwise POSIX threads do the same work.
OPENMP ?= $(shell printf '\43include <omp.h>\nint main(void){return omp_get_num_threads()-1;}' | \
            $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo 1 || echo 0)
THREADS = $(if $(filter 1,$(OPENMP)),-fopenmp,-pthread)

# No -march: the kernels for each instruction set are in there, and one is chosen at start.
run: run.c tokenizer.c build/settings
	$(CC) $(CFLAGS) -ffp-contract=off $(WARNINGS) -Wno-psabi -std=gnu11 $(THREADS) run.c -o run -lm -lpthread

# Changes when the compiler or its options do, so that another CC builds again.
build/settings: always
	@mkdir -p build
	@echo '$(CC) $(CFLAGS) $(THREADS)' | cmp -s - $@ || echo '$(CC) $(CFLAGS) $(THREADS)' > $@

demo: run
	./run models/stories260K.bin -i "Once upon a time" -n 0 -s 3

test: run
	$(PYTHON) tests/test.py

check: run
	$(PYTHON) tests/check.py $(DATA)

smollm2: run
	$(PYTHON) models/smollm2.py

clean:
	rm -rf run build

always:

.PHONY: always demo test check smollm2 clean
