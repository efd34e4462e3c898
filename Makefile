# make demo   the whole loop on real LIBERO: collect, convert, train two arms, roll out, table
# make test   the fast tests; make test-slow adds simulators at length, faults and studies
#             (make test-slow SLOW="--minutes 60": what has begun after an hour; other options of pytest too)
# Each of them installs what is missing first (make setup).
PYTHON ?= python3.11
RUN = .venv/bin/python
# Set in many images: without bytecode every process compiles torch and transformers anew, 9 s of each start.
unexport PYTHONDONTWRITEBYTECODE

# make calvin installs the CALVIN simulator, which is not on PyPI, at the commits this code was measured with
.PHONY: calvin simpler simpler-original setup demo test test-slow lint clean

setup: .venv/.ready

.venv/.ready: requirements.txt scripts/setup.sh
	@PYTHON=$(PYTHON) bash scripts/setup.sh

calvin: setup
	@bash scripts/setup_calvin.sh

# make simpler installs ManiSkill3, for SimplerEnv's WidowX tasks, and a software Vulkan driver where none works
simpler: setup
	@bash scripts/setup_simpler.sh

# make simpler-original installs SimplerEnv's own simulator, for the Google Robot, in an interpreter of its own
simpler-original: simpler
	@bash scripts/setup_simpler_original.sh

demo: setup
	@$(RUN) scripts/demo.py

test: setup
	$(RUN) -m pytest -m "not slow" -n 2 --dist loadgroup

test-slow: setup
	$(RUN) -m pytest -m slow --timeout 1800 $(SLOW)

lint: setup
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

clean:
	rm -rf .venv .venv-simpler .pytest_cache .ruff_cache .hypothesis
