"""What other packages' own code reads of what qjax wrote: `make test-peers`.

Apart from all other tests, as they need PyTorch and the packages of the extra "peers".
A plain run of pytest does not come here (norecursedirs in pyproject.toml).
"""


def pytest_configure(config):
    # Warnings of the packages are not ours to heed; those of qjax stay errors.
    config.addinivalue_line("filterwarnings", "ignore")
    config.addinivalue_line("filterwarnings", "error:::qjax")
