# make demo: from a fresh clone to results on a rendered sample.
# make test: every test.  make quick: a part of them, in under a minute.  make lint: ruff.
# make bench: speed and memory beside the peers, see benchmarks/.
# make real DATA_PATH=...: accuracy beside PatchCore and the paper's form, on your categories.
# make gpu: the tests that need an NVIDIA GPU, then its speed; installs nothing where there is no .venv.
# make paper: every bank, table and figure of the paper and a report of them, on the sample, or on your data:
#     make paper DATA_PATH=/data/mvtec_ad FLAGS='--backbone resnet50 --device cuda'
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# FLAGS are settings for every script. The sample's results are kept apart from those of your own data.
ifdef DATA_PATH
RESULTS ?= .
else
SAMPLE := sample_data
RESULTS ?= runs/sample
FLAGS ?= --backbone efficientnet_lite0 --patchcore-backbone efficientnet_lite0
endif
SETTINGS = --data-path '$(or $(DATA_PATH),$(SAMPLE))' --category all --sampling-ratio all \
	--save-dir '$(RESULTS)/WEDGE-Net' --semanticoff-dir '$(RESULTS)/WEDGE-Net' \
	--semanticon-dir '$(RESULTS)/WEDGE-Net_Sem_ON' --patchcore-dir '$(RESULTS)/patch_core_pt' $(FLAGS)
PICTURES = $(SETTINGS) --sampling-ratio 0.1
DEMO = $(SETTINGS) --sampling-ratio 0.1,0.01

.PHONY: demo paper bench gpu real test quick lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed $(SAMPLE)
	$(RUN) train.py $(DEMO)
	$(RUN) evaluation.py $(DEMO)
	$(RUN) test.py $(PICTURES) --limit 3
	$(RUN) benchmark_fps.py $(DEMO) --calls 10
ifdef SAMPLE
	$(RUN) export_onnx.py $(PICTURES) --category tile
	$(RUN) predict.py $(RESULTS)/WEDGE-Net/10pct/model_data_tile_10pct.onnx $(SAMPLE)/tile/test/good/000.png \
		$(SAMPLE)/tile/test/glue_strip/007.png
endif
	$(RUN) make_report.py $(DEMO)
	@echo "next, on your own parts: docs/line.md"

# A script that fails for some categories does not cost the others: what failed is listed at the end.
paper: $(VENV)/installed $(SAMPLE)
	@failed=; \
	run() { echo "--- $$*"; $(RUN) "$$@" || { [ $$? -ne 130 ] || exit 130; failed="$$failed $$1"; }; }; \
	run train.py $(SETTINGS); \
	run train.py $(SETTINGS) --use-semantic True --save-dir '$(RESULTS)/WEDGE-Net_Sem_ON'; \
	run train_patchcore.py $(SETTINGS) --sampling-ratio 1; \
	run evaluation.py $(SETTINGS); \
	run test.py $(PICTURES); \
	run benchmark_fps.py $(SETTINGS); \
	run eval_noise_robustness.py $(PICTURES); \
	run visualize_noise_robustness.py $(PICTURES); \
	run eval_blur_robustness.py $(PICTURES); \
	run eval_color_robustness.py $(PICTURES); \
	run visualize_color_robustness.py $(PICTURES); \
	run eval_gap_score.py $(SETTINGS); \
	run ablation.py $(SETTINGS) --sampling-ratio 0.01; \
	run -m benchmarks.real $(SETTINGS) --sampling-ratio 0.01 --seeds 1; \
	run make_report.py $(SETTINGS); \
	[ -z "$$failed" ] || { echo "not everything went well:$$failed" >&2; exit 1; }

sample_data: | $(VENV)/installed
	$(RUN) prepare_data.py sample $@

# The benchmarks, beside the detectors and libraries that they are measured against, in an environment of their own; on
# the sample, and on Magnetic Tile Defects too where MTD_ROOT names that category's folder. About half an hour; leave the
# machine alone meanwhile. Results: benchmarks/results.
BENCH := .venv-bench/bin/python
PHOTOS := $(if $(MTD_ROOT),--data-path '$(dir $(MTD_ROOT))' --category '$(notdir $(MTD_ROOT))' --center-crop false)
DATA = $(or $(PHOTOS),--data-path sample_data --category tile)
# Of the sample's patches anomalib's coreset makes arrays of just under 32 MB, and glibc scatters its heap with them until
# the memory is full, now and then. Kept apart from the heap, in huge pages, they take it up to three times as long.
APART := GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=16777216
EDGE := --backbone efficientnet_lite0 --sampling-ratio 0.01 --save-dir runs/bench
bench: .venv-bench/installed
	@[ -d sample_data ] || $(BENCH) prepare_data.py sample sample_data
	@failed=; \
	$(if $(PHOTOS),,export $(APART);) \
	run() { echo "--- benchmarks.$$*"; $(BENCH) -m benchmarks."$$@" || { [ $$? -ne 130 ] || exit 130; failed="$$failed $$1"; }; }; \
	run coreset $(DATA); \
	run search $(DATA); \
	run inference $(DATA); \
	run scaling $(DATA); \
	$(BENCH) train.py $(DATA) $(EDGE); run edge $(DATA) $(EDGE) --images 20; \
	run patchcore_parity; \
	$(if $(PHOTOS),run peers $(PHOTOS) --backbone efficientnet_lite0;) \
	export $(APART); run peers --data-path sample_data --category screw,tile --backbone efficientnet_lite0; \
	[ -z "$$failed" ] || { echo "not everything went well:$$failed" >&2; exit 1; }

real: $(VENV)/installed
	@[ -n '$(DATA_PATH)' ] || { echo 'make real needs DATA_PATH=... (categories in the MVTec AD layout)' >&2; exit 2; }
	$(RUN) -m benchmarks.real --data-path '$(DATA_PATH)' --category all --center-crop false --sampling-ratio 0.01 $(FLAGS)

# Under 8 minutes on an H100. Set DATA_PATH for what less precision costs in AUROC.
ON_GPU = $(or $(wildcard $(RUN)),$(PYTHON))
gpu:
	OMP_NUM_THREADS=1 $(ON_GPU) -m pytest -q -n 8 -k 'on_a_gpu or cuda or nearest_is_found' $(patsubst %,tests/test_%.py,\
		coreset cuda_search engine memory_bank one_piece train_evaluation)
	$(ON_GPU) -m benchmarks.gpu --device cuda $(if $(DATA_PATH),--data-path '$(DATA_PATH)') $(FLAGS)

# One thread a process and as many processes as cores: threads of several processes would wait for each other.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto

# The method's parts one by one, data, settings and documents, and one training with its evaluation from end to end;
# without those that wait for other processes or measure memory.
QUICK := atomic backbone calibration corruptions coreset dataset frequency links memory_bank metrics rooms scoring \
	settings wedge_net
quick: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto $(QUICK:%=tests/test_%.py) \
		tests/test_train_evaluation.py::test_all_categories_and_ratios -k 'not process and not bounded and not 64_mb'

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv-bench/installed: benchmarks/requirements.txt requirements.txt
	$(PYTHON) -m venv .venv-bench
	$(BENCH) -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-bench .pytest_cache .ruff_cache .hypothesis
