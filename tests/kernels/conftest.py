import pytest
from cuda_emulation import target  # noqa: F401  a fixture of the tests of CUDA kernels

from arsp.errors import ResourceError
from arsp.kernels import build


@pytest.fixture(scope="module")
def compiled():
    """The compiled library, or a skip that says why there is none."""
    try:
        build.load_library()
    except ResourceError as error:
        pytest.skip(error.message)
    yield build
    build.use_isa(-1)
