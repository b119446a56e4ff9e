"""A base with three deltas, made once a module."""

import pytest
from many_deltas import family_of


@pytest.fixture(scope="module")
def make_family(pair, tmp_path_factory):
    def make(name, **options):
        return family_of(pair(name), tmp_path_factory.mktemp("tenants"), **options)

    return make
