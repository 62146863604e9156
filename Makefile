# The other checks are in CONTRIBUTING.md and .ci/run.
.PHONY: compose-test
compose-test: # docker-compose.yml, really run: needs a Docker engine with compose and buildx
	COMPOSE_TEST=1 python -m pytest -n 0 -m slow -rs tests/test_compose.py
