import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    """Small shapes are fastest on one thread; each test draws the same numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
